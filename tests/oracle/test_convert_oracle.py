"""Models that transformers made and saved: read by us they compute the same numbers, written back they are the same files.

All sizes of a model differ from each other, its epsilon and theta from what absent keys mean, and its weights are drawn so
that none is without effect. Gradients are compared under our names: theirs are saved as if they were weights, and read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'oracle'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'oracle'")

from golden import write_mamba1  # noqa: E402
from golden.exact import Float64Rotary, in_float64  # noqa: E402
from oracle.measuring import BOUNDS, TORCH_DTYPES, random_batches, relative_error  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from oxidizr_ref.interop.hugging_face import Pretrained, family_of, read_pretrained, write_pretrained  # noqa: E402
from oxidizr_ref.model import LanguageModel  # noqa: E402

pytestmark = pytest.mark.oracle

THETA, LENGTH, STD = 777.0, 37, 0.15
_BASE = {"vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 2}
_NO_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
_SCALES = {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
_ATTENTION = {
    **_BASE,
    **_NO_IDS,
    **_SCALES,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "max_position_embeddings": 64,
}
_GQA = {**_ATTENTION, "num_key_value_heads": 2}
_EXPERTS = {**_GQA, "num_local_experts": 5, "num_experts_per_tok": 2, "experts_implementation": "eager"}
_HEADS = {"num_key_value_heads": 4, "qk_nope_head_dim": 12, "v_head_dim": 12, "qk_rope_head_dim": 6, "kv_lora_rank": 20}
_LATENT = {**_ATTENTION, **_HEADS, "rms_norm_eps": 1e-6, "q_lora_rank": 14, "first_k_dense_replace": 2}
_SHARED = {"n_routed_experts": 5, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 28}
_SPARSE = {**_LATENT, **_SHARED, "first_k_dense_replace": 0, "experts_implementation": "eager"}
_STATES = {**_BASE, **_NO_IDS, "layer_norm_epsilon": 1e-2, "residual_in_fp32": False, "conv_kernel": 3}
_MAMBA2 = {**_STATES, "state_size": 10, "num_heads": 12, "head_dim": 8, "n_groups": 2, "chunk_size": 9}


class Case(NamedTuple):
    """A model of theirs: its class, the arguments of its config, and how large its files may be."""

    name: str
    arguments: dict[str, Any]
    max_shard_size: str = "1GB"

    def build(self) -> Any:
        config = getattr(transformers, f"{self.name}Config")(**self.arguments)
        return getattr(transformers, f"{self.name}ForCausalLM")(config)


CASES = {
    "llama": Case("Llama", _GQA, "30KB"),
    "llama_tied": Case("Llama", {**_GQA, "tie_word_embeddings": True}),
    "mixtral": Case("Mixtral", _EXPERTS, "50KB"),
    "mixtral_of_one": Case("Mixtral", {**_EXPERTS, "num_local_experts": 3, "num_experts_per_tok": 1}),
    "deepseek_v2": Case("DeepseekV2", _SPARSE, "50KB"),
    "deepseek_v2_no_q_latent": Case("DeepseekV2", {**_SPARSE, "q_lora_rank": None}),
    "deepseek_v2_dense": Case("DeepseekV2", {**_LATENT, "tie_word_embeddings": True}),
    "deepseek_v3_dense": Case("DeepseekV3", _LATENT),
    "mamba": Case("Mamba", {**_STATES, "state_size": 10}, "30KB"),
    "mamba2": Case("Mamba2", _MAMBA2),
}


class Float64Turns(torch.nn.Module):
    """The rotations of DeepSeek-V2, complex numbers ``[batch, time, width / 2]``, in float64."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies = THETA ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)

    def forward(self, _: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        angles = position_ids[..., None].to(torch.float64) * self.frequencies
        return torch.polar(torch.ones_like(angles), angles)


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of which none is without effect (see `measuring.randomize`)."""
    generator = np.random.default_rng(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            drawn = STD * generator.standard_normal(p.shape)
            if name.endswith(("dt_bias", "dt_proj.bias")):
                drawn = np.log(np.expm1(generator.uniform(0.3, 1.0, p.shape)))
            elif name.endswith("A_log"):
                drawn = np.log(generator.uniform(0.2, 4.0, p.shape))
            elif "norm" in name or name.endswith(".D"):
                drawn += 1
            p.copy_(torch.from_numpy(drawn))
    return model


@contextlib.contextmanager
def nothing_narrowed(case: Case, model: torch.nn.Module) -> Iterator[None]:
    """In float64, what the library computes in float32 whatever its dtype is computed in float64."""
    if next(model.parameters()).dtype == torch.float32:
        yield
        return
    if case.name.startswith("Mamba"):
        write_mamba1.in_float64(model)
    elif case.name == "DeepseekV2":
        in_float64(model, Float64Turns(case.arguments["qk_rope_head_dim"]))
    else:
        in_float64(model, Float64Rotary(THETA, case.arguments.get("qk_rope_head_dim", 12)))
    softmax: Callable[..., torch.Tensor] = lambda x, dim, dtype=None: torch.softmax(x, dim)  # noqa: E731
    with (
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(torch.Tensor, "type", lambda self, _: self),
        mock.patch.object(torch.Tensor, "softmax", softmax),
        mock.patch.object(torch.nn.functional, "softmax", softmax),
    ):
        yield


class Both(NamedTuple):
    """A model of theirs, its files, and what we read of them."""

    case: Case
    dtype: str
    theirs: Any
    directory: Path
    read: Pretrained


@pytest.fixture(scope="module", params=[(name, dtype) for name in CASES for dtype in ("f32", "f64")], ids="-".join)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    name, dtype = request.param
    case, directory = CASES[name], tmp_path_factory.mktemp(name)
    theirs = randomized(case.build().to(TORCH_DTYPES[dtype])).eval()
    theirs.save_pretrained(directory, max_shard_size=case.max_shard_size)
    return Both(case, dtype, theirs, directory, read_pretrained(directory))


def ours_of(read: Pretrained) -> LanguageModel:
    model = LanguageModel(read.config)
    model.load_state_dict(read.weights)
    return model


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def test_logits_and_the_gradients_of_all_parameters_are_theirs(both: Both, tmp_path: Path) -> None:
    ((tokens, targets),) = random_batches(97, 2, LENGTH, count=1)
    ours = ours_of(both.read)
    theirs = both.case.build().to(TORCH_DTYPES[both.dtype]).eval()
    theirs.load_state_dict(both.theirs.state_dict())
    with nothing_narrowed(both.case, theirs):
        logits = theirs(torch.from_numpy(tokens), use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten()).backward()
    ours.loss(tokens, targets).backward()
    bounds = BOUNDS[both.dtype]
    assert relative_error(ours(tokens).data, logits.detach().numpy()) < bounds.forward

    with torch.no_grad():
        for p in theirs.parameters():
            assert p.grad is not None
            p.copy_(p.grad)
    theirs.save_pretrained(tmp_path)
    expected = read_pretrained(tmp_path).weights
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for name, p in ours.named_parameters():
        if name.endswith("router.gate.weight") and both.read.config.experts_per_tok == 1:
            assert max(np.abs(p.grad).max(), np.abs(expected[name]).max()) < 1e-6 * largest  # a token's one expert weighs 1
            continue
        assert np.abs(expected[name]).max() > 1e-4 * largest, f"{name}: nothing was compared"
        assert relative_error(p.grad, expected[name]) < bounds.gradients, name


def test_written_back_the_tensors_are_theirs_bit_for_bit_and_their_library_reads_them(both: Both, tmp_path: Path) -> None:
    config, weights = both.read.config, both.read.weights
    sharded = both.case.max_shard_size != "1GB"
    files = write_pretrained(tmp_path, config, weights, max_shard_bytes=40_000 if sharded else None, eos_token_id=5)
    assert sorted(files) == sorted(tmp_path.iterdir())
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 if sharded else (tmp_path / "model.safetensors").is_file()
    theirs, ours = tensors_in(both.directory), tensors_in(tmp_path)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype and torch.equal(tensor, ours[name]), name

    plain = {
        key: value for key, value in both.case.arguments.items() if key == "experts_implementation"
    }  # grouped: no float64
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **plain).eval()
    assert family_of(config) == again.config.model_type
    assert again.generation_config.eos_token_id == again.config.eos_token_id == 5
    assert TORCH_DTYPES[both.dtype] in {p.dtype for p in again.parameters()}  # DeepSeek's router is kept in float32
    ((tokens, _),) = random_batches(97, 2, LENGTH, count=1)
    with torch.no_grad():
        expected, found = (model(torch.from_numpy(tokens), use_cache=False).logits for model in (both.theirs, again))
    assert relative_error(found.numpy(), expected.numpy()) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2"])
def test_experts_that_are_stacked_in_the_files_are_read_as_well(name: str, tmp_path: Path) -> None:
    theirs = randomized(CASES[name].build())
    theirs.save_pretrained(tmp_path / "apart")
    theirs.save_pretrained(tmp_path / "stacked", save_original_format=False)
    apart, stacked = (read_pretrained(tmp_path / way) for way in ("apart", "stacked"))
    assert any("experts.gate_up_proj" in name for name in tensors_in(tmp_path / "stacked"))
    assert apart.weights.keys() == stacked.weights.keys()
    for ours, array in apart.weights.items():
        np.testing.assert_array_equal(array, stacked.weights[ours])
