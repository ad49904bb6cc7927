"""The keys of a config: types, ranges, defaults, and the constraints between them.

The keys are those of oxidizr's documentation (docs/configuration.md there) and ours; where its documentation gives no
default, ours is the value its examples use. `config.py` puts the sections together and reads them from files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from oxidizr_ref.pictured import Pictured

_DTYPES = {
    **dict.fromkeys(("fp32", "float32"), "f32"),
    **dict.fromkeys(("fp16", "float16"), "f16"),
    "bfloat16": "bf16",
    **dict.fromkeys(("fp64", "float64"), "f64"),
}
_LARGEST = 2**31 - 1  # no size is near it; it keeps a typing error from becoming an allocation


def _one_dtype_name(value: Any) -> Any:
    return _DTYPES.get(value.lower(), value.lower()) if isinstance(value, str) else value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _without_nulls(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None}


def _in_order(layers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(layers))  # the same model, however they are listed: the same digest


def _as_pair(value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) != 2:
        raise ValueError(f"expected a list of two numbers, found one of {len(value)}")
    return _as_tuple(value)


def _as_paths(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _as_tuple(value)


def _usable_paths(paths: tuple[str, ...]) -> tuple[str, ...]:
    if "random" in paths and len(paths) > 1:
        raise ValueError("`random` cannot be mixed with files")
    if "" in paths:
        raise ValueError("a path is empty")
    return paths


def _half_or_whole(value: float) -> float:
    if value not in (0.5, 1.0):
        raise ValueError(f"expected 0.5 or 1, found {value}")
    return value


Size = Annotated[int, Field(ge=1, le=_LARGEST)]
Count = Annotated[int, Field(ge=0, le=_LARGEST)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


class Section(Pictured, BaseModel):
    """Strict types (no text for numbers, no floats for integers), no unknown keys, null means absent, immutable."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_means_absent(cls, data: Any) -> Any:
        return _without_nulls(data) if isinstance(data, dict) else data


class ModelConfig(Section):
    """The shape of the model. Sizes are numbers of elements; 0 switches an optional part off.

    Keys of a layer type that no layer uses are accepted and ignored, as in oxidizr's example files.
    """

    name: Text = "model"
    hidden_size: Size
    num_layers: Annotated[int, Field(ge=1, le=10_000)]
    num_heads: Size  # may be absent when every layer is a Mamba layer
    kv_heads: Size = 0  # filled: num_heads
    intermediate_size: Size = 0  # filled: 4 * hidden_size; of each expert, with MoE
    vocab_size: Size
    max_seq_len: Size  # tokens
    rope_theta: Positive = 10000.0
    rms_norm_eps: Positive = 1e-5
    tie_word_embeddings: bool = False
    dtype: Annotated[Literal["f32", "f16", "bf16", "f64"], BeforeValidator(_one_dtype_name)] = "f32"

    # Multi-head latent attention, in place of GQA: kv_latent_dim and d_rope select it.
    kv_latent_dim: Count = 0
    q_latent_dim: Count = 0  # 0: queries are read from the hidden state, without a latent
    d_rope: Count = 0
    mla_latent_norm: bool = False  # DeepSeek normalizes the latents, oxidizr does not
    mla_q_rope_from: Literal["hidden", "latent"] = "hidden"  # the rotated part of queries; DeepSeek reads its latent
    # Mixture of experts, in place of SwiGLU.
    num_experts: Count = 0
    experts_per_tok: Size = 2
    norm_topk_prob: bool = True  # filled: whether experts_per_tok > 1; weights of a token's experts sum to 1
    shared_expert_enabled: bool = False
    # Mamba, in place of attention and feed-forward, in these layers (counted from 0).
    mamba_layers: Annotated[tuple[Count, ...], BeforeValidator(_as_tuple), AfterValidator(_in_order)] = ()
    mamba_d_state: Size = 16
    mamba_d_conv: Size = 4
    mamba_expand: Size = 2
    mamba2_num_heads: Count = 0  # above 0: Mamba layers are Mamba2 (or Mamba3), not Mamba1
    mamba2_head_dim: Count = 0  # filled: hidden_size * mamba2_expand / mamba2_num_heads
    mamba2_state_size: Size = 64
    mamba2_chunk_size: Size = 64  # tokens
    mamba2_n_groups: Size = 1
    mamba2_conv_kernel: Size = 4
    mamba2_expand: Size = 2
    mamba3_enabled: bool = False
    mamba3_complex_rope: bool = True
    mamba3_mimo_rank: Count = 0  # 0: SISO
    mamba3_use_conv: bool = False
    mamba3_rope_fraction: Annotated[float, AfterValidator(_half_or_whole)] = 0.5

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        return _filled(_without_nulls(data)) if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _constrain(self) -> ModelConfig:
        violations = list(_violations(self))
        if violations:
            raise BrokenConstraintsError(violations)
        return self

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def uses_mla(self) -> bool:
        """Whether attention layers are MLA (DeepSeek-V2) rather than GQA."""
        return self.kv_latent_dim > 0

    @property
    def uses_moe(self) -> bool:
        """Whether feed-forwards are mixtures of experts rather than one SwiGLU."""
        return self.num_experts > 0

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """What each layer is: ``attention``, ``mamba1``, ``mamba2`` or ``mamba3``, by oxidizr's rule."""
        mamba = "mamba3" if self.mamba3_enabled else "mamba2" if self.mamba2_num_heads else "mamba1"
        chosen = set(self.mamba_layers)
        return tuple(mamba if layer in chosen else "attention" for layer in range(self.num_layers))


class TrainerConfig(Section):
    """How the model is trained, and what is saved and logged.

    A checkpoint stores these keys with their defaults filled, and a default that is added later also stands for what
    older files did: so no default here may ever change.
    """

    learning_rate: Positive
    batch_size: Size  # windows in a micro-batch
    gradient_accumulation: Size = 1  # micro-batches in a step
    max_steps: Count = 0  # optimizer steps; 0: as many as num_epochs gives
    num_epochs: Size = 1
    lr_schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup_steps: Count = 0
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    weight_decay: NonNegative = 0.01
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(_as_pair)] = (0.9, 0.999)
    eps: Positive = 1e-8
    optimizer_dtype: Annotated[Literal["f32", "bf16"], BeforeValidator(_one_dtype_name)] = "f32"  # of AdamW's moments
    max_grad_norm: NonNegative = 1.0  # 0: no clipping
    load_balance_alpha: NonNegative = 0.0
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)] = 0
    shuffle: bool = True
    eval_fraction: Fraction = 0.0  # the last part of the data, held out
    eval_interval: Count = 0  # steps; 0: only at the end
    log_interval: Size = 10  # steps
    save_interval: Size = 500  # steps
    max_checkpoints: Count = 10  # 0: keep all
    keep_every: Count = 0  # steps; files of their multiples stay for ever; 0: none
    keep_best: Count = 0  # so many files with the lowest held-out losses stay as well
    async_save: bool = False  # write checkpoints while training goes on
    checkpoint_dir: Text = "./checkpoints"
    target_device: Literal["gpu", "cpu"] = "gpu"  # gpu is a preference here: it falls back
    group_size: Size = 4  # GRPO, accepted and unused, as is beta_kl
    beta_kl: NonNegative = 0.04

    @model_validator(mode="after")
    def _constrain(self) -> TrainerConfig:
        if self.keep_best and not (
            self.eval_fraction and self.eval_interval and self.save_interval % self.eval_interval == 0
        ):
            needs = "needs an eval_fraction, and an eval_interval that divides save_interval, so that each file has a loss"
            raise BrokenConstraintsError(
                [Violation(("keep_best",), f"keeping the files with the best held-out losses {needs}")]
            )
        return self


class DataConfig(Section):
    """What the model is trained on."""

    path: Annotated[tuple[Text, ...], BeforeValidator(_as_paths), AfterValidator(_usable_paths)] = ()
    tokenizer: Text = "byte"
    loss_on: Literal["all", "responses"] = "all"  # the tokens that are learned, where data have prompts
    document_boundaries: Literal["ignore", "reset"] = "ignore"  # reset: no layer sees past the start of a document

    @property
    def is_random(self) -> bool:
        """Whether the data are random tokens rather than files."""
        return self.path == ("random",)


# ---- constraints between the model's keys ------------------------------------------------------------------------


class Violation(NamedTuple):
    """A broken constraint: all keys it reads (it is reported at the first), and what is wrong."""

    keys: tuple[str, ...]
    message: str


class BrokenConstraintsError(ValueError):
    """The broken constraints, on their way through pydantic, which lets a validator raise only one error."""

    def __init__(self, violations: list[Violation]) -> None:
        super().__init__("; ".join(violation.message for violation in violations))
        self.violations = violations


def violations_among(data: Mapping[str, Any], bad: set[str]) -> list[Violation]:
    """The constraints that model keys break which are valid by themselves; ``bad`` names the missing and invalid ones.

    So a file with a misspelt key *and* heads that do not divide is told both at once.
    """
    good = {key: value for key, value in _without_nulls(data).items() if key not in bad}
    required = [key for key, info in ModelConfig.model_fields.items() if info.is_required()]
    partial = ModelConfig.model_construct(**_filled({**dict.fromkeys(required, 1), **good}))
    return [violation for violation in _violations(partial) if not bad.intersection(violation.keys)]


def _filled(data: dict[str, Any]) -> dict[str, Any]:
    """The data with the defaults that depend on other keys, wherever those have usable values."""
    size = {k: v for k, v in data.items() if type(v) is int and v > 0}
    layers = data.get("mamba_layers")
    if isinstance(layers, list | tuple) and "num_layers" in size and len(layers) == size["num_layers"]:
        data = {"num_heads": 1, **data}  # pure Mamba: oxidizr's guide leaves num_heads out of its example
        size.setdefault("num_heads", 1)
    filled: dict[str, Any] = {"norm_topk_prob": size.get("experts_per_tok", 2) > 1}
    if "num_heads" in size:
        filled["kv_heads"] = size["num_heads"]
    if "hidden_size" in size:
        filled["intermediate_size"] = 4 * size["hidden_size"]
        if "mamba2_num_heads" in size:
            inner = size["hidden_size"] * size.get("mamba2_expand", 2)
            filled["mamba2_head_dim"] = inner // size["mamba2_num_heads"]
    return {**filled, **data}


def _violations(m: ModelConfig) -> Iterator[Violation]:
    layers = ("mamba_layers", "num_layers")
    outside = [layer for layer in m.mamba_layers if layer >= m.num_layers]
    if outside:
        expected = f"expected layers 0 to {m.num_layers - 1} (num_layers is {m.num_layers})"
        yield Violation(layers, f"{expected}, found {outside[0]}")
    if len(set(m.mamba_layers)) < len(m.mamba_layers):
        twice = next(layer for i, layer in enumerate(m.mamba_layers) if layer in m.mamba_layers[:i])
        yield Violation(layers, f"layer {twice} is listed twice")
    kinds = set(m.layer_kinds)
    if "attention" in kinds:
        yield from _attention_violations(m, layers)
    if kinds & {"mamba2", "mamba3"}:
        yield from _mamba2_violations(m, (*layers, "mamba3_enabled"))


def _attention_violations(m: ModelConfig, layers: tuple[str, ...]) -> Iterator[Violation]:
    mla, needed = ("kv_latent_dim", "q_latent_dim", "d_rope"), ("kv_latent_dim", "d_rope")
    present = tuple(key for key in mla if getattr(m, key))
    if m.hidden_size % m.num_heads:
        what = f"hidden_size {m.hidden_size} is not divisible by num_heads {m.num_heads}"
        yield Violation(("num_heads", "hidden_size", *layers), what)
    elif not present and m.head_dim % 2:
        what = f"hidden_size / num_heads = {m.head_dim} is odd; RoPE rotates pairs, so it must be even"
        yield Violation(("num_heads", "hidden_size", *mla, *layers), what)
    if not present and m.num_heads % m.kv_heads:
        what = f"num_heads {m.num_heads} is not divisible by kv_heads {m.kv_heads}"
        yield Violation(("kv_heads", "num_heads", *mla, *layers), what)
    if present and not set(needed) <= set(present):
        absent = ", ".join(key for key in needed if key not in present)
        what = f"MLA needs kv_latent_dim and d_rope together; missing: {absent}"
        yield Violation((*present, *mla, *layers), what)
    elif present and m.mla_q_rope_from == "latent" and not m.q_latent_dim:
        what = "expected hidden: without q_latent_dim there is no latent of queries"
        yield Violation(("mla_q_rope_from", *mla, *layers), what)
    if m.d_rope % 2:
        yield Violation(("d_rope", *layers), f"RoPE rotates pairs, so it must be even; found {m.d_rope}")
    if m.uses_moe and m.experts_per_tok > m.num_experts:
        what = f"expected at most num_experts = {m.num_experts}, found {m.experts_per_tok}"
        yield Violation(("experts_per_tok", "num_experts", *layers), what)


def _mamba2_violations(m: ModelConfig, layers: tuple[str, ...]) -> Iterator[Violation]:
    heads = m.mamba2_num_heads
    if not heads:
        yield Violation(("mamba3_enabled", "mamba2_num_heads", *layers), "Mamba3 needs mamba2_num_heads; it is absent")
        return
    inner, product = m.hidden_size * m.mamba2_expand, heads * m.mamba2_head_dim
    if inner != product:
        what = (
            f"hidden_size * mamba2_expand = {m.hidden_size} * {m.mamba2_expand} = {inner} must equal "
            f"mamba2_num_heads * mamba2_head_dim = {heads} * {m.mamba2_head_dim} = {product}"
        )
        yield Violation(("mamba2_num_heads", "mamba2_head_dim", "hidden_size", "mamba2_expand", *layers), what)
    if heads % m.mamba2_n_groups:
        what = f"mamba2_num_heads {heads} is not divisible by mamba2_n_groups {m.mamba2_n_groups}"
        yield Violation(("mamba2_n_groups", "mamba2_num_heads", *layers), what)
    rotated = m.mamba2_state_size * m.mamba3_rope_fraction
    if m.mamba3_enabled and m.mamba3_complex_rope and rotated % 2:
        what = f"mamba2_state_size * mamba3_rope_fraction = {rotated:g} states are rotated in pairs: it must be even"
        keys = ("mamba2_state_size", "mamba3_rope_fraction", "mamba3_complex_rope", *layers)
        yield Violation(keys, what)
