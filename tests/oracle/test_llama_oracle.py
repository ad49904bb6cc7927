"""`LanguageModel` against Hugging Face's `LlamaForCausalLM`: the model's own code path, with equal random weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'oracle'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'oracle'")

from oracle.measuring import (  # noqa: E402
    BOUNDS,
    TORCH_DTYPES,
    Case,
    assert_within_bounds,
    compare,
    random_batches,
    randomize,
    relative_error,
    step_by_step,
)

from oxidizr_ref.config import ModelConfig  # noqa: E402
from oxidizr_ref.fused.register import reference  # noqa: E402
from oxidizr_ref.model import LanguageModel  # noqa: E402

pytestmark = pytest.mark.oracle

HIDDEN, HEADS, VOCAB, LENGTH, THETA = 48, 4, 97, 37, 10000.0


class ExactRotary(torch.nn.Module):
    """cos and sin in float64; the library's own module computes the frequencies in float32 whatever the dtype."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        width = HIDDEN // HEADS
        frequencies = THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = position_ids[..., None].to(torch.float64) * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def exact_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm in the dtype of ``x``; the library's own computes in float32 whatever comes in."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def their_name(name: str) -> str:
    return name if name == "lm_head.weight" else f"model.{name}"


def llama(dtype: str, tied: bool = False) -> Case:
    """Our Llama and Hugging Face's: two query heads a key/value head."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 112, "vocab_size": VOCAB, "rms_norm_eps": 1e-5}
    config = ModelConfig(
        name="oracle",
        num_layers=3,
        num_heads=HEADS,
        kv_heads=2,
        max_seq_len=64,
        rope_theta=THETA,
        dtype=dtype,
        tie_word_embeddings=tied,
        **sizes,
    )
    ours = LanguageModel(config, seed=0)
    randomize(ours)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            num_hidden_layers=3,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            attn_implementation="sdpa",  # the "eager" one takes its softmax in float32, whatever the dtype
            **sizes,
        )
    ).to(TORCH_DTYPES[dtype])
    if dtype == "f64":
        theirs.model.rotary_emb = ExactRotary()
        for module in theirs.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                module.forward = exact_norm.__get__(module)
    named = dict(theirs.named_parameters())
    parameters = {name: named[their_name(name)] for name, _ in ours.named_parameters()}
    assert len(parameters) == len(named)

    def forward(tokens: np.ndarray) -> tuple[torch.Tensor, float]:
        return theirs(torch.from_numpy(tokens), use_cache=False).logits, 0.0

    return Case(ours, forward, parameters, random_batches(VOCAB, 3, LENGTH))


CASES = {"llama": llama, "llama_tied": functools.partial(llama, tied=True)}


@pytest.fixture(params=["fused", "reference"])
def side(request: pytest.FixtureRequest) -> Iterator[str]:
    """Our fused operations, or the plain compositions beside them."""
    with reference() if request.param == "reference" else contextlib.nullcontext():
        yield request.param


@pytest.mark.usefixtures("side")
@pytest.mark.parametrize("dtype", sorted(BOUNDS))
@pytest.mark.parametrize("name", sorted(CASES))
def test_logits_gradients_and_ten_clipped_adamw_steps_equal_those_of_hugging_face(name: str, dtype: str) -> None:
    ours, forward, parameters, batches, alpha = CASES[name](dtype)
    assert_within_bounds(compare(ours, forward, parameters, batches, dtype, alpha), dtype)


def test_decoding_step_by_step_equals_hugging_faces_full_forward_pass() -> None:
    ours, forward, parameters, batches, _ = llama("f64")
    with torch.no_grad():
        for name, p in ours.named_parameters():
            parameters[name].copy_(torch.from_numpy(p.data))
        wanted = forward(batches[0][0])[0].numpy()
    assert relative_error(step_by_step(ours, batches[0][0]), wanted) < BOUNDS["f64"].forward
