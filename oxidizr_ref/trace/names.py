"""The names in a trace: how they are put together, and what each of them means.

A name is ``[step.N.][micro.M.]PATH[.grad|.grad.clipped|.after]``, or ``[step.N.]optimizer.SLOT.PARAMETER``. PATH is a
parameter's name, or a module's followed by the name its code gives the value (`watch.named`). What has no ``step.`` belongs
to the first step, what has no ``micro.`` to its first (usually only) micro-batch. docs/trace_format.md shows the tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable
from typing import NamedTuple

_PREFIX = re.compile(r"(?:step\.([1-9][0-9]{0,9})\.)?(?:micro\.([1-9][0-9]{0,9})\.)?(.*)", re.DOTALL)
_LAYER = re.compile(r"(?:optimizer\.[a-z_]+\.)?layers\.([0-9]{1,9})\.")
_ENDS = (".grad.clipped", ".grad", ".after")


class Name(NamedTuple):
    """A name, taken apart. ``path`` has no prefix and no end; ``end`` is "", or one of ``.grad``, ….

    A slot's path is its parameter's, and its end ``optimizer.SLOT``.
    """

    step: int
    micro: int
    path: str
    end: str

    def __str__(self) -> str:
        prefix = (f"step.{self.step}." if self.step > 1 else "") + (f"micro.{self.micro}." if self.micro > 1 else "")
        return f"{prefix}{self.end}.{self.path}" if self.end.startswith("optimizer.") else f"{prefix}{self.path}{self.end}"


def parse(name: str) -> Name:
    """The parts of a name; ``step.1.`` and ``micro.1.`` may be written out."""
    match = _PREFIX.fullmatch(name)
    assert match is not None  # whatever is no prefix is the rest
    step, micro, rest = int(match[1] or 1), int(match[2] or 1), match[3]
    if rest.startswith("optimizer.") and rest.count(".") >= 2:
        _, slot, path = rest.split(".", 2)
        return Name(step, micro, path, f"optimizer.{slot}")
    end = next((end for end in _ENDS if rest.endswith(end)), "")
    return Name(step, micro, rest.removesuffix(end), end)


def layer_of(name: str) -> int | None:
    """The layer a name belongs to; None for what is before, behind or above all layers."""
    match = _LAYER.match(_PREFIX.fullmatch(name)[3])  # type: ignore[index]
    return int(match[1]) if match else None


def nearest(names: Iterable[str], present: Container[str], inputs_of: Callable[[str], Iterable[str]]) -> tuple[str, ...]:
    """These names, each that is not present replaced by what it was computed from, and that likewise."""
    found: dict[str, None] = {}
    stack, seen = list(names)[::-1], set[str]()
    while stack:
        name = stack.pop()
        if name in present:
            found[name] = None
        elif name not in seen:
            seen.add(name)
            stack.extend(reversed(list(inputs_of(name))))
    return tuple(found)


class Meaning(NamedTuple):
    """What a name stands for: the op that computes it, its equation, its shape in letters (docs/trace_format.md)."""

    op: str
    equation: str
    shape: str


_LINEAR = "x Wᵀ"
#: The op of a router that chooses experts: its result is integers, which rounding can change altogether.
TOP_K = "top k"

#: Ends of paths, the longest that fits wins. Keys are in the order of a model, so that tables made of them read that way.
MEANINGS: dict[str, Meaning] = {
    "tokens": Meaning("input", "the tokens of a micro-batch", "[B,T]"),
    "targets": Meaning("input", "the token that follows each", "[B,T]"),
    "embed_tokens.output": Meaning("embedding", "rows of embed_tokens.weight", "[B,T,D]"),
    "rms": Meaning("rms_norm", "sqrt(mean(x²) + eps), of every group of channels", "[B,T,g,1]"),
    "B_norm.rms": Meaning("rms_norm", "sqrt(mean(B²) + eps)", "[B,T,R,G,1,1]"),
    "C_norm.rms": Meaning("rms_norm", "sqrt(mean(C²) + eps)", "[B,T,R,G,1,1]"),
    "input_layernorm.output": Meaning("rms_norm", "x / rms · weight", "[B,T,D]"),
    "post_attention_layernorm.output": Meaning("rms_norm", "x / rms · weight", "[B,T,D]"),
    "norm.output": Meaning("rms_norm", "x / rms · weight", "[B,T,D]"),
    "kv_norm.output": Meaning("rms_norm", "c_kv / rms · weight", "[B,T,L]"),
    "q_norm.output": Meaning("rms_norm", "c_q / rms · weight", "[B,T,L]"),
    "mixer.norm.output": Meaning("rms_norm", "gated / rms · weight, by group", "[B,T,E]"),
    "B_norm.output": Meaning("rms_norm", "B / rms · weight", "[B,T,R,G,N]"),
    "C_norm.output": Meaning("rms_norm", "C / rms · weight", "[B,T,R,G,N]"),
    "q_proj.output": Meaning("linear", _LINEAR, "[B,T,H·P]"),
    "k_proj.output": Meaning("linear", _LINEAR, "[B,T,K·P]"),
    "v_proj.output": Meaning("linear", _LINEAR, "[B,T,K·P]"),
    "w_dkv.output": Meaning("linear", "the latent c_kv = x Wᵀ", "[B,T,L]"),
    "w_dq.output": Meaning("linear", "the latent c_q = x Wᵀ", "[B,T,L]"),
    "w_uq.output": Meaning("linear", "queries, c_q Wᵀ", "[B,T,H·P]"),
    "w_uk.output": Meaning("linear", "keys, c_kv Wᵀ", "[B,T,H·P]"),
    "w_uv.output": Meaning("linear", "values, c_kv Wᵀ", "[B,T,H·P]"),
    "w_qr.output": Meaning("linear", _LINEAR, "[B,T,H·r]"),
    "w_kr.output": Meaning("linear", _LINEAR, "[B,T,r]"),
    "q": Meaning("rope", "q_proj.output turned by its positions", "[B,T,H,P]"),
    "k": Meaning("rope", "k_proj.output turned by its positions", "[B,T,K,P]"),
    "q_r": Meaning("rope", "w_qr.output turned by its positions", "[B,T,H,r]"),
    "k_r": Meaning("rope", "w_kr.output turned by its positions, for all heads", "[B,T,1,r]"),
    "queries": Meaning("concatenation", "[w_uq.output; q_r]", "[B,T,H,P+r]"),
    "keys": Meaning("concatenation", "[w_uk.output; k_r]", "[B,T,H,P+r]"),
    "scores": Meaning("attention scores", "q·k / sqrt(width of k); with MLA queries·keys", "[B,H,T,S]"),
    "masked_scores": Meaning("causal mask", "scores where s ≤ t, -inf elsewhere", "[B,H,T,S]"),
    "probs": Meaning("softmax", "softmax of masked_scores over s", "[B,H,T,S]"),
    "context": Meaning("attention", "Σ_s probs · v", "[B,T,H,P]"),
    "o_proj.output": Meaning("linear", _LINEAR, "[B,T,D]"),
    "after_attention": Meaning("residual", "h + self_attn.o_proj.output", "[B,T,D]"),
    "gate_proj.output": Meaning("linear", _LINEAR, "[…,I]"),
    "up_proj.output": Meaning("linear", _LINEAR, "[…,I]"),
    "activation": Meaning("silu and product", "silu(gate_proj.output) · up_proj.output", "[…,I]"),
    "down_proj.output": Meaning("linear", _LINEAR, "[…,D]"),
    "router.gate.output": Meaning("router", "the router's logits, x Wᵀ", "[n,E]"),
    "router.probs": Meaning("softmax", "softmax of router.gate.output over all experts", "[n,E]"),
    "router.ids": Meaning(TOP_K, "the k largest logits, the largest first; ties to the lower index", "[n,k]"),
    "router.weights": Meaning("router weights", "softmax over the k logits; with k = 1 router.probs there", "[n,k]"),
    "router.balance": Meaning("balance loss", "E Σ_e f_e P_e", "[]"),
    "input": Meaning("dispatch", "the tokens given to this expert, in order", "[n_e,D]"),
    "moe.output": Meaning("combine", "Σ_k weight · expert's down_proj.output [+ shared_expert's]", "[B,T,D]"),
    "in_proj.output": Meaning(
        "linear", "x Wᵀ; Mamba1 x|z; Mamba2 z|x|B|C|dt; Mamba3 z|x|B|C|dd_dt|dd_A|trap|angle", "[B,T,…]"
    ),
    "conv1d.pre": Meaning("causal convolution", "bias + Σ_k weight_k · x_{t-K+1+k}", "[B,T,…]"),
    "conv1d.output": Meaning("silu", "silu(conv1d.pre)", "[B,T,…]"),
    "x_proj.output": Meaning("linear", "x Wᵀ: dt|B|C", "[B,T,r+2N]"),
    "dt_proj.output": Meaning("linear", "dt of the first r channels of x_proj.output, without bias", "[B,T,E]"),
    "dt": Meaning("softplus", "the time step, softplus(dt + bias)", "[B,T,E]; Mamba2, 3: [B,T,H]"),
    "A": Meaning("decay rate", "-exp(A_log); Mamba3: min(-f(dd_A), -1e-4)", "[E,N]; Mamba2: [H]; Mamba3: [B,T,H]"),
    "trap": Meaning("sigmoid", "λ of the trapezoidal rule", "[B,T,H]"),
    "diagonal": Meaning("trapezoidal rule", "γ_t = λ_t dt_t", "[B,T,H]"),
    "inflow": Meaning("trapezoidal rule", "γ_t + (1 - λ_{t+1}) dt_{t+1}", "[B,T,H]"),
    "phi": Meaning("running angle", "Σ_{s≤t} dt_s π tanh(angle_s), modulo 2π", "[B,T,H,S]"),
    "x": Meaning("ranks of x", "x · mimo_x of every rank", "[B,T,R,H,P]"),
    "B_turned": Meaning("rotation", "Rot(phi) (B_norm.output + B_bias)", "[B,T,R,H,N]"),
    "C_turned": Meaning("rotation", "Rot(phi) (C_norm.output + C_bias)", "[B,T,R,H,N]"),
    "decay": Meaning("decay", "exp(dt A)", "[B,T,H]"),
    "state": Meaning("recurrence", "the state after token t, time first", "[T,B,E,N]; Mamba2, 3: [T,B,H,P,N]"),
    "y": Meaning("scan", "C·state + D x", "[B,T,E]; Mamba2: [B,T,H,P]; Mamba3: [B,T,R,H,P]"),
    "gated": Meaning("gate", "y · silu(z)", "[B,T,E]; Mamba3: [B,T,R,H,P]"),
    "summed": Meaning("sum over ranks", "Σ_r mimo_o · gated", "[B,T,H,P]"),
    "out_proj.output": Meaning("linear", _LINEAR, "[B,T,D]"),
    "output": Meaning("residual", "the layer's result: h + its last part's", "[B,T,D]"),
    "logits": Meaning("linear", "norm.output Wᵀ", "[B,T,V]"),
    "token_losses": Meaning("cross-entropy", "-log softmax(logits) at the target", "[B,T]"),
    "cross_entropy": Meaning("mean", "Σ token_losses / tokens of the step", "[]"),
    "loss": Meaning("loss", "cross_entropy + load_balance_alpha · mean of the balance losses", "[]"),
    "grad_norm": Meaning("global norm", "sqrt of the sum of all squared gradients", "[]"),
    "clip_factor": Meaning("clip", "min(1, max_grad_norm / (grad_norm + 1e-6))", "[]"),
    "learning_rate": Meaning("schedule", "of this step", "[]"),
}
#: The same of what has an end.
END_MEANINGS: dict[str, Meaning] = {
    ".grad": Meaning(
        "backward", "the gradient of the loss; of a parameter, summed over the step's micro-batches", "its own"
    ),
    ".grad.clipped": Meaning("clip", "grad · clip_factor", "its own"),
    "optimizer.exp_avg": Meaning("adamw", "β₁ exp_avg + (1 - β₁) grad.clipped", "its own"),
    "optimizer.exp_avg_sq": Meaning("adamw", "β₂ exp_avg_sq + (1 - β₂) grad.clipped²", "its own"),
    ".after": Meaning("adamw", "the parameter after the step", "its own"),
}
PARAMETER = Meaning("parameter", "as the step begins", "its own")


def meaning(name: str) -> Meaning | None:
    """What a name stands for; None for one that no module gives (a parameter's, or somebody else's)."""
    _, _, path, end = parse(name)
    if end:
        return END_MEANINGS.get(end)
    parts = path.split(".")
    tails = (".".join(parts[i:]) for i in range(len(parts)))
    return next((MEANINGS[tail] for tail in tails if tail in MEANINGS), None)
