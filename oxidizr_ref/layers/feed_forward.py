"""Feed-forward layers: SwiGLU, and a mixture of SwiGLU experts.

Shapes: n tokens, D hidden, E experts, k experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from oxidizr_ref import ops
from oxidizr_ref.autograd import Tensor
from oxidizr_ref.backend import to_device, to_host
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.fused.swiglu import swiglu
from oxidizr_ref.nn import Linear, Module
from oxidizr_ref.watch import named


class SwiGLU(Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer 2020). x: ``[..., hidden]``. Returns the same shape."""

    def __init__(self, hidden_size: int, intermediate_size: int, std: float, output_std: float) -> None:
        self.gate_proj = Linear(hidden_size, intermediate_size, std)
        self.up_proj = Linear(hidden_size, intermediate_size, std)
        self.down_proj = Linear(intermediate_size, hidden_size, output_std)

    def __call__(self, x: Tensor) -> Tensor:
        y = swiglu(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        return named("down_proj.output", y)


class Routing(NamedTuple):
    """What a router did with one batch: int ``[E]`` tokens given to each expert, and the balance loss, a scalar."""

    assigned: np.ndarray[Any, Any]
    balance: Tensor


def router_metrics(batches: Sequence[Sequence[Routing]], balances: Sequence[float]) -> dict[str, Any]:
    """What the routers of a model did in a step of one or more batches; nothing for a model without routers.

    balances: the numbers of all the balance losses.

    ``expert_load``: for each mixture of experts, the share of all assignments that each of its experts was given;
    ``expert_entropy``: the entropy of these shares over that of even ones, so 1 is even and 0 is one expert alone;
    ``balance_loss``: the mean over batches and mixtures; ``dropped_tokens``: always 0, told so that nobody has to guess.
    """
    if not any(batches):
        return {}
    loads, entropies = [], []
    for of_layer in zip(*batches, strict=True):
        assigned = np.sum([routing.assigned for routing in of_layer], axis=0)
        load = assigned / max(1, assigned.sum())
        loads.append(load.tolist())
        entropies.append(sum(p * math.log(1 / p) for p in loads[-1] if p) / math.log(max(2, len(load))))
    balance = math.fsum(balances) / len(balances)
    return {"expert_load": loads, "expert_entropy": entropies, "balance_loss": balance, "dropped_tokens": 0}


class Router(Module):
    """Chooses k experts for every token, weight ``[E,D]``."""

    def __init__(self, config: ModelConfig, std: float) -> None:
        self.num_experts, self.k, self.normed = config.num_experts, config.experts_per_tok, config.norm_topk_prob
        self.gate = Linear(config.hidden_size, config.num_experts, std)

    def __call__(self, x: Tensor) -> tuple[np.ndarray[Any, Any], Tensor, Routing]:
        """x: ``[n,D]``. Returns the experts of every token, int ``[n,k]``, their weights ``[n,k]``, and the `Routing`.

        Equal logits go to the lower index. With ``norm_topk_prob`` the weights are the softmax over the k logits, as in
        Mixtral (Jiang et al. 2024), else the probabilities among all experts, as in DeepSeek-V2 and, for k = 1, where the
        former would be 1 whatever the router says, in the Switch Transformer (Fedus et al. 2021). The balance loss is eq. 4
        to 6 there: ``E Σ_e f_e P_e``, f_e the share of all n·k assignments that e was given, P_e its mean probability; 1
        when even. No token is ever dropped.
        """
        logits = self.gate(x)
        probabilities = named("probs", ops.softmax(logits))
        # Who goes where decides on the host what runs: on a device this is the one place of a layer that waits for it.
        order = np.argsort(-to_host(logits.data), axis=-1, kind="stable")
        ids = named("ids", order[:, : self.k], also=("gate.output",))
        weights = ops.softmax(ops.take_along(logits, ids=ids)) if self.normed else ops.take_along(probabilities, ids=ids)
        weights = named("weights", weights, also=("ids",))
        assigned = np.bincount(ids.reshape(-1), minlength=self.num_experts)
        share = to_device(assigned / max(1, ids.size), logits.data)
        balance = (probabilities.mean(axis=0) * ops.as_tensor(share, like=logits)).sum() * float(self.num_experts)
        return ids, weights, Routing(assigned, named("balance", balance, also=("ids",)))


class MixtureOfExperts(Module):
    """``y = Σ_e weight_e expert_e(x) [+ shared_expert(x)]`` over the k experts that the router chose for each token.

    Only those run: the tokens are sorted by expert, and each expert takes its own in one go (Shazeer et al. 2017).
    """

    def __init__(self, config: ModelConfig, std: float, output_std: float) -> None:
        sizes = config.hidden_size, config.intermediate_size, std, output_std
        self.experts = [SwiGLU(*sizes) for _ in range(config.num_experts)]
        self.shared = config.shared_expert_enabled
        if self.shared:
            self.shared_expert = SwiGLU(*sizes)
        self.router = Router(config, std)

    def __call__(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x: ``[...,D]``. Returns the same shape, and what the router did."""
        shape, D = x.shape, x.shape[-1]
        x = x.reshape(-1, D)
        ids, weights, routing = self.router(x)
        n, k = ids.shape
        by_expert = np.argsort(ids.reshape(-1), kind="stable")  # of the n·k assignments; an expert's in order of tokens
        parts = list(ops.split(ops.lookup(x, ids=by_expert // k), routing.assigned.tolist(), axis=0))
        parts = [named(f"experts.{e}.input", part, also=("router.ids",)) for e, part in enumerate(parts)]
        outputs = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
        back = np.argsort(by_expert)  # all different: any sort gives the inverse permutation
        chosen = ops.lookup(ops.concatenate(*outputs, axis=0), ids=back).reshape(n, k, D)
        y = (chosen * weights.reshape(n, k, 1)).sum(axis=1)
        if self.shared:
            y = y + self.shared_expert(x)
        return named("output", y.reshape(*shape)), routing
