"""The mixture of experts and its router: against a loop over tokens, at the edges, and in a run.

What it computes it computes on a device too; what is told of it, and in which run, is the host's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import devices
import numpy as np
import pytest
import tiny
from devices import host, place
from gradcheck import STEP, TOLERANCE, check_gradients
from hypothesis import given
from hypothesis import strategies as st

from oxidizr_ref import LanguageModel, no_grad
from oxidizr_ref.autograd import Tensor
from oxidizr_ref.backend import assign
from oxidizr_ref.config import ModelConfig
from oxidizr_ref.layers.feed_forward import MixtureOfExperts, Router, Routing, router_metrics
from oxidizr_ref.optim import AdamW

on_both = pytest.mark.usefixtures("device")

SIZES = {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "kv_heads": 1, "intermediate_size": 6}
SIZES |= {"vocab_size": 61, "max_seq_len": 24}
MOE = {"num_experts": 4, "experts_per_tok": 2, "shared_expert_enabled": True}
MLA = {"kv_latent_dim": 6, "q_latent_dim": 5, "d_rope": 4}


def config(dtype: str = "f64", **changes: Any) -> ModelConfig:
    return ModelConfig(**{"name": "m", "dtype": dtype, **SIZES, **MOE, **changes})


def mixture(experts: int = 4, k: int = 2, shared: bool = True, seed: int = 0, dtype: str = "f64") -> MixtureOfExperts:
    """A layer with weights none of whose effects is negligible, where the test computes."""
    keys = {"num_experts": experts, "experts_per_tok": k, "shared_expert_enabled": shared}
    layer = MixtureOfExperts(config(dtype, **keys), 1.0, 1.0)
    layer.initialize(0, np.dtype({"f64": np.float64, "f32": np.float32}[dtype]), devices.current())
    generator = np.random.default_rng(seed)
    for _, p in layer.named_parameters():
        assign(p.data, 0.5 * generator.standard_normal(p.shape))
    return layer


def router(logits: np.ndarray[Any, Any], k: int) -> tuple[Router, Tensor]:
    """A router and an input for which it computes exactly these logits ``[n,E]``: token i reads column i of its weight.

    The other half of the columns is zero: a model's width is even."""
    n, experts = logits.shape
    found = Router(config(num_experts=experts, experts_per_tok=k, hidden_size=2 * n, num_heads=1), 1.0)
    weight = np.zeros((experts, 2 * n))
    weight[:, :n] = logits.T
    found.gate.weight.data = place(weight)
    return found, Tensor(place(np.eye(n, 2 * n)))


def language_model(**changes: Any) -> LanguageModel:
    return LanguageModel(config(**changes), device=devices.current())


def inputs(*shape: int, seed: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((*shape, SIZES["hidden_size"]))


def batch(seed: int = 0, shape: tuple[int, int] = (3, 17)) -> tuple[Any, Any]:
    ids = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (shape[0], shape[1] + 1))
    return ids[:, :-1].copy(), ids[:, 1:].copy()


# --- an independent mixture: Python loops over tokens, experts and nothing clever ----------------------------------------


def choose(logits: np.ndarray[Any, Any], k: int) -> list[int]:
    return sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:k]


def plain_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def plain_mixture(
    x: np.ndarray[Any, Any], weights: Mapping[str, np.ndarray[Any, Any]], k: int
) -> tuple[np.ndarray[Any, Any], list[list[int]]]:
    """The output for tokens x ``[n,D]``, and every token's experts, the favourite first."""

    def swiglu(expert: str, token: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        gate, up, down = (weights[f"{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        g = gate @ token
        return down @ (g / (1 + np.exp(-g)) * (up @ token))

    y, chosen = [], []
    for token in x:
        logits = weights["router.gate.weight"] @ token
        chosen.append(choose(logits, k))
        shares = plain_softmax(logits[chosen[-1]]) if k > 1 else plain_softmax(logits)[chosen[-1]]
        terms = [share * swiglu(f"experts.{e}", token) for share, e in zip(shares, chosen[-1], strict=True)]
        if "shared_expert.up_proj.weight" in weights:
            terms.append(swiglu("shared_expert", token))
        y.append(sum(terms))
    return np.array(y), chosen


def copies(layer: MixtureOfExperts) -> dict[str, np.ndarray[Any, Any]]:
    return {name: host(p.data).copy() for name, p in layer.named_parameters()}


def relative_error(found: Any, wanted: Any) -> float:
    found, wanted = host(found), host(wanted)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


EVERY_KIND = [(4, 1, True), (4, 2, True), (4, 2, False), (4, 4, False), (3, 3, True), (1, 1, False), (5, 3, False)]


@on_both
@pytest.mark.parametrize(("experts", "k", "shared"), EVERY_KIND)
def test_the_sparse_layer_equals_a_loop_over_tokens_and_their_experts(experts: int, k: int, shared: bool) -> None:
    layer, x = mixture(experts, k, shared), inputs(3, 7)
    y, routing = layer(Tensor(place(x)))
    wanted, chosen = plain_mixture(x.reshape(21, -1), copies(layer), k)
    # Sums of at most 8 products, each token's in another order than the loop's: a few units of 1.1e-16 of the largest.
    assert relative_error(y.data.reshape(21, -1), wanted) < 1e-14
    assert routing.assigned.tolist() == [sum(ids.count(e) for ids in chosen) for e in range(experts)]


@on_both
@pytest.mark.parametrize(("experts", "k", "shared"), EVERY_KIND)
def test_every_gradient_equals_the_finite_differences_of_the_loop_over_tokens(experts: int, k: int, shared: bool) -> None:
    """The router's included. STEP and TOLERANCE are those of gradcheck.py, where they are derived."""
    layer, x = mixture(experts, k, shared), inputs(6)
    leaf = Tensor(place(x), requires_grad=True)
    y, _ = layer(leaf)
    generator = np.random.default_rng(3)
    w = generator.standard_normal(y.shape)
    y.backward(place(w))
    arrays = {**copies(layer), "x": x}
    gradients = {**{name: host(p.grad) for name, p in layer.named_parameters()}, "x": host(leaf.grad)}
    routes = plain_mixture(x, arrays, k)[1]

    def along(name: str, direction: np.ndarray[Any, Any], t: float) -> np.ndarray[Any, Any]:
        moved = {**arrays, name: arrays[name] + t * direction}
        result, chosen = plain_mixture(moved["x"], moved, k)
        assert chosen == routes, "another choice of experts: there is no derivative here; take another seed"
        return result

    for name, gradient in gradients.items():
        v = generator.standard_normal(arrays[name].shape)
        difference = 8 * (along(name, v, STEP) - along(name, v, -STEP)) - (
            along(name, v, 2 * STEP) - along(name, v, -2 * STEP)
        )
        scale = max(float(np.abs(gradient * v).sum()), 1e-4 * float(np.abs(w * host(y.data)).sum()))
        assert abs(float((w * difference).sum()) / (12 * STEP) - float((gradient * v).sum())) <= TOLERANCE * scale, name


# --- who is chosen ----------------------------------------------------------------------------------------------------


@on_both
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_a_router_of_zeros_sends_every_token_to_the_first_experts(k: int) -> None:
    layer = mixture(4, k)
    layer.router.gate.weight.data[...] = 0
    ids, weights, routing = layer.router(Tensor(place(inputs(5))))
    assert ids.tolist() == [list(range(k))] * 5
    assert host(weights.data).tolist() == [[0.25] if k == 1 else [1 / k] * k] * 5
    assert routing.assigned.tolist() == [5] * k + [0] * (4 - k)


@on_both
@given(data=st.data())
def test_equal_logits_go_to_the_lower_index_and_greater_ones_come_first(data: st.DataObject) -> None:
    n, experts = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    k = data.draw(st.integers(1, experts))
    rows = st.lists(st.integers(-2, 2), min_size=experts, max_size=experts)  # few values: ties are common
    logits = np.array(data.draw(st.lists(rows, min_size=n, max_size=n)), dtype=np.float64)
    found, x = router(logits, k)
    ids, weights, routing = found(x)
    assert ids.tolist() == [choose(row, k) for row in logits]
    assert routing.assigned.tolist() == np.bincount(ids.reshape(-1), minlength=experts).tolist()
    assert routing.assigned.sum() == n * k  # none is dropped
    if k > 1:
        # k numbers rounded once each, of which the largest is below 1, summed with k - 1 roundings.
        assert np.abs(host(weights.data).sum(axis=-1) - 1).max() <= k * 2.0**-52
        assert np.all(np.diff(host(weights.data), axis=-1) <= 0)
    else:
        wanted = [max(plain_softmax(row)) for row in logits]
        assert host(weights.data)[:, 0] == pytest.approx(wanted, rel=1e-15)


@on_both
def test_a_tokens_experts_do_not_depend_on_its_neighbours_or_their_number() -> None:
    layer, x = mixture(), inputs(30)
    ids, weights, _ = layer.router(Tensor(place(x)))
    order = np.random.default_rng(4).permutation(30)
    assert np.array_equal(layer.router(Tensor(place(x[order])))[0], ids[order])
    for size in (1, 7, 15):
        parts = [layer.router(Tensor(place(x[i : i + size]))) for i in range(0, 30, size)]
        assert np.array_equal(np.concatenate([part[0] for part in parts]), ids)
        # A product of another shape may round its sums of 8 terms otherwise: some units of 1.1e-16.
        assert relative_error(np.concatenate([host(part[1].data) for part in parts]), weights.data) < 1e-14
        outputs = np.concatenate([host(layer(Tensor(place(x[i : i + size])))[0].data) for i in range(0, 30, size)])
        assert relative_error(outputs, layer(Tensor(place(x)))[0].data) < 1e-13


def test_routing_output_and_gradients_are_the_same_bits_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.shrink_tiles(monkeypatch.setattr)
    keys = {**tiny.WIDE["llama"], "num_layers": 1, "vocab_size": 260, "intermediate_size": 72}
    model = LanguageModel(config("f32", **keys), seed=0)
    generator = np.random.default_rng(5)
    tokens, targets = generator.integers(0, 260, (2, 4, 64))
    found = []
    for count in (1, 2, 5):
        routings: list[Routing] = []
        with tiny.threads(count):
            loss = model.loss(tokens, targets, load_balance_alpha=0.1, routings=routings)
            loss.backward()
        bits = {name: p.grad.tobytes() for name, p in model.named_parameters()}
        found.append((loss.item(), routings[0].assigned.tolist(), routings[0].balance.item(), bits))
        model.zero_grad()
    assert found[0] == found[1] == found[2]


# --- edges ------------------------------------------------------------------------------------------------------------


def favouring(layer: MixtureOfExperts, x: np.ndarray[Any, Any], *experts: int) -> np.ndarray[Any, Any]:
    """Make the router send every token to these experts, the first above all. Returns the input, its first channel 1."""
    x = x.copy()
    x[..., 0] = 1
    weight = host(layer.router.gate.weight.data).copy()
    weight[:, 0] = -100
    weight[list(experts), 0] = 100 - np.arange(len(experts))
    assign(layer.router.gate.weight.data, weight)
    return x


@on_both
@pytest.mark.parametrize("k", [1, 2])
def test_experts_that_no_token_chose_receive_zero_gradients_and_the_others_do_all_the_work(k: int) -> None:
    layer = mixture(4, k)
    x = favouring(layer, 0.1 * inputs(9), *([2] if k == 1 else [3, 1]))
    y, routing = layer(Tensor(place(x)))
    wanted, _ = plain_mixture(x, copies(layer), k)
    assert relative_error(y.data, wanted) < 1e-14
    assert routing.assigned.tolist() == ([0, 0, 9, 0] if k == 1 else [0, 9, 0, 9])
    y.backward(place(np.ones(y.shape)))
    for e, assigned in enumerate(routing.assigned):
        for name, p in layer.experts[e].named_parameters():
            # No gradient counts as zero (the trainer adds +0.0 for it).
            given_up = p.grad is None or not np.any(host(p.grad))
            assert given_up == (assigned == 0), f"expert {e} {name}"


@on_both
def test_one_token_is_routed_as_any() -> None:
    layer, x = mixture(), inputs(1, 1)
    y, routing = layer(Tensor(place(x)))
    assert y.shape == (1, 1, SIZES["hidden_size"])
    assert relative_error(y.data[0], plain_mixture(x[0], copies(layer), 2)[0]) < 1e-14
    assert sorted(routing.assigned.tolist()) == [0, 0, 1, 1]


@on_both
def test_a_router_for_one_expert_a_token_learns_from_the_output_alone() -> None:
    layer = mixture(4, 1, shared=False)
    y, _ = layer(Tensor(place(inputs(9))))
    y.backward(place(np.ones(y.shape)))
    assert np.all(np.any(host(layer.router.gate.weight.grad) != 0, axis=1))  # those that were not chosen, too


# --- the balance loss -------------------------------------------------------------------------------------------------


@on_both
@given(experts=st.integers(2, 6), each=st.integers(1, 3))
def test_the_balance_loss_is_1_when_routing_is_even_and_the_number_of_experts_when_it_collapses(
    experts: int, each: int
) -> None:
    """Logits of 1000 and 0 make probabilities of exactly 1 and 0."""
    even, x = router(1000.0 * np.tile(np.eye(experts), (each, 1)), 1)
    # E products of two shares that are rounded, and their sum.
    assert even(x)[2].balance.item() == pytest.approx(1, abs=(experts + 2) * 2.0**-52)
    collapsed, x = router(1000.0 * np.eye(experts)[[experts - 1] * each * experts], 1)
    assert collapsed(x)[2].balance.item() == experts


@on_both
@given(data=st.data())
def test_the_balance_loss_is_experts_times_the_sum_of_share_times_mean_probability(data: st.DataObject) -> None:
    n, experts = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    k = data.draw(st.integers(1, experts))
    logits = np.random.default_rng(data.draw(st.integers(0, 1000))).standard_normal((n, experts))
    found, x = router(logits, k)
    chosen = [choose(row, k) for row in logits]
    shares = [sum(ids.count(e) for ids in chosen) / (n * k) for e in range(experts)]
    means = np.mean([plain_softmax(row) for row in logits], axis=0)
    # Positive terms only: nothing cancels, so each of the some 30 roundings adds at most one unit of 1.1e-16.
    assert found(x)[2].balance.item() == pytest.approx(experts * float(np.dot(shares, means)), rel=1e-14)


@on_both
@pytest.mark.parametrize("k", [1, 2])
def test_the_balance_loss_reaches_the_router_and_no_expert(k: int) -> None:
    layer, x = mixture(4, k), Tensor(place(inputs(9)), requires_grad=True)
    y, routing = layer(x)
    (routing.balance + (y * 0.0).sum()).backward()
    for name, p in layer.named_parameters():
        assert np.any(host(p.grad) != 0) == (name == "router.gate.weight"), name

    def balance(x: Tensor, weight: Tensor) -> Tensor:
        layer.router.gate.weight = weight  # type: ignore[assignment] - a plain tensor will do
        found = layer.router(x)[2]
        assert np.array_equal(found.assigned, routing.assigned)  # otherwise there is no derivative here
        return found.balance

    check_gradients(balance, [host(x.data), host(layer.router.gate.weight.data)], np.random.default_rng(7))


@on_both
def test_micro_batches_weigh_their_own_balance_loss_by_their_share_of_the_steps_tokens() -> None:
    """A micro-batch's loss is its share of the step's tokens times what its loss would be alone, gradients as well."""
    model, alpha = language_model(), 0.5
    tokens, targets = batch(shape=(4, 16))
    total, balances = 0.0, 0.0
    for rows in (slice(0, 1), slice(1, 4)):
        share, routings = tokens[rows].size / tokens.size, list[Routing]()
        part = model.loss(tokens[rows], targets[rows], tokens.size, alpha, routings)
        part.backward()
        gradients = {name: host(p.grad) for name, p in model.named_parameters()}
        model.zero_grad()
        alone = model.loss(tokens[rows], targets[rows], load_balance_alpha=alpha)
        alone.backward()
        # Shares of a quarter and three quarters: a few roundings at different places.
        assert part.item() == pytest.approx(share * alone.item(), rel=1e-14)
        for name, p in model.named_parameters():
            whole = host(p.grad)
            assert np.abs(gradients[name] - share * whole).max() <= 1e-13 * np.abs(whole).max(), name
        model.zero_grad()
        assert len(routings) == 2  # layers, whose mean is taken
        balances += share * sum(routing.balance.item() for routing in routings) / 2
        total += part.item()
    plain = model.loss(tokens, targets).item()
    assert total == pytest.approx(plain + alpha * balances, rel=1e-13)


@on_both
def test_without_alpha_the_loss_is_the_cross_entropy_alone_and_the_router_is_still_watched() -> None:
    model, routings = language_model(), list[Routing]()
    tokens, targets = batch()
    loss = model.loss(tokens, targets, routings=routings).item()
    assert len(routings) == 2
    with no_grad():
        logits = host(model(tokens).data).reshape(-1, SIZES["vocab_size"])
    wanted = -np.mean([np.log(plain_softmax(row))[i] for row, i in zip(logits, targets.reshape(-1), strict=True)])
    assert loss == pytest.approx(float(wanted), rel=1e-14)


# --- what is told of it -----------------------------------------------------------------------------------------------


def routing_of(*assigned: int, balance: float = 1.0) -> Routing:
    return Routing(np.array(assigned), Tensor(np.array(balance)))


def metrics_of(batches: list[list[Routing]]) -> dict[str, Any]:
    return router_metrics(batches, [routing.balance.item() for batch in batches for routing in batch])


def test_router_metrics_add_up_the_batches_of_a_step_layer_by_layer() -> None:
    first = [routing_of(3, 1, 0, 0, balance=1.5), routing_of(0, 4, 0, 0, balance=2.5)]
    second = [routing_of(0, 2, 1, 1, balance=1.0), routing_of(0, 4, 0, 0, balance=2.0)]
    found = metrics_of([first, second])
    assert found["expert_load"] == [[3 / 8, 3 / 8, 1 / 8, 1 / 8], [0, 1, 0, 0]]
    entropy = -2 * (3 / 8 * math.log(3 / 8) + 1 / 8 * math.log(1 / 8)) / math.log(4)
    assert found["expert_entropy"] == pytest.approx([entropy, 0], rel=1e-15)
    assert (found["balance_loss"], found["dropped_tokens"]) == (1.75, 0)


@given(loads=st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any))
def test_expert_loads_sum_to_one_and_entropy_is_1_when_they_are_even_and_0_when_one_has_all(loads: list[int]) -> None:
    found = metrics_of([[routing_of(*loads)]])
    assert math.fsum(found["expert_load"][0]) == pytest.approx(1, rel=1e-15)
    assert -1e-15 <= found["expert_entropy"][0] <= 1 + 1e-15
    E = len(loads)
    even, alone = metrics_of([[routing_of(*[3] * E)]]), metrics_of([[routing_of(7, *[0] * (E - 1))]])
    assert even["expert_entropy"][0] == pytest.approx(1 if E > 1 else 0, rel=1e-14)
    assert alone["expert_entropy"] == [0]


@on_both
def test_a_model_without_routers_has_no_router_metrics() -> None:
    routings: list[Routing] = []
    model = language_model(num_experts=0)
    assert model.loss(*batch(), load_balance_alpha=0.5, routings=routings).item() == model.loss(*batch()).item()
    assert router_metrics([routings, routings], []) == router_metrics([], []) == {}


def test_metrics_of_a_run_tell_of_the_router_and_only_the_training_loss_includes_the_balance_loss(tmp_path: Path) -> None:
    """Two runs that differ in alpha alone, with a learning rate too small to move any weight: they see the same model."""
    lines = {}
    for alpha in (0.0, 0.5):
        run = tiny.make_run(
            tmp_path / str(alpha),
            model={**MOE, "num_layers": 2, "intermediate_size": 6, "dtype": "f64"},
            trainer={"max_steps": 3, "learning_rate": 1e-30, "load_balance_alpha": alpha, "eval_fraction": 0.2}
            | {"eval_interval": 1},
        )
        assert run.train() == 0
        lines[alpha] = run.metrics()
    assert [line["step"] for line in lines[0.5]] == [1, 2, 3, 3]
    for plain, balanced in zip(lines[0.0], lines[0.5], strict=True):
        assert balanced["eval_loss"] == plain["eval_loss"]
        if "final" in balanced:
            continue
        for key in ("expert_load", "expert_entropy", "balance_loss", "dropped_tokens"):
            assert balanced[key] == plain[key]
        assert 1 < balanced["balance_loss"] < 4 and balanced["dropped_tokens"] == 0
        assert [math.fsum(load) for load in balanced["expert_load"]] == pytest.approx([1, 1], rel=1e-15)
        assert len(balanced["expert_entropy"]) == 2 and all(0 < entropy < 1 for entropy in balanced["expert_entropy"])
        # Losses near 6: their difference is off by some units of 6 · 1.1e-16.
        assert balanced["loss"] - plain["loss"] == pytest.approx(0.5 * balanced["balance_loss"], rel=1e-13)


def test_a_run_whose_experts_nothing_balances_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (alpha, told) in enumerate(((0.0, True), (0.01, False))):
        run = tiny.make_run(tmp_path / str(number), MOE, {"max_steps": 1, "load_balance_alpha": alpha})
        assert run.train() == 0
        assert ("load_balance_alpha is 0" in capsys.readouterr().err) is told


# --- any attention with any feed-forward ------------------------------------------------------------------------------


@on_both
@pytest.mark.parametrize("attention", [{}, MLA], ids=["gqa", "mla"])
@pytest.mark.parametrize("feed_forward", [{"num_experts": 0}, MOE], ids=["swiglu", "moe"])
def test_any_attention_trains_with_any_feed_forward(attention: dict[str, int], feed_forward: dict[str, int]) -> None:
    model = language_model(**attention, **feed_forward)
    names = [name for name, _ in model.named_parameters()]
    assert any(".w_dkv." in name for name in names) == bool(attention)
    assert any(".moe.router." in name for name in names) == ("shared_expert_enabled" in feed_forward)
    first = {name: host(p.data).copy() for name, p in model.named_parameters()}
    optimizer, losses = AdamW(model.state_dict(), lr=1e-2, weight_decay=0.0), []
    for _ in range(3):
        loss = model.loss(*batch(), load_balance_alpha=0.1)
        losses.append(loss.item())
        loss.backward()
        if len(losses) == 3:
            break
        for name, p in model.named_parameters():
            assert np.any(host(p.grad) != 0), name
        optimizer.step({name: p.grad for name, p in model.named_parameters()})
        model.zero_grad()
    assert losses[0] > losses[1] > losses[2]  # the same batch again: two steps fit it better
    assert all(np.any(host(p.data) != first[name]) for name, p in model.named_parameters())
