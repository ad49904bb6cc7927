"""Mistakes that people make, each planted in a twin by overriding one small method, and where a comparison must find it.

Faults of a layer are in one layer only, so that all before it agrees, and in the backward pass all behind it. ``expected``
is the first name, in the order in which the reference computes, whose numbers differ; several where any of them is right.
Those called "oxidizr's" are in its code (docs/differences_from_oxidizr.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from architectures import batch, lively_model
from oracle.traced_twins import Batch, Twin
from torch import Tensor
from torch.nn import functional

from oxidizr_ref.config import Config, TrainerConfig
from oxidizr_ref.config_keys import ModelConfig

Arrays = dict[str, np.ndarray[Any, Any]]

STEPS = 2
#: With these every step is clipped, and both decay and the balance loss count.
TRAINER: dict[str, Any] = {
    "learning_rate": 1e-2,
    "batch_size": 3,
    "weight_decay": 0.1,
    "load_balance_alpha": 0.1,
    "max_grad_norm": 1.0,
}


class Setting(NamedTuple):
    """What both sides compute: one batch a step."""

    config: Config
    weights: Arrays
    batches: list[Batch]


@dataclasses.dataclass(frozen=True)
class Fault:
    """A mistake. changes: of the architecture's config. prepare: changes the weights of both sides in place."""

    architecture: str
    twin: type[Twin]
    expected: tuple[str, ...]
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prepare: Callable[[Arrays], None] | None = None

    @property
    def layer(self) -> int | None:
        """The layer it is in; None for what is in no layer, or in all."""
        return self.twin.faulty_layer if issubclass(self.twin, InLayer) else None

    def setting(self) -> Setting:
        """The model in float64, lively weights, a batch for each of `STEPS`."""
        return setting(self.architecture, self.changes, self.prepare)


def setting(
    architecture: str, changes: Mapping[str, Any] | None = None, prepare: Callable[[Arrays], None] | None = None
) -> Setting:
    """See `Fault.setting`."""
    model = lively_model(architecture, **(changes or {}))
    weights = {name: array.copy() for name, array in model.state_dict().items()}
    if prepare is not None:
        prepare(weights)
    config = Config(model=model.config, trainer=TrainerConfig(**TRAINER))
    return Setting(config, weights, [batch(seed) for seed in range(STEPS)])


FAULTS: dict[str, Fault] = {}


def planted(
    name: str, architecture: str, *expected: str, prepare: Callable[[Arrays], None] | None = None, **changes: Any
) -> Callable[[type[Twin]], type[Twin]]:
    """Enter the twin below into `FAULTS`."""

    def enter(twin: type[Twin]) -> type[Twin]:
        assert name not in FAULTS
        FAULTS[name] = Fault(architecture, twin, expected, changes, prepare)
        return twin

    return enter


class InLayer(Twin):
    """A fault of layer ``faulty_layer`` only."""

    faulty_layer: ClassVar[int] = 1

    @property
    def here(self) -> bool:
        """Whether the faulty layer is being computed."""
        return self.layer == self.faulty_layer


# --- linear maps, norms, residuals ------------------------------------------------------------------------------------


@planted("transposed weight", "llama", "layers.1.self_attn.o_proj.output")
class TransposedWeight(InLayer):
    def parameter(self, name: str) -> Tensor:
        weight = super().parameter(name)
        return weight.T if self.here and name.endswith("o_proj.weight") else weight


@planted("epsilon outside the root", "llama", "layers.1.input_layernorm.rms")
class EpsilonOutsideTheRoot(InLayer):
    def root_mean_square(self, x: Tensor) -> Tensor:
        outside = (x**2).mean(dim=-1, keepdim=True).sqrt() + self.config.rms_norm_eps
        return outside if self.here else super().root_mean_square(x)


@planted("norm without groups", "mamba2_groups", "layers.1.mamba2.mixer.norm.rms")
class NormWithoutGroups(InLayer):
    def root_mean_square(self, x: Tensor) -> Tensor:
        if not self.here or x.shape[-2] == 1:
            return super().root_mean_square(x)
        return super().root_mean_square(x.flatten(-2).unsqueeze(-2)).expand(*x.shape[:-1], 1)


@planted("latent not normalized", "mla_norm", "layers.1.self_attn.kv_norm.output")
class LatentNotNormalized(InLayer):
    def norm(self, at: str, x: Tensor, groups: int = 1) -> Tensor:
        if self.here and at.endswith("kv_norm"):
            return self.note(f"{at}.output", x * self.parameter(f"{at}.weight"))
        return super().norm(at, x, groups)


@planted("residual behind the norm", "llama", "layers.1.after_attention")
class ResidualBehindTheNorm(InLayer):
    def residual(self, h: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return x + y if self.here else super().residual(h, x, y)


@planted("mamba without residual", "mamba2", "layers.1.output")
class MambaWithoutResidual(InLayer):
    def residual(self, h: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return y if self.here else super().residual(h, x, y)


# --- attention --------------------------------------------------------------------------------------------------------


@planted("interleaved RoPE", "llama", "layers.1.self_attn.q")
class InterleavedRope(InLayer):
    """Channels 2i and 2i+1 are a pair, as in GPT-J."""

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not self.here:
            return super().rotate(x, cos, sin)
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


@planted("RoPE backwards", "hybrid", "layers.1.self_attn.q_r")
class RopeBackwards(InLayer):
    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return super().rotate(x, cos, -sin if self.here else sin)


@planted("shared key not rotated", "mla", "layers.1.self_attn.k_r")
class SharedKeyNotRotated(InLayer):
    def rope(self, x: Tensor) -> Tensor:
        return x if self.here and x.shape[2] == 1 else super().rope(x)


@planted("missing scale", "llama", "layers.1.self_attn.scores")
class MissingScale(InLayer):
    def scale(self, width: int) -> float:
        return 1.0 if self.here else super().scale(width)


@planted("scale without the rotated width", "mla", "layers.1.self_attn.scores")
class ScaleWithoutTheRotatedWidth(InLayer):
    def scale(self, width: int) -> float:
        return super().scale(width - self.config.d_rope if self.here else width)


@planted("key heads in the wrong order", "llama", "layers.1.self_attn.scores")
class KeyHeadsInTheWrongOrder(InLayer):
    """Query head i reads key/value head ``i % K``."""

    def heads_for_queries(self, v: Tensor, H: int) -> Tensor:
        return v.repeat(1, 1, H // v.shape[2], 1) if self.here else super().heads_for_queries(v, H)


@planted("mask off by one", "llama", "layers.1.self_attn.masked_scores")
class MaskOffByOne(InLayer):
    """Every query sees the token that it is to predict."""

    def visible(self, T: int) -> Tensor:
        return torch.ones(T, T, dtype=torch.bool).tril(1) if self.here else super().visible(T)


@planted("softmax over queries", "llama", "layers.1.self_attn.probs")
class SoftmaxOverQueries(InLayer):
    def softmax(self, scores: Tensor) -> Tensor:
        return scores.softmax(dim=-2) if self.here else super().softmax(scores)


@planted("keys without gradient", "llama", "layers.1.self_attn.k.grad")
class KeysWithoutGradient(InLayer):
    def attention_scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        return super().attention_scores(q, k.detach() if self.here else k, scale)


@planted("softmax without gradient (oxidizr's)", "hybrid", "layers.1.self_attn.masked_scores.grad")
class SoftmaxWithoutGradient(InLayer):
    def softmax(self, scores: Tensor) -> Tensor:
        return super().softmax(scores.detach() if self.here else scores)


# --- feed-forward -----------------------------------------------------------------------------------------------------


@planted("gate and up exchanged", "llama", "layers.1.mlp.activation")
class GateAndUpExchanged(InLayer):
    def activation(self, gate: Tensor, up: Tensor) -> Tensor:
        return super().activation(up, gate) if self.here else super().activation(gate, up)


def _equal_experts(weights: Arrays) -> None:
    """The last two of layer 1's four experts get the same logit, exactly: one channel of the token."""
    router = weights["layers.1.moe.router.gate.weight"]
    router[2:] = 0
    router[2:, 3] = 1


@planted("equal experts in the wrong order", "moe", "layers.1.moe.router.ids", prepare=_equal_experts)
class EqualExpertsInTheWrongOrder(InLayer):
    """The higher index first."""

    def expert_ids(self, logits: Tensor) -> Tensor:
        if not self.here:
            return super().expert_ids(logits)
        return logits.shape[-1] - 1 - super().expert_ids(logits.flip(-1))


@planted("experts weighted by all probabilities", "moe", "layers.1.moe.router.weights")
class ExpertsWeightedByAllProbabilities(InLayer):
    def router_weights(self, logits: Tensor, probs: Tensor, ids: Tensor) -> Tensor:
        return probs.gather(-1, ids) if self.here else super().router_weights(logits, probs, ids)


@planted("the only expert weighted by 1", "moe_top1", "layers.1.moe.router.weights")
class TheOnlyExpertWeightedByOne(InLayer):
    """The softmax over one logit: the router would not learn."""

    def router_weights(self, logits: Tensor, probs: Tensor, ids: Tensor) -> Tensor:
        return logits.gather(-1, ids).softmax(dim=-1) if self.here else super().router_weights(logits, probs, ids)


@planted("expert weights in the wrong order", "moe", "layers.1.moe.output")
class ExpertWeightsInTheWrongOrder(InLayer):
    def combined(self, chosen: Tensor, weights: Tensor, shared: Tensor | None) -> Tensor:
        return super().combined(chosen, weights.flip(-1) if self.here else weights, shared)


@planted("shared expert dropped", "hybrid", "layers.1.moe.output")
class SharedExpertDropped(InLayer):
    def combined(self, chosen: Tensor, weights: Tensor, shared: Tensor | None) -> Tensor:
        return super().combined(chosen, weights, None if self.here else shared)


@planted("balance loss of the first choice only", "moe", "layers.1.moe.router.balance")
class BalanceLossOfTheFirstChoiceOnly(InLayer):
    def balance(self, probs: Tensor, ids: Tensor) -> Tensor:
        return super().balance(probs, ids[:, :1] if self.here else ids)


@planted("balance loss without gradient (oxidizr's)", "hybrid", "layers.1.moe.router.balance.grad")
class BalanceLossWithoutGradient(Twin):
    def mean_balance(self, balances: list[Tensor]) -> Tensor:
        return super().mean_balance(balances).detach()


# --- what the Mambas share --------------------------------------------------------------------------------------------


@planted("convolution not causal", "mamba1", "layers.1.mamba.conv1d.pre")
class ConvolutionNotCausal(InLayer):
    """Padded on both sides, as convolutions of images are."""

    def conv_pre(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not self.here:
            return super().conv_pre(x, weight, bias)
        return functional.conv1d(x.mT, weight, bias, padding="same", groups=x.shape[-1]).mT


@planted("convolution kernel reversed", "mamba3_mimo", "layers.1.mamba3.mixer.conv1d.pre")
class ConvolutionKernelReversed(InLayer):
    def conv_pre(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return super().conv_pre(x, weight.flip(-1) if self.here else weight, bias)


@planted("time step without its bias", "mamba1", "layers.1.mamba.dt")
class TimeStepWithoutItsBias(InLayer):
    def time_step(self, raw: Tensor, bias: Tensor) -> Tensor:
        return super().time_step(raw, 0 * bias if self.here else bias)


@planted("time step clamped (oxidizr's)", "mamba2", "layers.1.mamba2.mixer.dt")
class TimeStepClamped(InLayer):
    def time_step(self, raw: Tensor, bias: Tensor) -> Tensor:
        dt = super().time_step(raw, bias)
        return dt.clamp(0.001, 0.1) if self.here else dt


@planted("A of the wrong sign (oxidizr's)", "hybrid_mamba1", "layers.2.mamba.A")
class DecayRateOfTheWrongSign(InLayer):
    faulty_layer = 2

    def decay_rate(self, A_log: Tensor) -> Tensor:
        return torch.exp(-A_log) if self.here else super().decay_rate(A_log)


@planted("A frozen (oxidizr's)", "mamba2", "layers.1.mamba2.mixer.A_log.grad")
class DecayRateFrozen(InLayer):
    """The forward pass reads a copy of A_log."""

    def decay_rate(self, A_log: Tensor) -> Tensor:
        if not self.here:
            return super().decay_rate(A_log)
        return super().decay_rate(A_log.detach()).requires_grad_()


@planted("D skip missing", "mamba1", "layers.1.mamba.y")
class SkipMissing(InLayer):
    def skip(self, y: Tensor, x: Tensor, D: Tensor) -> Tensor:
        return y if self.here else super().skip(y, x, D)


@planted("gate without silu", "hybrid", "layers.2.mamba2.mixer.gated")
class GateWithoutSilu(InLayer):
    faulty_layer = 2

    def gate(self, y: Tensor, z: Tensor) -> Tensor:
        return y * z if self.here else super().gate(y, z)


@planted("groups dealt out in turn", "mamba2_groups", "layers.1.mamba2.mixer.state")
class GroupsDealtOutInTurn(InLayer):
    """Head i reads group ``i % G``."""

    def heads_of_groups(self, v: Tensor) -> Tensor:
        heads = self.config.mamba2_num_heads // v.shape[-2]
        return torch.cat([v] * heads, dim=-2) if self.here else super().heads_of_groups(v)


# --- Mamba1 and Mamba2 ------------------------------------------------------------------------------------------------


@planted("B held over the step", "mamba1", "layers.1.mamba.state")
class InputHeldOverTheStep(InLayer):
    """Zero-order hold of B too, ``(exp(dt A) - 1) / A · B``: the paper's equation 4, which its code simplifies to dt B."""

    def mamba1_state(self, t: int, h: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> Tensor:
        if not self.here:
            return super().mamba1_state(t, h, x, dt, A, B)
        step = dt[:, t, :, None] * A
        return torch.exp(step) * h + torch.expm1(step) / A * torch.einsum("be,bn->ben", x[:, t], B[:, t])


@planted("decay of the token before", "mamba2", "layers.1.mamba2.mixer.state")
class DecayOfTheTokenBefore(InLayer):
    def mamba2_state(self, t: int, h: Tensor, decay: Tensor, x: Tensor, dt: Tensor, B: Tensor) -> Tensor:
        return super().mamba2_state(t, h, decay.roll(1, dims=1) if self.here else decay, x, dt, B)


@planted("state in bf16", "hybrid", "layers.2.mamba2.mixer.state")
class StateInBf16(InLayer):
    faulty_layer = 2

    def mamba2_state(self, t: int, h: Tensor, decay: Tensor, x: Tensor, dt: Tensor, B: Tensor) -> Tensor:
        state = super().mamba2_state(t, h, decay, x, dt, B)
        return state.to(torch.bfloat16).to(state.dtype) if self.here else state


@planted("B at the query's place (oxidizr's)", "mamba2", "layers.1.mamba2.mixer.y")
class InputMatrixAtTheQuery(InLayer):
    """``y_t = Σ_{s≤t} decay (C_t·B_t) dt_s x_s``."""

    def mamba2_scan(self, at: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        if not self.here:
            return super().mamba2_scan(at, x, dt, A, B, C)
        since = (dt * A).cumsum(dim=1)
        past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[:, :, None]
        decay = torch.exp((since[:, :, None] - since[:, None]).masked_fill(~past, -math.inf))  # [B,T,S,H]
        return torch.einsum("bth,btsh,bsh,bshp->bthp", (C * B).sum(dim=-1), decay, dt, x)


class ChunkedMamba2(InLayer):
    """Right, chunk by chunk (Dao & Gu 2024, section 6): the states inside a chunk have no names."""

    def mamba2_scan(self, at: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        if not self.here:
            return super().mamba2_scan(at, x, dt, A, B, C)
        T, Q = x.shape[1], self.config.mamba2_chunk_size
        end = (0, 0, 0, 0, 0, -T % Q)
        # [B,chunk,Q,H,…]; time steps of 0 fill up the last chunk.
        x, B, C = (functional.pad(v, end).unflatten(1, (-1, Q)) for v in (x * dt[..., None], B, C))
        since = functional.pad(dt * A, end[2:]).unflatten(1, (-1, Q)).cumsum(dim=2)
        past = torch.ones(Q, Q, dtype=torch.bool).tril()[:, :, None]
        decay = torch.exp((since[:, :, :, None] - since[:, :, None]).masked_fill(~past, -math.inf))
        y = torch.einsum("bcqsh,bcqsh,bcshp->bcqhp", self.inside_a_chunk(C, B), decay, x)
        left = torch.einsum("bcshn,bcsh,bcshp->bchpn", B, torch.exp(since[:, :, -1:] - since), x)
        found = torch.einsum("bhzc,bchpn->bzhpn", self.between_chunks(since[:, :, -1]), left)
        y = y + torch.einsum("bcqhn,bchpn,bcqh->bcqhp", C, found, torch.exp(since))
        return y.flatten(1, 2)[:, :T]

    def inside_a_chunk(self, C: Tensor, B: Tensor) -> Tensor:
        """What token s weighs for token q beside decay and time step, ``[B,chunk,q,s,H]``: ``C_q·B_s``."""
        return torch.einsum("bcqhn,bcshn->bcqsh", C, B)

    def between_chunks(self, a: Tensor) -> Tensor:
        """How much of what chunk c leaves is left when chunk z begins, ``[B,H,z,c]``.

        a: of each chunk the logarithm of its decay, ``[B,c,H]``.
        """
        ends = a.cumsum(dim=1).transpose(1, 2)  # [B,H,c]
        before = ends - a.transpose(1, 2)
        earlier = torch.ones(a.shape[1], a.shape[1], dtype=torch.bool).tril(-1)
        return torch.exp((before[..., :, None] - ends[..., None, :]).masked_fill(~earlier, -math.inf))


@planted("sums of C and B at the query's place (oxidizr's)", "mamba2", "layers.1.mamba2.mixer.y")
class SumsAtTheQuery(ChunkedMamba2):
    """``(Σ_n C_q) (Σ_n B_q)``, whatever token s is."""

    def inside_a_chunk(self, C: Tensor, B: Tensor) -> Tensor:
        return (C.sum(dim=-1) * B.sum(dim=-1)).unsqueeze(3).expand(-1, -1, -1, C.shape[2], -1)


@planted("decay between chunks scrambled (oxidizr's)", "mamba2", "layers.1.mamba2.mixer.y")
class DecayBetweenChunksScrambled(ChunkedMamba2):
    """Reshaped as if heads came last: heads and chunks mix, and later chunks leak into earlier tokens."""

    def between_chunks(self, a: Tensor) -> Tensor:
        decay = super().between_chunks(a)
        batch, H, Z, _ = decay.shape
        return decay.reshape(batch, Z, Z, H).permute(0, 3, 1, 2)


# --- Mamba3 -----------------------------------------------------------------------------------------------------------


@planted("rotation backwards", "mamba3", "layers.1.mamba3.mixer.B_turned")
class RotationBackwards(InLayer):
    def turned(self, v: Tensor, phi: Tensor) -> Tensor:
        return super().turned(v, -phi if self.here else phi)


@planted("angle not summed over time", "hybrid_mamba3", "layers.2.mamba3.mixer.phi")
class AngleNotSummedOverTime(InLayer):
    faulty_layer = 2

    def running_angle(self, dt: Tensor, angle: Tensor) -> Tensor:
        if not self.here:
            return super().running_angle(dt, angle)
        return torch.remainder(dt.unsqueeze(-1) * math.pi * torch.tanh(angle).unsqueeze(2), 2 * math.pi)


@planted("λ and 1 - λ exchanged", "mamba3", "layers.1.mamba3.mixer.diagonal")
class TrapezoidExchanged(InLayer):
    def diagonal(self, trap: Tensor, dt: Tensor) -> Tensor:
        return super().diagonal(1 - trap if self.here else trap, dt)

    def late(self, trap: Tensor, dt: Tensor) -> Tensor:
        return super().late(1 - trap if self.here else trap, dt)


@planted("β of the token itself", "mamba3_mimo", "layers.1.mamba3.mixer.inflow")
class LateWeightOfTheTokenItself(InLayer):
    """``(1-λ_t) dt_t`` where that of t + 1 belongs."""

    def late(self, trap: Tensor, dt: Tensor) -> Tensor:
        return (1 - trap) * dt if self.here else super().late(trap, dt)


@planted("β without its decay", "mamba3", "layers.1.mamba3.mixer.state")
class LateTermWithoutDecay(InLayer):
    """``h_t = α_t h_{t-1} + (1-λ_t) dt_t x_{t-1} B̄_{t-1}ᵀ + γ_t x_t B̄_tᵀ``."""

    def mamba3_state(self, t: int, h: Tensor, entering: Tensor, decay: Tensor, inflow: Tensor, diagonal: Tensor) -> Tensor:
        state = super().mamba3_state(t, h, entering, decay, inflow, diagonal)
        if self.here and t:
            state = state + (1 - decay[:, t]) * (inflow - diagonal)[:, t - 1] * entering[:, t - 1]
        return state


@planted("β pairs B with the x before (oxidizr's)", "hybrid_mamba3", "layers.2.mamba3.mixer.state")
class LateTermOfTwoTokens(InLayer):
    """``h_t = α_t h_{t-1} + β_t x_{t-1} B̄_tᵀ + γ_t x_t B̄_tᵀ``."""

    faulty_layer = 2

    def mamba3_scan(
        self, at: str, x: Tensor, decay: Tensor, inflow: Tensor, diagonal: Tensor, B: Tensor, C: Tensor
    ) -> Tensor:
        if not self.here:
            return super().mamba3_scan(at, x, decay, inflow, diagonal, B, C)
        beta = decay * functional.pad((inflow - diagonal)[:, :-1], (0, 0, 1, 0))  # of the first token 0
        both = beta[:, :, None, :, None] * x.roll(1, dims=1) + diagonal[:, :, None, :, None] * x
        return super().mamba3_scan(at, both, decay, torch.ones_like(beta), torch.ones_like(beta), B, C)


@planted("ranks averaged", "mamba3_mimo", "layers.1.mamba3.mixer.summed")
class RanksAveraged(InLayer):
    def sum_of_ranks(self, gated: Tensor, mimo_o: Tensor) -> Tensor:
        y = super().sum_of_ranks(gated, mimo_o)
        return y / gated.shape[2] if self.here else y


# --- the loss, and what is outside all layers -------------------------------------------------------------------------


@planted("loss a sequence", "llama", "cross_entropy")
class LossASequence(Twin):
    """Divided by the number of sequences, not of tokens."""

    def mean_loss(self, token_losses: Tensor) -> Tensor:
        return token_losses.sum() / len(token_losses)


@planted("tied embedding trained from one side", "llama", "embed_tokens.weight.grad", tie_word_embeddings=True)
class TiedEmbeddingTrainedFromOneSide(Twin):
    def output_weight(self) -> Tensor:
        return super().output_weight().detach()


@planted("embedding gradient of the last place only", "llama", "embed_tokens.weight.grad")
class EmbeddingGradientOfTheLastPlaceOnly(Twin):
    """Scattered without adding: of a token that comes several times one place wins."""

    def embedding(self, weight: Tensor, tokens: Tensor) -> Tensor:
        flat = tokens.flatten()
        last = torch.tensor([i for i, token in enumerate(flat.tolist()) if token not in flat[i + 1 :].tolist()])
        wins = torch.zeros(len(flat), dtype=torch.bool).index_fill(0, last, True).reshape(tokens.shape)
        rows = super().embedding(weight, tokens)
        return torch.where(wins.unsqueeze(-1), rows, rows.detach())


# --- training ---------------------------------------------------------------------------------------------------------


@planted("gradients not reset", "llama", "step.2.embed_tokens.weight.grad")
class GradientsNotReset(Twin):
    def before_step(self) -> None:
        if all(p.grad is None for p in self.parameters_by_name.values()):
            super().before_step()


@planted("clipped a step late (oxidizr's)", "llama", "clip_factor")
class ClippedAStepLate(Twin):
    """By the norm of the step before; the first step not at all."""

    def __init__(self, model_config: ModelConfig, weights: Mapping[str, np.ndarray[Any, Any]], dtype: torch.dtype) -> None:
        super().__init__(model_config, weights, dtype)
        self.norm_before = torch.zeros((), dtype=dtype)

    def clip_factor(self, norm: Tensor, max_norm: float) -> Tensor:
        before, self.norm_before = self.norm_before, norm
        return super().clip_factor(before, max_norm)


@planted("every gradient clipped by itself", "hybrid", "embed_tokens.weight.grad.clipped")
class EveryGradientClippedByItself(Twin):
    def clip(self, factor: Tensor) -> None:  # noqa: ARG002
        for p in self.parameters_by_name.values():
            assert p.grad is not None
            p.grad.mul_(self.clip_factor(p.grad.norm(), TRAINER["max_grad_norm"]))


@planted("weight decay on norms", "mla", "layers.0.input_layernorm.weight.after")
class WeightDecayOnNorms(Twin):
    def decay_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return [{**group, "weight_decay": weight_decay} for group in super().decay_groups(weight_decay)]


@planted("weight decay through the moments", "llama", "optimizer.exp_avg.embed_tokens.weight")
class WeightDecayThroughTheMoments(Twin):
    """Adam with an L2 penalty, not AdamW."""

    def optimizer(self, trainer_config: TrainerConfig) -> torch.optim.Optimizer:
        t = trainer_config
        return torch.optim.Adam(self.decay_groups(t.weight_decay), lr=t.learning_rate, betas=t.betas, eps=t.eps)


@planted("moments without bias correction", "llama", "embed_tokens.weight.after")
class MomentsWithoutBiasCorrection(Twin):
    """As after so many steps that the correction is 1."""

    def optimizer(self, trainer_config: TrainerConfig) -> torch.optim.Optimizer:
        optimizer = super().optimizer(trainer_config)
        for p in self.parameters_by_name.values():
            optimizer.state[p] = {
                "step": torch.tensor(1e6),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        return optimizer
