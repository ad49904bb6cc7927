"""Documents kept apart, and a loss on responses alone: in the data, in every layer, in a whole run."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest
from devices import host
from hypothesis import given, settings
from hypothesis import strategies as st

from oxidizr_ref import no_grad, ops, reference
from oxidizr_ref.checkpoint import load
from oxidizr_ref.config import Config, DataConfig, load_config
from oxidizr_ref.data import Source, TokenStream, Windows, open_data
from oxidizr_ref.data_marks import IGNORED, Marks, marks_of_text
from oxidizr_ref.errors import DataError, TraceError
from oxidizr_ref.layers.documents import Documents
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.prepare.pipeline import PrepareOptions, prepare
from oxidizr_ref.run import RunOptions
from oxidizr_ref.trace.record import record
from oxidizr_ref.trainer import Trainer

RESET = DataConfig(document_boundaries="reset")
RESPONSES = DataConfig(loss_on="responses")

flags = st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=3)


# ---------------------------------------------------------------------------------------------------------------- layout


@given(flags)
def test_every_token_stands_in_one_row_behind_its_own_document_and_nothing_else(rows: list[list[bool]]) -> None:
    begins = np.array(rows)
    documents = Documents(begins)
    number = np.cumsum(begins | (np.arange(7) == 0), axis=None).reshape(-1)  # of each token's document
    laid_out = np.concatenate([places.reshape(-1) for places in documents.rows])
    np.testing.assert_array_equal(laid_out[documents.back], np.arange(begins.size))
    for places in documents.rows:
        assert places.shape[1] in (1, 2, 4, 7)  # powers of two, up to a window
        for row in places:
            assert len(set(number[row])) == 1
            assert (np.diff(row) >= 0).all() and (row[0] == 0 or number[row[0] - 1] != number[row[0]])


def test_padding_less_than_doubles_the_tokens() -> None:
    begins = np.random.default_rng(0).random((4, 500)) < 0.05
    assert sum(places.size for places in Documents(begins).rows) < 2 * begins.size


# ----------------------------------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("architecture", architectures.NAMES)
def test_a_document_in_a_window_is_scored_as_it_is_alone(architecture: str) -> None:
    """Logits to float64 rounding: products of other shapes add in another order."""
    model = architectures.lively_model(architecture)
    tokens, _ = architectures.batch(shape=(2, 13))
    begins = np.zeros((2, 13), dtype=bool)
    begins[0, [0, 4, 5]] = begins[1, 9] = True
    found = model.lm_head(model.hidden(tokens, begins=begins)).data
    for row, start, stop in [(0, 0, 4), (0, 4, 5), (0, 5, 13), (1, 0, 9), (1, 9, 13)]:
        alone = model(tokens[row : row + 1, start:stop]).data[0]
        np.testing.assert_allclose(found[row, start:stop], alone, rtol=0, atol=1e-11 * np.abs(alone).max())


@pytest.mark.parametrize("architecture", architectures.FEW)
def test_gradients_are_the_sums_of_those_of_the_documents_alone(architecture: str) -> None:
    model = architectures.lively_model(architecture)
    tokens, targets = architectures.batch(shape=(1, 12))
    begins = np.zeros((1, 12), dtype=bool)
    begins[0, [0, 5]] = True
    model.loss(tokens, targets, 12, begins=begins).backward()
    whole = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    for part in (slice(0, 5), slice(5, 12)):
        model.loss(tokens[:, part], targets[:, part], 12).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and whole[name] is not None
        np.testing.assert_allclose(whole[name], p.grad, rtol=0, atol=1e-11 * np.abs(p.grad).max(), err_msg=name)


def test_a_change_in_one_document_changes_nothing_in_the_next_one() -> None:
    model = architectures.lively_model("hybrid")
    tokens, _ = architectures.batch(shape=(1, 12))
    begins = np.zeros((1, 12), dtype=bool)
    begins[0, 6] = True
    before = model.hidden(tokens, begins=begins).data[0, 6:]
    tokens[0, 2] += 1
    np.testing.assert_array_equal(model.hidden(tokens, begins=begins).data[0, 6:], before)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("architecture", architectures.FEW)
def test_documents_apart_and_ignored_targets_are_the_same_on_both_devices(architecture: str) -> None:
    """The loss in nats and every gradient, against the same on the plain side; fused and composed add in another order."""
    model = architectures.lively_model(architecture)
    tokens, targets = architectures.batch(shape=(2, 9))
    begins = np.zeros((2, 9), dtype=bool)
    begins[0, 3] = begins[1, [1, 7]] = True
    targets = np.where(np.arange(9) % 3, targets, IGNORED)
    found: list[dict[str, Any]] = []
    for side in (nullcontext(), reference()):
        with side:
            model.zero_grad()
            loss = model.loss(tokens, targets, load_balance_alpha=0.1, begins=begins)
            loss.backward()
        found.append({"loss": host(loss.data), **{name: host(p.grad) for name, p in model.named_parameters()}})
    for name, array in found[0].items():
        np.testing.assert_allclose(array, found[1][name], rtol=0, atol=1e-10 * (np.abs(array).max() + 1e-30), err_msg=name)


@pytest.mark.parametrize("architecture", ["llama", "moe"])
def test_an_ignored_target_adds_nothing_to_loss_and_gradients(architecture: str) -> None:
    model = architectures.lively_model(architecture)
    tokens, targets = architectures.batch(shape=(2, 6))
    some = np.where(np.arange(6) % 2, targets, IGNORED)
    model.loss(tokens, some, load_balance_alpha=0.0).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    log_probs = model(tokens)
    log_probs = log_probs - log_probs.data.max()
    chosen = ops.take_along(ops.log_softmax(log_probs, axis=-1), ids=np.maximum(some, 0)[..., None])
    mask = ops.as_tensor((some >= 0)[..., None].astype(np.float64), like=chosen)
    loss = -((chosen * mask).sum()) * (1 / 6)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        np.testing.assert_allclose(found[name], p.grad, rtol=0, atol=1e-11 * (np.abs(p.grad).max() + 1e-30), err_msg=name)


def test_the_balance_loss_of_a_micro_batch_counts_as_much_as_its_learned_targets() -> None:
    model = architectures.lively_model("moe")
    tokens, targets = architectures.batch(shape=(1, 8))
    some = np.where(np.arange(8) < 2, targets, IGNORED)
    plain = model.loss(tokens, some, 10).item()
    routings: list[Any] = []
    balanced = model.loss(tokens, some, 10, load_balance_alpha=0.5, routings=routings).item()
    expected = 0.5 * 2 / 10 * sum(routing.balance.item() for routing in routings) / len(routings)
    assert balanced - plain == pytest.approx(expected, rel=1e-12)


def test_a_batch_without_any_target_has_loss_zero_and_zero_gradients() -> None:
    model = architectures.lively_model("hybrid")
    tokens, targets = architectures.batch(shape=(1, 5))
    loss = model.loss(tokens, np.full_like(targets, IGNORED))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or not p.grad.any() for _, p in model.named_parameters())


# ------------------------------------------------------------------------------------------------------------------ data


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.data())
def test_marks_of_any_stretch_are_those_of_the_whole(gaps: list[int], data: st.DataObject) -> None:
    ends = np.cumsum(np.array(gaps) + 1)
    spans = ends[: ends.size // 2 * 2].reshape(-1, 2).astype(np.uint64)
    size = int(ends[-1]) + 3
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    learned = np.zeros(size, dtype=bool)
    for begin, end in spans.tolist():
        learned[begin:end] = True
    begins = np.zeros(size, dtype=bool)
    begins[ends] = True
    marks = Marks("x", lambda: ends.astype(np.uint64), lambda: spans)
    np.testing.assert_array_equal(marks.learned(start, stop), learned[start:stop])
    np.testing.assert_array_equal(marks.begins(start, stop), begins[start:stop])


def test_a_text_s_documents_begin_at_the_end_of_text_tokens_between_them() -> None:
    tokens = np.array([5, 6, 9, 7, 9, 8, 9], dtype=np.uint32)
    assert marks_of_text("x", tokens, 9).begins(0, 7).nonzero()[0].tolist() == [0, 2, 4]
    assert marks_of_text("x", tokens, None).begins(0, 7).nonzero()[0].tolist() == [0]


def windows_of(use: DataConfig) -> Windows:
    first = Source(
        "a", np.arange(20, dtype=np.uint32), Marks("a", lambda: _u64(0, 7), lambda: _u64(2, 5, 8, 9).reshape(-1, 2))
    )
    second = Source("b", np.arange(20, 40, dtype=np.uint32), Marks("b", lambda: _u64(0), lambda: _u64(0, 20).reshape(-1, 2)))
    return Windows(TokenStream([first, second]), 6, shuffle=False, use=use)


def _u64(*numbers: int) -> Any:
    return np.array(numbers, dtype=np.uint64)


def test_batches_say_where_documents_begin_across_sources() -> None:
    tokens, targets, begins = windows_of(RESET).batch(0, 6)
    assert begins is not None and (targets == tokens + 1).all()
    assert tokens[begins].tolist() == [0, 7, 20]
    assert windows_of(DataConfig()).batch(0, 6).begins is None


def test_targets_outside_responses_are_ignored() -> None:
    tokens, targets, begins = windows_of(RESPONSES).batch(0, 6)
    assert begins is None
    learned = targets[targets != IGNORED]
    assert learned.tolist() == [2, 3, 4, 8, *range(20, 37)]
    assert (targets == np.where(targets == IGNORED, IGNORED, tokens + 1)).all()


@pytest.mark.parametrize(("key", "value"), [("loss_on", "responses"), ("document_boundaries", "reset")])
def test_a_bare_bin_trains_as_before_and_says_what_it_lacks_for_more(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "x.bin"
    np.arange(200, dtype="<u4").tofile(path)
    config = load_config("tiny-llama", [f"data.path={path}"])
    assert open_data(config).windows.batch(0, 1).begins is None
    with pytest.raises(DataError, match="oxidizr-ref prepare"):
        open_data(load_config("tiny-llama", [f"data.path={path}", f"data.{key}={value}"]))


# ------------------------------------------------------------------------------------------------------------- whole runs


def run_config(directory: Path, *settings: str) -> Config:
    text = directory / "chat.txt"
    text.write_text("<|user|>one?<|assistant|>two.<|endoftext|>" * 40 + "a longer document, of its own" * 8, "utf-8")
    return load_config(
        "tiny-hybrid",
        [f"data.path={text}", f"checkpoint_dir={directory / 'run'}", "max_steps=4", "target_device=cpu", *settings],
    )


def test_a_run_with_documents_apart_resumes_to_the_same_bytes_and_says_in_its_files_what_it_was(tmp_path: Path) -> None:
    config = run_config(tmp_path, "data.document_boundaries=reset", "save_interval=2")
    trainer = Trainer(config, LanguageModel(config.model, 0))
    trainer.fit()
    whole = (tmp_path / "run" / "step_4.safetensors").read_bytes()
    (tmp_path / "run" / "step_4.safetensors").unlink()
    told: list[str] = []
    again = Trainer(config, LanguageModel(config.model, 0), options=RunOptions(resume="auto"))
    again.reporter.notice = told.append  # type: ignore[method-assign]
    again.fit()
    assert any(line.endswith("at step 2") for line in told)
    assert again.step == 4
    assert (tmp_path / "run" / "step_4.safetensors").read_bytes() == whole
    stored = load(tmp_path / "run" / "step_4.safetensors").metadata
    assert '"document_boundaries":"reset"' in stored["config"] and '"documents":' in stored["data"]


def prepared(directory: Path) -> Path:
    """A few conversations as tokens, with all that is known of them."""
    chats = [f'{{"prompt": "{"q" * (n % 7 + 1)}?", "response": "{"a" * (n % 5 + 1)}."}}\n' for n in range(60)]
    (directory / "chat.jsonl").write_text("".join(chats), "utf-8")
    path = directory / "chat.bin"
    prepare(PrepareOptions([str(directory / "chat.jsonl")], path))
    return path


def first_loss(directory: Path, path: Path, *settings: str) -> float:
    config = load_config("tiny-hybrid", [f"data.path={path}", f"checkpoint_dir={directory / 'run'}", *settings])
    trainer = Trainer(config, LanguageModel(config.model, 0))
    return float(trainer.train_step(trainer.batches())["loss"])


def test_what_is_marked_changes_the_numbers_only_when_it_is_asked_for(tmp_path: Path) -> None:
    path = prepared(tmp_path)
    (tmp_path / "bare.bin").write_bytes(path.read_bytes())
    plain = first_loss(tmp_path, path)
    assert plain == first_loss(tmp_path, tmp_path / "bare.bin")
    other = [first_loss(tmp_path, path, f"data.{key}") for key in ("document_boundaries=reset", "loss_on=responses")]
    assert len({plain, *other}) == 3


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_on_responses_is_the_mean_over_their_tokens(tmp_path: Path, accumulation: int) -> None:
    settings = ["data.loss_on=responses", "trainer.load_balance_alpha=0", f"trainer.gradient_accumulation={accumulation}"]
    config = load_config("tiny-hybrid", [f"data.path={prepared(tmp_path)}", "model.dtype=f64", *settings])
    trainer = Trainer(config, LanguageModel(config.model, 0))
    size = config.trainer.batch_size
    tokens, targets = (
        np.concatenate(parts)
        for parts in zip(*(trainer.windows.batch(size * i, size)[:2] for i in range(accumulation)), strict=True)
    )
    with no_grad():
        logits = host(trainer.model(tokens).data)
    rows = logits[targets != IGNORED]
    expected = np.mean(np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(rows)), targets[targets != IGNORED]])
    assert 0 < len(rows) < targets.size
    assert trainer.train_step(trainer.batches())["loss"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("which", ["chat.bin", "chat.documents.u64", "chat.responses.u64"])
def test_files_that_were_changed_after_they_were_prepared_are_refused(tmp_path: Path, which: str) -> None:
    path = prepared(tmp_path)
    octets = bytearray((tmp_path / which).read_bytes())
    at = 8 if which == "chat.documents.u64" else 0
    octets[at] += 1
    (tmp_path / which).write_bytes(octets)
    keys = ["data.document_boundaries=reset", "data.loss_on=responses"]
    with pytest.raises(DataError, match="oxidizr-ref prepare"):
        open_data(load_config("tiny-hybrid", [f"data.path={path}", *keys]))


def test_data_without_a_response_to_learn_is_refused(tmp_path: Path) -> None:
    path = prepared(tmp_path)
    for part, keys in [("held-out part", ["eval_fraction=0.2"]), ("training part", [])]:
        (tmp_path / "chat.responses.u64").write_bytes(np.array([1, 2] if keys else [], dtype="<u8").tobytes())
        (tmp_path / "chat.meta.json").unlink(missing_ok=True)
        with pytest.raises(DataError, match=f"the {part} has no response to learn"):
            open_data(load_config("tiny-hybrid", [f"data.path={path}", "data.loss_on=responses", *keys]))


def test_files_of_which_only_some_tell_their_tokenizer_are_not_mixed(tmp_path: Path) -> None:
    path = prepared(tmp_path)
    (tmp_path / "bare.bin").write_bytes(path.read_bytes())
    with pytest.raises(DataError, match="known of one of them only"):
        open_data(load_config("tiny-hybrid", [f"data.path=[{path}, {tmp_path / 'bare.bin'}]"]))


def test_resuming_with_other_marks_names_the_key(tmp_path: Path) -> None:
    settings = ["save_interval=2", f"data.path={prepared(tmp_path)}", f"checkpoint_dir={tmp_path / 'run'}"]
    config = load_config("tiny-hybrid", [*settings, "max_steps=2"])
    Trainer(config, LanguageModel(config.model, 0)).fit()
    config = load_config("tiny-hybrid", [*settings, "max_steps=3", "data.document_boundaries=reset"])
    told: list[str] = []
    trainer = Trainer(config, LanguageModel(config.model, 0), options=RunOptions(resume="auto"))
    trainer.reporter.notice = told.append  # type: ignore[method-assign]
    trainer.fit()
    assert any(line.startswith("config changed at step 2: data.document_boundaries ignore → reset") for line in told)


def test_keys_that_old_files_lack_mean_what_these_did() -> None:
    for experts in (1, 2):
        config = load_config("tiny-mla-moe", [f"experts_per_tok={experts}"])
        canonical = config.canonical()
        assert not {"norm_topk_prob", "mla_q_rope_from"} & canonical["model"].keys()
        assert Config.from_canonical(canonical).model.norm_topk_prob is (experts > 1)
        other = load_config("tiny-mla-moe", [f"experts_per_tok={experts}", f"norm_topk_prob={str(experts == 1).lower()}"])
        assert other.canonical()["model"]["norm_topk_prob"] is (experts == 1)


def test_traces_refuse_what_they_could_not_show(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="document_boundaries"):
        record(run_config(tmp_path, "data.document_boundaries=reset"), tmp_path / "t")
