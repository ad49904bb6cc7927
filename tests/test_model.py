"""The model as a whole: what it promises whatever the architecture inside."""

from __future__ import annotations

import math
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from oxidizr_ref import LanguageModel, no_grad, reference
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.errors import ConfigError, DataError
from oxidizr_ref.optim import AdamW

VOCAB = 61


def config(**changes) -> ModelConfig:
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "kv_heads": 2, "intermediate_size": 72}
    return ModelConfig(**{"name": "m", **sizes, "vocab_size": VOCAB, "max_seq_len": 24, **changes})


def batch(seed: int = 0, shape: tuple[int, int] = (3, 17)):
    ids = np.random.default_rng(seed).integers(0, VOCAB, (shape[0], shape[1] + 1))
    return ids[:, :-1].copy(), ids[:, 1:].copy()


def test_changing_a_token_changes_no_logit_before_it():
    model = LanguageModel(config(dtype="f64"))
    tokens, _ = batch()
    with no_grad():
        before = model(tokens).data
        for t in range(tokens.shape[1]):
            changed = tokens.copy()
            changed[:, t] = (changed[:, t] + 1) % VOCAB
            after = model(changed).data
            assert np.array_equal(before[:, :t], after[:, :t])
            assert not np.array_equal(before[:, t:], after[:, t:])


def test_every_parameter_receives_a_gradient_and_moves_within_two_steps():
    model = LanguageModel(config())
    first = {name: p.data.copy() for name, p in model.named_parameters()}
    optimizer = AdamW(model.state_dict(), lr=1e-2, weight_decay=0.0)
    for step in range(2):
        model.loss(*batch(step)).backward()
        for name, p in model.named_parameters():
            assert np.any(p.grad != 0), name
        optimizer.step({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    assert all(np.any(p.data != first[name]) for name, p in model.named_parameters())


def test_loss_is_the_mean_cross_entropy_of_the_logits():
    model = LanguageModel(config(dtype="f64"))
    tokens, targets = batch()
    with no_grad():
        logits, loss = model(tokens).data, model.loss(tokens, targets).item()
    log_sum = np.log(np.exp(logits).sum(axis=-1))
    picked = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    assert loss == pytest.approx((log_sum - picked).mean(), rel=1e-14)


def test_first_loss_is_close_to_that_of_guessing():
    # The first logits have a standard deviation of about 0.02·sqrt(32) = 0.11, which adds about 0.11²/2 nats to ln(V).
    with no_grad():
        assert LanguageModel(config()).loss(*batch()).item() == pytest.approx(math.log(VOCAB), abs=0.1)


def test_micro_batches_with_the_steps_token_count_add_up_to_one_batch():
    model = LanguageModel(config(dtype="f64"))
    tokens, targets = batch(shape=(4, 17))
    whole = model.loss(tokens, targets)
    whole.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    parts = [model.loss(tokens[i : i + 2], targets[i : i + 2], token_count=tokens.size) for i in (0, 2)]
    for part in parts:
        part.backward()
    # Sums of a few thousand float64 products in another order: far below 1e-12.
    assert parts[0].item() + parts[1].item() == pytest.approx(whole.item(), rel=1e-12)
    for name, p in model.named_parameters():
        assert np.abs(p.grad - expected[name]).max() <= 1e-12 * np.abs(expected[name]).max(), name


@pytest.mark.parametrize("tied", [False, True])
def test_reference_mode_computes_the_same_loss_and_gradients(tied):
    model = LanguageModel(config(dtype="f64", tie_word_embeddings=tied))
    results = []
    for plain in (False, True):
        model.zero_grad()
        if plain:
            with reference():
                loss = model.loss(*batch())
                loss.backward()
        else:
            loss = model.loss(*batch())
            loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}))
    (fast, fast_gradients), (plain_loss, plain_gradients) = results
    assert fast == pytest.approx(plain_loss, rel=1e-13)
    for name, gradient in fast_gradients.items():
        assert np.abs(gradient - plain_gradients[name]).max() <= 1e-12 * np.abs(plain_gradients[name]).max(), name


def test_parameter_names_and_shapes_are_those_of_oxidizr():
    shapes = {name: p.shape for name, p in LanguageModel(config(num_layers=1)).named_parameters()}
    assert shapes == {
        "embed_tokens.weight": (VOCAB, 32),
        "layers.0.input_layernorm.weight": (32,),
        "layers.0.self_attn.q_proj.weight": (32, 32),
        "layers.0.self_attn.k_proj.weight": (16, 32),
        "layers.0.self_attn.v_proj.weight": (16, 32),
        "layers.0.self_attn.o_proj.weight": (32, 32),
        "layers.0.post_attention_layernorm.weight": (32,),
        "layers.0.mlp.gate_proj.weight": (72, 32),
        "layers.0.mlp.up_proj.weight": (72, 32),
        "layers.0.mlp.down_proj.weight": (32, 72),
        "norm.weight": (32,),
        "lm_head.weight": (VOCAB, 32),
    }


def test_tied_embeddings_have_no_output_weight_and_receive_both_gradients():
    model = LanguageModel(config(dtype="f64", tie_word_embeddings=True))
    assert "lm_head.weight" not in dict(model.named_parameters())
    tokens, targets = batch()
    model.loss(tokens, targets).backward()
    unseen = sorted(set(range(VOCAB)) - set(tokens.ravel().tolist()))
    assert unseen and np.all(np.abs(model.embed_tokens.weight.grad[unseen]).max(axis=1) > 0)  # through the softmax


def test_a_parameters_first_value_depends_on_seed_and_name_only():
    small, large = LanguageModel(config(num_layers=1), seed=3), LanguageModel(config(num_layers=4), seed=3)
    wide = dict(large.named_parameters())
    for name, p in small.named_parameters():
        if not name.endswith(("o_proj.weight", "down_proj.weight")):  # scaled by depth
            assert np.array_equal(p.data, wide[name].data), name
    other = LanguageModel(config(num_layers=1), seed=4)
    assert not np.array_equal(small.embed_tokens.weight.data, other.embed_tokens.weight.data)


def test_initial_weights_have_the_documented_spread():
    model = LanguageModel(config(hidden_size=128, intermediate_size=512, num_layers=3))
    weights = model.state_dict()
    # The standard deviation of n samples is known to about 1/sqrt(2n): n ≥ 8192 here, so 5 sigma are 4%.
    assert weights["layers.0.mlp.gate_proj.weight"].std() == pytest.approx(0.02, rel=0.04)
    assert weights["layers.0.mlp.down_proj.weight"].std() == pytest.approx(0.02 / math.sqrt(6), rel=0.04)
    assert weights["layers.0.self_attn.o_proj.weight"].std() == pytest.approx(0.02 / math.sqrt(6), rel=0.04)
    assert np.all(weights["norm.weight"] == 1)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_every_storage_dtype_computes_in_float32(dtype):
    model = LanguageModel(config(dtype=dtype))
    stored = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    assert all(p.dtype == stored for _, p in model.named_parameters())
    model.loss(*batch()).backward()
    assert all(p.grad.dtype == np.float32 for _, p in model.named_parameters())
    with no_grad():
        assert model(batch()[0]).dtype == np.float32


def test_low_precision_storage_stays_within_its_rounding_of_float32():
    exact = LanguageModel(config(dtype="f64"))
    with no_grad():
        expected = exact.loss(*batch()).item()
        for dtype, ulp in (("f32", 2**-24), ("f16", 2**-11), ("bf16", 2**-8)):
            rounded = LanguageModel(config(dtype=dtype))
            # The initial loss hardly depends on the weights: 64 roundings of its logits (about 0.1 each) are generous.
            assert rounded.loss(*batch()).item() == pytest.approx(expected, abs=64 * ulp * 0.1)


def test_state_dict_round_trip_copies_into_the_models_own_arrays():
    source, target = LanguageModel(config(), seed=1), LanguageModel(config(), seed=2)
    arrays = {name: array.copy() for name, array in source.state_dict().items()}
    before = {name: id(array) for name, array in target.state_dict().items()}
    target.load_state_dict(arrays)
    for name, array in target.state_dict().items():
        assert np.array_equal(array, arrays[name]) and id(array) == before[name]
        assert not np.shares_memory(array, arrays[name])


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(damage):
    model = LanguageModel(config())
    arrays = {name: array + 1 for name, array in model.state_dict().items()}
    if damage == "missing":
        del arrays["norm.weight"]
    elif damage == "extra":
        arrays["nonsense"] = np.zeros(3, np.float32)
    else:
        arrays["norm.weight"] = np.zeros(33, np.float32)
    before = {name: array.copy() for name, array in model.state_dict().items()}
    with pytest.raises(DataError, match="nonsense" if damage == "extra" else "norm.weight"):
        model.load_state_dict(arrays)
    assert all(np.array_equal(array, before[name]) for name, array in model.state_dict().items())


@pytest.mark.parametrize(("tokens", "message"), [([[0, 99]], "99"), ([[0, -1]], "-1"), ([0, 1], "batch, time")])
def test_token_ids_that_mean_nothing_are_refused(tokens, message):
    with pytest.raises(DataError, match=message):
        LanguageModel(config())(np.array(tokens))


@pytest.mark.parametrize(
    "keys",
    [
        {"kv_latent_dim": 16, "q_latent_dim": 16, "d_rope": 8},
        {"num_experts": 4, "experts_per_tok": 2},
        {"mamba_layers": [0]},
    ],
)
def test_an_architecture_that_is_not_built_yet_is_refused_by_name(keys):
    with pytest.raises(ConfigError, match="not built in this version"):
        LanguageModel(config(**keys))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([[1, -100]], "target id -100"),
        ([[1, VOCAB]], f"target id {VOCAB} is outside the vocabulary of {VOCAB}"),
        ([[1]], r"shape \[1, 1\], but the tokens \[1, 2\]"),
        ([[1], [2]], r"shape \[2, 1\]"),
    ],
)
def test_targets_that_mean_nothing_are_refused(targets, message):
    with pytest.raises(DataError, match=message):
        LanguageModel(config()).loss([[0, 1]], targets)


def test_the_public_tensor_has_its_operators_in_a_fresh_process():
    code = "import numpy as np; from oxidizr_ref import Tensor; print((Tensor(np.ones(3)) * 2 + 1).sum().item())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "9.0\n"
