"""The model as a whole: what it promises whatever the architecture inside, on the host and on a device."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import devices
import ml_dtypes
import numpy as np
import pytest
from architectures import (
    BATCH,
    FEW,
    LENGTH,
    NAMES,
    ROUTED,
    VOCAB,
    batch,
    everywhere,
    lively_model,
    model_config,
    relative_error,
    small_model,
)
from devices import host, place

from oxidizr_ref import LanguageModel, no_grad, reference
from oxidizr_ref.backend import xp_of
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.errors import DataError
from oxidizr_ref.loss_scale import INITIAL_SCALE
from oxidizr_ref.optim import AdamW

every_architecture = everywhere("architecture", NAMES, FEW)
on_both = pytest.mark.usefixtures("device")
#: With the embedding as the output weight.
TIED = [("llama", True), ("hybrid", True)]


def weights(model: LanguageModel) -> dict[str, Any]:
    """Copies of all parameters, on the host."""
    return {name: host(p.data).copy() for name, p in model.named_parameters()}


def gradients(model: LanguageModel) -> dict[str, Any]:
    """All gradients, taken away from the model, where they are."""
    taken = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return taken


# --- what the model computes ------------------------------------------------------------------------------------------


@every_architecture
def test_changing_a_token_changes_no_logit_before_it_and_every_one_from_there_on(architecture: str) -> None:
    model = small_model(architecture, dtype="f64")
    tokens, _ = batch(shape=(2, 12))
    with no_grad():
        before = host(model(tokens).data)
        for t in range(12):
            changed = tokens.copy()
            changed[:, t] = (changed[:, t] + 1) % VOCAB
            after = host(model(changed).data)
            assert np.any(before[:, t:] != after[:, t:], axis=-1).all()
            if architecture not in ROUTED:
                # To the bit: all products have the shapes they had, and what a token must not see enters them times 0.
                assert np.array_equal(before[:, :t], after[:, :t])
            elif t:
                # An expert's product has as many rows as it was given tokens: with another number of rows BLAS may add in
                # another order. Sums of 32 terms in float64, a dozen in a row: below 1e-14, where a leak shows from 1e-5.
                assert np.abs(before[:, :t] - after[:, :t]).max() <= 1e-14


@every_architecture
def test_the_loss_is_the_mean_cross_entropy_of_the_logits(architecture: str) -> None:
    model = lively_model(architecture)
    tokens, targets = batch()
    with no_grad():
        logits, loss = host(model(tokens).data), model.loss(tokens, targets).item()
    log_sum = np.log(np.exp(logits).sum(axis=-1))
    picked = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    assert loss == pytest.approx((log_sum - picked).mean(), rel=1e-14)


@every_architecture
def test_the_first_loss_is_close_to_that_of_guessing(architecture: str) -> None:
    # The first logits are normal with a deviation of about s = 0.02·sqrt(32) = 0.11. That adds s²/2 = 0.006 nats to ln(V);
    # the mean over 51 targets of a logit deviates by s/sqrt(51) = 0.016, of which five are 0.08.
    with no_grad():
        loss = small_model(architecture).loss(*batch()).item()
    assert loss == pytest.approx(math.log(VOCAB), abs=0.006 + 0.08)


@every_architecture
def test_micro_batches_with_the_steps_token_count_add_up_to_one_batch(architecture: str) -> None:
    model = lively_model(architecture)
    tokens, targets = batch(shape=(4, LENGTH))
    whole = model.loss(tokens, targets)
    whole.backward()
    expected = gradients(model)
    parts = [model.loss(tokens[i : i + 2], targets[i : i + 2], token_count=tokens.size) for i in (0, 2)]
    for part in parts:
        part.backward()
    # Sums of a few thousand float64 products in another order: far below 1e-12.
    assert parts[0].item() + parts[1].item() == pytest.approx(whole.item(), rel=1e-12)
    found = gradients(model)
    assert {name: e for name in found if (e := relative_error(found[name], expected[name])) > 1e-12} == {}


@everywhere("architecture,tied", [*((name, False) for name in NAMES), *TIED], [*((name, False) for name in FEW), *TIED])
def test_reference_mode_computes_the_same_loss_and_gradients(architecture: str, tied: bool) -> None:
    model = lively_model(architecture, tie_word_embeddings=tied)
    results = []
    for plain in (False, True):
        if plain:
            with reference():
                loss = model.loss(*batch(), load_balance_alpha=0.1)
                loss.backward()
        else:
            loss = model.loss(*batch(), load_balance_alpha=0.1)
            loss.backward()
        results.append((loss.item(), gradients(model)))
    (fast_loss, fast), (plain_loss, expected) = results
    assert fast_loss == pytest.approx(plain_loss, rel=1e-13)
    # Three layers deep, a few hundred terms a sum: some 1e-14 of the largest element. 1e-12 leaves room to cancel.
    assert {name: e for name in fast if (e := relative_error(fast[name], expected[name])) > 1e-12} == {}


@every_architecture
def test_the_balance_loss_enters_the_loss_where_there_is_a_router_and_nowhere_else(architecture: str) -> None:
    model = small_model(architecture, dtype="f64")
    with no_grad():
        without, with_it = (model.loss(*batch(), load_balance_alpha=alpha).item() for alpha in (0.0, 0.1))
    # First routers are nearly even: their balance loss is about 1.
    assert with_it - without == pytest.approx(0.1 if architecture in ROUTED else 0.0, abs=0.01)
    assert (with_it == without) == (architecture not in ROUTED)


@on_both
def test_tied_embeddings_have_no_output_weight_and_receive_both_gradients() -> None:
    model = small_model("llama", dtype="f64", tie_word_embeddings=True)
    assert "lm_head.weight" not in dict(model.named_parameters())
    tokens, targets = batch()
    model.loss(tokens, targets).backward()
    unseen = sorted(set(range(VOCAB)) - set(tokens.ravel().tolist()))
    gradient = host(model.embed_tokens.weight.grad)
    assert unseen and np.all(np.abs(gradient[unseen]).max(axis=1) > 0)  # through the softmax


# --- everything learns ------------------------------------------------------------------------------------------------


def train(model: LanguageModel, steps: int, lr: float, shape: tuple[int, int] = (BATCH, LENGTH)) -> list[float]:
    """AdamW, without weight decay. Returns the losses; each parameter must have a gradient in each of the first two steps.

    Later an expert may get none: nothing but its tokens reach it, and the router may have become sure of others.

    On a device gradients of f16 models are scaled, as the trainer does it: products there read them in f16.
    """
    scale = INITIAL_SCALE if devices.current() == "gpu" and model.config.dtype == "f16" else 1.0
    optimizer, losses = AdamW(model.state_dict(), lr=lr, weight_decay=0.0), []
    for step in range(steps):
        loss = model.loss(*batch(step, shape))
        loss.backward(None if scale == 1.0 else place(np.float32(scale)))
        losses.append(loss.item())
        found = gradients(model)
        idle = [name for name, gradient in found.items() if not np.any(host(gradient))]
        assert idle == [] or (step >= 2 and all(".experts." in name for name in idle)), (step, idle)
        optimizer.step(found, gradient_scale=1 / scale)
    return losses


@every_architecture
def test_every_parameter_receives_a_gradient_from_the_first_step_on_and_moves_within_two(architecture: str) -> None:
    model = small_model(architecture)
    first = weights(model)
    train(model, 2, lr=1e-2)
    assert [name for name, array in weights(model).items() if np.array_equal(array, first[name])] == []


#: The parameters of which every single number must move: decays, skips, time steps, norms and biases, what MIMO reads and
#: writes by, and the taps of convolutions.
EACH_NUMBER = ("A_log", ".D", "dt_bias", "bias", "norm.weight", "mimo_x", "mimo_z", "mimo_o", "conv1d.weight")


@everywhere("architecture", NAMES, ["hybrid"])
def test_after_twenty_steps_nothing_has_stayed_as_it_was(architecture: str) -> None:
    model = small_model(architecture)
    first = weights(model)
    shape = (2, 12)
    losses = train(model, 20, lr=1e-2, shape=shape)
    seen = np.unique(np.concatenate([batch(step, shape)[0].ravel() for step in range(20)]))
    for name, array in weights(model).items():
        moved = array != first[name]
        # A matrix moves in every row and column, but for the rows of tokens that no batch held.
        parts = [moved] if name.endswith(EACH_NUMBER) else [moved.any(axis=0), moved.any(axis=1)]
        if name == "embed_tokens.weight":
            parts = [moved[seen]]
        assert all(part.all() for part in parts), name
    # The tokens are random, so nothing but their frequencies can be learned; but nothing blows up either.
    assert max(losses) < math.log(VOCAB) + 1


# --- storage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@every_architecture
def test_every_storage_dtype_computes_in_float32(architecture: str, dtype: str) -> None:
    model = small_model(architecture, dtype=dtype)
    stored = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[dtype]
    assert all(p.dtype == stored for _, p in model.named_parameters())
    loss = model.loss(*batch(), load_balance_alpha=0.1)
    loss.backward()
    assert loss.dtype == np.float32
    assert [name for name, gradient in gradients(model).items() if gradient.dtype != np.float32] == []
    with no_grad():
        assert model(batch()[0]).dtype == np.float32


@everywhere("architecture", NAMES, ["hybrid_mamba1"])
def test_three_steps_in_low_precision_stay_within_its_rounding_of_float32(architecture: str) -> None:
    """Numbers stored in bf16 are at most s = 2⁻⁷ of their size apart, in f16 2⁻¹⁰.

    A weight errs by a normal rounding (of variance s²/12) and three stochastic ones (s²/4 at most): by 0.9 s of its size. A
    logit is a sum over 32 products of a weight and a hidden state that errs as much: by 1.3 s of its size, taken over many.
    And where the noise turns the sign of a small gradient, Adam goes the other way, by 6·lr at most, 3% of a weight's
    size: for a share of the weights of about s·(gradient's size / its median), which adds less than another 2 s. So 4 s.

    On a device products also read hidden states and give their results in 16 bits, two roundings (0.4 s) each. Some eight
    products lie behind a logit: 1.2 s, independent of the 1.3 s, so 1.8 s together, and 3.8 s with Adam's.
    """
    results = {}
    for dtype in ("f32", "bf16", "f16"):
        model = small_model(architecture, dtype=dtype)
        first = weights(model)
        train(model, 3, lr=1e-4, shape=(2, 12))
        # Stochastic rounding loses no update, though each is a fraction of the spacing of most weights: of many numbers some
        # move. Of few large ones none may.
        still = [name for name, array in weights(model).items() if np.array_equal(array, first[name])]
        assert all(first[name].size < 200 for name in still), still
        with no_grad():
            results[dtype] = np.asarray(host(model(batch()[0]).data), np.float64), model.loss(*batch()).item()
    logits, loss = results["f32"]
    size = np.sqrt(np.mean(logits**2))
    for dtype, s in (("bf16", 2**-7), ("f16", 2**-10)):
        error = np.sqrt(np.mean((results[dtype][0] - logits) ** 2))
        assert 0 < error <= 4 * s * size, (dtype, error / (s * size))
        # The cross-entropy changes by no more than the logit of the target and the mean one do, together.
        assert abs(results[dtype][1] - loss) <= 2 * 4 * s * size


@every_architecture
def test_state_dict_round_trip_copies_into_the_models_own_arrays(architecture: str) -> None:
    source, target = small_model(architecture, seed=1), small_model(architecture, seed=2)
    arrays = {name: array.copy() for name, array in source.state_dict().items()}
    before = {name: id(array) for name, array in target.state_dict().items()}
    target.load_state_dict(arrays)
    for name, array in target.state_dict().items():
        assert np.array_equal(host(array), host(arrays[name])) and id(array) == before[name]
        assert not xp_of(array).may_share_memory(array, arrays[name])
    with no_grad():
        assert np.array_equal(host(source(batch()[0]).data), host(target(batch()[0]).data))


@on_both
@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
@pytest.mark.parametrize("architecture", ["llama", "hybrid"])
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(architecture: str, damage: str) -> None:
    model = small_model(architecture)
    arrays: dict[str, Any] = {name: array + 1 for name, array in model.state_dict().items()}
    if damage == "missing":
        del arrays["norm.weight"]
    elif damage == "extra":
        arrays["nonsense"] = np.zeros(3, np.float32)
    else:
        arrays["norm.weight"] = np.zeros(33, np.float32)
    before = weights(model)
    with pytest.raises(DataError, match="nonsense" if damage == "extra" else "norm.weight"):
        model.load_state_dict(arrays)
    assert all(np.array_equal(array, before[name]) for name, array in weights(model).items())


# --- what means nothing -----------------------------------------------------------------------------------------------


@on_both
@pytest.mark.parametrize(("tokens", "message"), [([[0, 99]], "99"), ([[0, -1]], "-1"), ([0, 1], "batch, time")])
def test_token_ids_that_mean_nothing_are_refused(tokens: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        small_model("llama")(np.array(tokens))


@on_both
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([[1, -1]], "target id -1 "),
        ([[1, VOCAB]], f"target id {VOCAB} is outside the vocabulary of {VOCAB}"),
        ([[1]], r"shape \[1, 1\], but the tokens \[1, 2\]"),
        ([[1], [2]], r"shape \[2, 1\]"),
    ],
)
def test_targets_that_mean_nothing_are_refused(targets: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        small_model("llama").loss(np.array([[0, 1]]), np.array(targets))


@pytest.mark.parametrize("architecture", NAMES)
def test_the_kinds_of_layers_are_those_the_config_names(architecture: str) -> None:
    config = model_config(architecture)
    kinds = {"attention": ".self_attn.", "mamba1": ".mamba.", "mamba2": ".mamba2.mixer.", "mamba3": ".mamba3.mixer."}
    names = [name for name, _ in small_model(architecture).named_parameters()]
    for layer, kind in enumerate(config.layer_kinds):
        mine = [name for name in names if name.startswith(f"layers.{layer}.")]
        assert {other for other, part in kinds.items() if any(part in name for name in mine)} == {kind}


@on_both
def test_any_attention_goes_with_any_feed_forward_and_any_mamba() -> None:
    mla = {"kv_latent_dim": 6, "q_latent_dim": 5, "d_rope": 2}
    mambas: list[dict[str, Any]] = [{}, {"mamba2_num_heads": 4}, {"mamba2_num_heads": 4, "mamba3_enabled": True}]
    tokens, targets = batch(shape=(BATCH, 5))
    for attention in ({}, mla):
        for feed_forward in ({}, {"num_experts": 2}):
            for mamba in mambas:
                keys = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "vocab_size": VOCAB, "max_seq_len": 8}
                config = ModelConfig(**keys, mamba_layers=[1], **attention, **feed_forward, **mamba)
                model = LanguageModel(config, device=devices.current())
                model.loss(tokens, targets).backward()
                assert all(np.isfinite(host(gradient)).all() for gradient in gradients(model).values())


def test_the_public_tensor_has_its_operators_in_a_fresh_process() -> None:
    code = "import numpy as np; from oxidizr_ref import Tensor; print((Tensor(np.ones(3)) * 2 + 1).sum().item())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "9.0\n"
