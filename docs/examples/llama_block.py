"""A Llama in PyTorch, written as one writes it, whose training steps go to a trace, to be compared with a reference.

    oxidizr-ref trace record -f tiny-llama --dtype f64 --set gradient_accumulation=1 -o reference.safetensors
    python docs/examples/llama_block.py reference.safetensors theirs.safetensors
    oxidizr-ref trace compare reference.safetensors theirs.safetensors

Sizes, weights, batches and learning rates come from the reference. Results of modules are recorded by hooks; what has a name
inside a module is noted there. ``--broken`` turns the wrong pairs of channels by RoPE, which the comparison should tell.

Shapes: B batch, T time, D hidden, H query heads, K key/value heads, P head width, V vocabulary.
"""

from __future__ import annotations

import argparse
import json

import torch
from torch import Tensor, nn
from torch.nn import functional

from oxidizr_ref.optim import decays
from oxidizr_ref.trace import TorchRecorder, Trace


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


def rope(x: Tensor, theta: float, broken: bool) -> Tensor:
    """x [B,T,heads,P] turned by its positions: channel i and channel i + P/2 are a pair."""
    T, P = x.shape[1], x.shape[3]
    angles = torch.outer(torch.arange(T).double(), theta ** (-torch.arange(0, P, 2).double() / P))[:, None]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    if broken:  # the mistake: channels 2i and 2i + 1 are a pair, as in the paper and in GPT-J
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, sizes: dict, name: str, recorder: TorchRecorder, broken: bool) -> None:
        super().__init__()
        self.H, self.K, D = sizes["num_heads"], sizes["kv_heads"], sizes["hidden_size"]
        self.P, self.theta, self.broken = D // self.H, sizes["rope_theta"], broken
        self.q_proj = nn.Linear(D, self.H * self.P, bias=False)
        self.k_proj = nn.Linear(D, self.K * self.P, bias=False)
        self.v_proj = nn.Linear(D, self.K * self.P, bias=False)
        self.o_proj = nn.Linear(self.H * self.P, D, bias=False)
        self.note = lambda what, x: recorder.note(f"{name}.{what}", x)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = self.note("q", rope(self.q_proj(x).view(B, T, self.H, self.P), self.theta, self.broken))
        k = self.note("k", rope(self.k_proj(x).view(B, T, self.K, self.P), self.theta, self.broken))
        v = self.v_proj(x).view(B, T, self.K, self.P)
        k, v = (x.repeat_interleave(self.H // self.K, dim=2) for x in (k, v))
        scores = self.note("scores", torch.einsum("bthp,bshp->bhts", q, k) * self.P**-0.5)
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        masked = self.note("masked_scores", scores.masked_fill(future, -torch.inf))
        probs = self.note("probs", masked.softmax(-1))
        context = self.note("context", torch.einsum("bhts,bshp->bthp", probs, v))
        return self.o_proj(context.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, sizes: dict, name: str, recorder: TorchRecorder) -> None:
        super().__init__()
        D, wide = sizes["hidden_size"], sizes["intermediate_size"]
        self.gate_proj, self.up_proj = (nn.Linear(D, wide, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(wide, D, bias=False)
        self.note = lambda what, x: recorder.note(f"{name}.{what}", x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.note("activation", functional.silu(self.gate_proj(x)) * self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, sizes: dict, name: str, recorder: TorchRecorder, broken: bool) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (
            RMSNorm(sizes["hidden_size"], sizes["rms_norm_eps"]) for _ in range(2)
        )
        self.self_attn = Attention(sizes, f"{name}.self_attn", recorder, broken)
        self.mlp = MLP(sizes, f"{name}.mlp", recorder)
        self.note = lambda what, x: recorder.note(f"{name}.{what}", x)

    def forward(self, h: Tensor) -> Tensor:
        h = self.note("after_attention", h + self.self_attn(self.input_layernorm(h)))
        return h + self.mlp(self.post_attention_layernorm(h))  # "output": the hook on this module records it


class Llama(nn.Module):
    def __init__(self, sizes: dict, recorder: TorchRecorder, broken: bool) -> None:
        super().__init__()
        D, V = sizes["hidden_size"], sizes["vocab_size"]
        self.embed_tokens = nn.Embedding(V, D)
        self.layers = nn.ModuleList(Layer(sizes, f"layers.{i}", recorder, broken) for i in range(sizes["num_layers"]))
        self.norm = RMSNorm(D, sizes["rms_norm_eps"])
        self.lm_head = nn.Linear(D, V, bias=False)
        self.note = recorder.note

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss: mean cross-entropy. tokens, targets [B,T]."""
        h = self.embed_tokens(tokens)
        for layer in self.layers:
            h = layer(h)
        logits = self.note("logits", self.lm_head(self.norm(h)))
        losses = self.note("token_losses", functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))
        return self.note("loss", self.note("cross_entropy", losses.mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", help="a trace of a Llama, without gradient accumulation")
    parser.add_argument("output", help="the trace to write")
    parser.add_argument("--dtype", choices=("f32", "f64"), help="what to compute in; default: as the reference")
    parser.add_argument("--broken", action="store_true", help="plant a mistake")
    options = parser.parse_args()

    reference = Trace(options.reference)
    config = json.loads(reference.metadata["config"])
    sizes, training = config["model"], config["trainer"]
    precision = options.dtype or reference.precision
    weights = {name: reference.array(name) for name, record in reference.records.items() if record.role == "parameter"}

    torch.set_default_dtype({"f32": torch.float32, "f64": torch.float64}[precision])
    with TorchRecorder(options.output, precision) as recorder:
        model = Llama(sizes, recorder, options.broken)
        model.load_state_dict({name: torch.tensor(array) for name, array in weights.items()})
        kinds: dict[bool, list[Tensor]] = {True: [], False: []}  # whether they decay
        for name, parameter in model.named_parameters():
            kinds[decays(name)].append(parameter)
        groups = [
            {"params": kinds[True], "weight_decay": training["weight_decay"]},
            {"params": kinds[False], "weight_decay": 0},
        ]
        optimizer = torch.optim.AdamW(groups, betas=training["betas"], eps=training["eps"])

        recorder.watch(model)
        recorder.parameters(model.named_parameters())
        for step in range(1, int(reference.metadata["steps"]) + 1):
            prefix = f"step.{step}." if step > 1 else ""
            tokens, targets = (torch.tensor(reference.array(prefix + name)).long() for name in ("tokens", "targets"))
            recorder.inputs(tokens, targets)
            loss = model(tokens, targets)
            optimizer.zero_grad()
            loss.backward()
            recorder.gradients(model.named_parameters())
            norm = nn.utils.clip_grad_norm_(model.parameters(), training["max_grad_norm"])
            recorder.clipped(model.named_parameters(), norm)
            for group in optimizer.param_groups:
                group["lr"] = float(reference.array(f"{prefix}learning_rate"))
            optimizer.step()
            recorder.updated(model.named_parameters(), optimizer)
            recorder.next_step()


if __name__ == "__main__":
    main()
