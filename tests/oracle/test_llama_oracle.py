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

from golden import write_llama  # noqa: E402
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

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_layers": 3,
    "num_heads": 4,
    "kv_heads": 2,
    "intermediate_size": 112,
    "vocab_size": 97,
    "max_seq_len": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}


def llama(dtype: str, tied: bool = False) -> Case:
    """Our Llama and Hugging Face's: two query heads a key/value head."""
    sizes = {**SIZES, "tie_word_embeddings": tied}
    ours = LanguageModel(ModelConfig(name="oracle", dtype=dtype, **sizes), seed=0)
    randomize(ours, seed=9)
    theirs = write_llama.make_model(sizes, TORCH_DTYPES[dtype])

    def forward(tokens: np.ndarray) -> tuple[torch.Tensor, float]:
        return theirs(torch.from_numpy(tokens), use_cache=False).logits, 0.0

    return Case(ours, forward, write_llama.our_parameters(theirs), random_batches(SIZES["vocab_size"], 3, 37))


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
