"""Mamba 1 and 2 against Hugging Face's `MambaForCausalLM` and `Mamba2ForCausalLM`, and Mamba 2 against its plain recurrence.

Hugging Face is run on its paths of plain PyTorch, without kernels: a loop over tokens for Mamba 1, chunks for Mamba 2. Those
two have in common with ours what chunks are, so Mamba 2 is compared with its definition too: `recurrent_mamba2`, one token
after another, every group of heads and of normalized channels cut out by hand.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'oracle'")
pytest.importorskip("transformers", reason="needs the extra 'oracle'")

from golden import write_mamba1, write_mamba2  # noqa: E402
from oracle.measuring import (  # noqa: E402
    BOUNDS,
    Case,
    assert_within_bounds,
    compare,
    random_batches,
    randomize,
    relative_error,
    step_by_step,
)
from torch.nn.functional import pad, silu  # noqa: E402

from oxidizr_ref.autograd import no_grad  # noqa: E402
from oxidizr_ref.config import ModelConfig  # noqa: E402
from oxidizr_ref.fused.register import reference  # noqa: E402
from oxidizr_ref.model import LanguageModel  # noqa: E402

pytestmark = pytest.mark.oracle

# 37 tokens are four chunks of 8 and a rest; 12 heads, so that 1, 2, 3, 4, 6 or 12 groups share B and C; ranks of 3.
VOCAB, LENGTH, CHUNK, LAYERS, EPS = 97, 37, 8, 3, 1e-5
HEADS, HEAD_DIM, STATE = 12, 8, 10
COMMON = {"hidden_size": 48, "num_layers": LAYERS, "vocab_size": VOCAB, "max_seq_len": LENGTH, "rms_norm_eps": EPS}
COMMON |= {"mamba_layers": list(range(LAYERS))}
MAMBA1 = {"mamba_d_state": STATE, "mamba_d_conv": 4, "mamba_expand": 2}
MAMBA2 = {"mamba2_num_heads": HEADS, "mamba2_head_dim": HEAD_DIM, "mamba2_state_size": STATE, "mamba2_chunk_size": CHUNK}
MAMBA2 |= {"mamba2_conv_kernel": 4, "mamba2_expand": 2}

#: With ten of the seeds 1 to 12, Mamba 1's float32 losses of ten steps are within 8e-7 of theirs; with 6 and 7 within 8e-6:
#: there an element's first clipped gradient (of a norm, an embedding) is about 1e-8, and Adam makes a step of its rounding.
SEED = 9


def our_model(dtype: str, keys: Mapping[str, Any]) -> LanguageModel:
    """Three Mamba layers and nothing else, with random weights."""
    ours = LanguageModel(ModelConfig(name="oracle", dtype=dtype, **keys), seed=0)
    randomize(ours, SEED)
    return ours


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def hugging_face_case(theirs: torch.nn.Module, our_name: Callable[[str], str], ours: LanguageModel, dtype: str) -> Case:
    """Ours and the library's, which is float32 in places whatever the dtype: `write_mamba1` replaces exactly those."""
    theirs = write_mamba1.in_float64(theirs) if dtype == "f64" else theirs
    forward = write_mamba1.forward_of(theirs)
    parameters = {our_name(name): p for name, p in theirs.named_parameters()}
    return Case(ours, lambda tokens: forward(torch.from_numpy(tokens)), parameters, random_batches(VOCAB, 3, LENGTH))


def mamba1(dtype: str) -> Case:
    """Our Mamba 1 and Hugging Face's."""
    keys = {**COMMON, **MAMBA1}
    return hugging_face_case(write_mamba1.make_model(keys), write_mamba1.our_name, our_model(dtype, keys), dtype)


def mamba2(dtype: str, groups: int = 1) -> Case:
    """Our Mamba 2 and Hugging Face's."""
    keys = {**COMMON, **MAMBA2, "mamba2_n_groups": groups}
    return hugging_face_case(write_mamba2.make_model(keys), write_mamba2.our_name, our_model(dtype, keys), dtype)


# --- Mamba 2 as it is defined -----------------------------------------------------------------------------------------


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS) * weight


def recurrent_mamba2(u: torch.Tensor, groups: int, w: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The layer between norm and residual sum, ``[B,T,D]`` to ``[B,T,D]``: convolution, scan and groups as loops.

    ``w``: the weights by their names in the mixer (Dao & Gu 2024, sections 2 and 7).
    """
    (batch, T, _), E, GN = u.shape, HEADS * HEAD_DIM, groups * STATE
    z, xBC, dt = (u @ w["in_proj.weight"].T).split((E, E + 2 * GN, HEADS), dim=-1)
    kernel = w["conv1d.weight"][:, 0]  # [C,K], its last column for the token itself
    K = kernel.shape[1]
    before = pad(xBC, (0, 0, K - 1, 0))
    conv = torch.stack([(before[:, t : t + K] * kernel.T).sum(1) for t in range(T)], dim=1)
    x, B, C = silu(conv + w["conv1d.bias"]).split((E, GN, GN), dim=-1)
    dt = torch.log1p(torch.exp(dt + w["dt_bias"]))
    outputs = []
    for head in range(HEADS):
        group = head // (HEADS // groups)
        own, shared = (slice(i * n, (i + 1) * n) for i, n in ((head, HEAD_DIM), (group, STATE)))
        h, seen = u.new_zeros(batch, HEAD_DIM, STATE), []
        for t in range(T):
            step, now = dt[:, t, head, None, None], x[:, t, own]
            entering = step * now[:, :, None] * B[:, t, None, shared]
            h = torch.exp(step * -torch.exp(w["A_log"][head])) * h + entering
            seen.append((h * C[:, t, None, shared]).sum(-1) + w["D"][head] * now)
        outputs.append(torch.stack(seen, dim=1))
    gated = torch.cat(outputs, dim=-1) * z * torch.sigmoid(z)
    parts = zip(gated.chunk(groups, dim=-1), w["norm.weight"].chunk(groups), strict=True)
    return torch.cat([plain_norm(part, weight) for part, weight in parts], dim=-1) @ w["out_proj.weight"].T


def twin_mamba2(dtype: str, groups: int = 3) -> Case:
    """Our Mamba 2 and the recurrence."""
    ours = our_model(dtype, {**COMMON, **MAMBA2, "mamba2_n_groups": groups})
    p = {name: torch.from_numpy(q.data.copy()).requires_grad_() for name, q in ours.named_parameters()}

    def forward(tokens: np.ndarray) -> tuple[torch.Tensor, float]:
        h = p["embed_tokens.weight"][torch.from_numpy(tokens)]
        for layer in range(LAYERS):
            layer_name = f"layers.{layer}.mamba2."
            mixer = layer_name + "mixer."
            w = {name.removeprefix(mixer): leaf for name, leaf in p.items() if name.startswith(mixer)}
            h = h + recurrent_mamba2(plain_norm(h, p[layer_name + "norm.weight"]), groups, w)
        return plain_norm(h, p["norm.weight"]) @ p["lm_head.weight"].T, 0.0

    # 19 tokens: the loops over tokens and heads are slow, and three chunks of 8 of which the last is short say as much as 5.
    return Case(ours, forward, p, random_batches(VOCAB, 2, 2 * CHUNK + 3))


CASES: dict[str, Callable[[str], Case]] = {
    "mamba1": mamba1,
    "mamba2": mamba2,
    "mamba2_groups": functools.partial(mamba2, groups=3),
    "mamba2_recurrence": twin_mamba2,
}


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=CASES)
def make(request: pytest.FixtureRequest) -> Callable[[str], Case]:
    return CASES[request.param]


@pytest.mark.parametrize("side", [contextlib.nullcontext, reference], ids=["fused", "reference"])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_logits_gradients_and_ten_clipped_adamw_steps_equal_those_of_the_other_implementation(
    make: Callable[[str], Case], dtype: str, side: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    case = make(dtype)
    with side():
        errors = compare(case.ours, case.their_forward, case.parameters, case.batches, dtype)
    print(errors)
    assert_within_bounds(errors, dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_decoding_token_by_token_equals_the_full_forward_pass_of_the_other_implementation(
    make: Callable[[str], Case], dtype: str
) -> None:
    case = make(dtype)
    copy_weights(case)
    tokens = case.batches[0][0]
    with torch.no_grad():
        expected = case.their_forward(tokens)[0].numpy()
    error = relative_error(step_by_step(case.ours, tokens), expected)
    print(error)
    assert error < BOUNDS[dtype].forward


@pytest.mark.parametrize("make", [mamba1, mamba2])
def test_logits_of_any_length_beside_that_of_the_convolution_and_of_chunks_equal_those_of_hugging_face(
    make: Callable[[str], Case],
) -> None:
    case = make("f64")
    copy_weights(case)
    for length in (1, 2, 3, 4, 5, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1):
        tokens = case.batches[0][0][:, :length]
        with torch.no_grad(), no_grad():
            error = relative_error(case.ours(tokens).data, case.their_forward(tokens)[0].numpy())
        assert error < BOUNDS["f64"].forward, length


@pytest.mark.parametrize("length", [3, CHUNK, CHUNK + 1])  # the convolution spans 4 tokens
@pytest.mark.parametrize("make", [mamba1, mamba2])
def test_gradients_of_sequences_shorter_than_the_convolution_of_one_chunk_and_of_one_token_more_equal_those_of_hugging_face(
    make: Callable[[str], Case], length: int
) -> None:
    case = make("f64")
    errors = compare(case.ours, case.their_forward, case.parameters, random_batches(VOCAB, 2, length, count=1), "f64")
    assert_within_bounds(errors, "f64")


@pytest.mark.parametrize("groups", [2, 4, 12])
def test_any_number_of_groups_equals_that_of_hugging_face_which_normalizes_by_groups_too(groups: int) -> None:
    case = mamba2("f64", groups)
    errors = compare(case.ours, case.their_forward, case.parameters, case.batches[:2], "f64")
    assert_within_bounds(errors, "f64")


@pytest.mark.parametrize("make", [mamba1, mamba2])
def test_the_last_logits_still_hold_the_first_token_so_that_what_states_and_chunks_carry_is_compared(
    make: Callable[[str], Case],
) -> None:
    """Three convolutions of 4 see 10 tokens; what is beyond, only states carry: it must exceed the 1e-10 compared to."""
    case = make("f64")
    tokens = case.batches[0][0]
    changed = tokens.copy()
    changed[:, 0] = (changed[:, 0] + 1) % VOCAB
    with no_grad():
        last = [case.ours(ids).data[:, -1] for ids in (tokens, changed)]
    print(relative_error(*last))
    assert relative_error(*last) > 1e-6


def copy_weights(case: Case) -> None:
    """Ours into theirs, as `compare` does."""
    for name, p in case.ours.named_parameters():
        with torch.no_grad():
            case.parameters[name].copy_(torch.from_numpy(p.data))
