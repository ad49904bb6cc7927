"""Evaluating: the loss that training reports, token by token; ranks, bytes, and whether a difference is one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import architectures
import numpy as np
import pytest

from oxidizr_ref.autograd import no_grad
from oxidizr_ref.cli.main import _run
from oxidizr_ref.config import DataConfig
from oxidizr_ref.data import Source, TokenStream
from oxidizr_ref.data_marks import Marks
from oxidizr_ref.errors import DataError, TrainingError
from oxidizr_ref.evaluation import Scores, difference, joined, mean_loss, scores, text_bytes, whole_windows
from oxidizr_ref.tokenizer_libraries import JsonTokenizer
from oxidizr_ref.tokenizers import ByteTokenizer, get_tokenizer

VOCAB = architectures.VOCAB
RESPONSES, APART = DataConfig(loss_on="responses"), DataConfig(document_boundaries="reset")


def stream_of(count: int, marks: Marks | None = None) -> TokenStream:
    tokens = np.random.default_rng(0).integers(0, VOCAB, count).astype(np.uint32)
    return TokenStream([Source("x", tokens, marks or Marks("x"))])


@pytest.mark.parametrize("count", [2, 5, 6, 7, 11, 12, 29])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_windows_predict_every_token_but_the_first_once_and_in_order(count: int, batch_size: int) -> None:
    stream = stream_of(count)
    batches = [*whole_windows(stream, 5, batch_size)]
    assert np.concatenate([batch.targets.reshape(-1) for batch in batches]).tolist() == stream.read(1, count).tolist()
    assert np.concatenate([batch.tokens.reshape(-1) for batch in batches]).tolist() == stream.read(0, count - 1).tolist()


def test_a_single_token_predicts_nothing_and_is_refused() -> None:
    with pytest.raises(DataError, match="at least two"):
        next(whole_windows(stream_of(1), 5, 1))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("architecture", architectures.FEW)
def test_losses_and_ranks_are_those_of_the_logits(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from devices import host

    monkeypatch.setattr("oxidizr_ref.evaluation._LOGITS", 7 * VOCAB)  # several pieces a batch
    model = architectures.lively_model(architecture)
    stream = stream_of(30)
    found = joined(scores(model, whole_windows(stream, 8, 2), 8))
    assert found.losses.shape == (4, 8) and found.count == 29
    for window, (low, high) in enumerate([(0, 8), (8, 16), (16, 24), (24, 29)]):
        with no_grad():
            logits = host(model(stream.read(low, high)[None].astype(np.int64)).data)[0].astype(np.float64)
        for position in range(high - low):
            row, target = logits[position], int(stream.read(low + position + 1, low + position + 2)[0])
            expected = np.log(np.exp(row - row.max()).sum()) + row.max() - row[target]
            assert found.losses[window, position] == pytest.approx(expected, abs=1e-9)
            assert found.ranks[window, position] == np.flatnonzero(np.argsort(-row, kind="stable") == target)[0]
    assert found.ranks[3, 5:].tolist() == [-1, -1, -1]


@pytest.mark.parametrize("boundaries", ["ignore", "reset"])
@pytest.mark.parametrize("loss_on", ["all", "responses"])
def test_the_mean_is_the_loss_that_training_reports(loss_on: Any, boundaries: Any) -> None:
    use = DataConfig(loss_on=loss_on, document_boundaries=boundaries)
    model = architectures.lively_model("hybrid")
    spans, begins = np.array([[3, 5], [9, 12], [44, 50]], dtype=np.uint64), np.array([0, 6, 46], dtype=np.uint64)
    stream = stream_of(50, Marks("x", lambda: begins, lambda: spans))  # the last window is a short one
    found = joined(scores(model, whole_windows(stream, 8, 3, use), 8))
    assert found.count == (11 if loss_on == "responses" else 49)
    assert found.loss() == pytest.approx(mean_loss(model, whole_windows(stream, 8, 3, use)), rel=1e-10)
    if boundaries == "reset":
        alone = joined(scores(model, whole_windows(stream, 8, 3), 8))
        assert found.losses[5, 7] != alone.losses[5, 7]  # token 48 stands two behind the last begin


def test_only_responses_and_documents_apart_are_as_in_training() -> None:
    model = architectures.lively_model("hybrid")
    spans, begins = np.array([[3, 5], [9, 12]], dtype=np.uint64), np.array([0, 6], dtype=np.uint64)
    stream = stream_of(17, Marks("x", lambda: begins, lambda: spans))
    found = joined(scores(model, whole_windows(stream, 8, 2, RESPONSES), 8))
    assert np.argwhere(found.ranks >= 0).tolist() == [[0, 2], [0, 3], [1, 0], [1, 1], [1, 2]]
    whole = joined(scores(model, whole_windows(stream, 8, 2), 8))
    np.testing.assert_allclose(found.losses[found.ranks >= 0], whole.losses[found.ranks >= 0], rtol=1e-12)
    apart = joined(scores(model, whole_windows(stream, 8, 2, APART), 8))
    alone = joined(scores(model, whole_windows(TokenStream([Source("x", stream.read(6, 9))]), 8, 1), 8))
    np.testing.assert_allclose(apart.losses[0, 6:8], alone.losses[0, :2], atol=1e-10)


def test_accuracy_counts_ranks_and_curves_are_means_by_position() -> None:
    ranks = np.array([[0, 4, 5], [1, 0, -1]])
    losses = np.array([[1.0, 2.0, 3.0], [3.0, 4.0, np.nan]])
    found = Scores(losses, ranks)
    assert (found.count, found.loss(), found.accuracy(1), found.accuracy(5)) == (5, 2.6, 0.4, 0.8)
    assert found.by_position() == [2.0, 3.0, 3.0]
    assert Scores(losses[:, 2:], np.full((2, 1), -1)).by_position() == [None]


def test_bytes_are_those_of_the_predicted_text_without_special_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oxidizr_ref.evaluation._PART", 4)
    tokens = ByteTokenizer().encode("xabc<|endoftext|>def<|user|>g")
    assert text_bytes(TokenStream([Source("x", tokens)]), ByteTokenizer()) == 7
    halves = ByteTokenizer().encode("éaéé")  # the first token is half a character, and parts end in others
    assert text_bytes(TokenStream([Source("x", halves)]), ByteTokenizer()) == 6
    other = get_tokenizer("cl100k_base", None)
    cut = other.encode("x 🦀🦀日本🦀語 text")
    expected = len(other.decode(cut[1:]).encode())
    assert text_bytes(TokenStream([Source("x", cut)]), other) == expected


def test_white_space_that_a_tokenizer_adds_is_text() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.decoder = tokenizers.decoders.Fuse()
    core.train_from_iterator(["ab"], tokenizers.trainers.BpeTrainer(special_tokens=["<eos>"], show_progress=False))
    core.add_tokens(["    "])  # as GPT-NeoX's does, with which Mambas read
    tokenizer = JsonTokenizer(core.to_str())
    tokens = tokenizer.encode("ab    ab<eos>")
    assert tokens.size == 4 and text_bytes(TokenStream([Source("x", tokens)]), tokenizer) == 6


def test_ranks_of_equal_logits_go_by_their_ids() -> None:
    model = architectures.small_model("llama")
    for _, parameter in model.named_parameters():
        parameter.data[...] = 0
    tokens = np.array([5, 3, 0], dtype=np.uint32)
    found = joined(scores(model, whole_windows(TokenStream([Source("x", tokens)]), 4, 1), 4))
    assert found.ranks[0, :2].tolist() == [3, 0]


def test_broken_weights_are_told() -> None:
    model = architectures.small_model("llama")
    model.norm.weight.data[...] = np.nan
    with pytest.raises(TrainingError, match="not finite"):
        joined(scores(model, whole_windows(stream_of(9), 4, 1), 4))


def test_a_difference_is_certain_when_it_is_one_and_not_when_it_is_noise() -> None:
    drawn = np.random.default_rng(0)
    base = drawn.exponential(2.0, (200, 16))
    ranks = np.zeros(base.shape, dtype=np.int64)
    noise = drawn.normal(0, 0.5, base.shape)
    a, same, worse = (Scores(base + shift, ranks) for shift in (0, noise - noise.mean(), noise + 0.1))
    mean, interval = difference(a, same)
    assert interval is not None and interval[0] < 0 < interval[1] and mean == pytest.approx(0, abs=1e-12)
    mean, interval = difference(a, worse)
    assert interval is not None and interval[1] < 0 and mean == pytest.approx(-0.1, abs=0.05)
    # The interval is as wide as theory says: 2·1.96 standard errors of the mean over windows.
    width = 2 * 1.96 * (noise + 0.1).mean(axis=1).std(ddof=1) / math.sqrt(200)
    assert interval[1] - interval[0] == pytest.approx(width, rel=0.1)
    assert difference(a, worse) == (mean, interval)


def test_many_windows_are_drawn_in_pieces_of_neighbours() -> None:
    """Neighbours that cancel out exactly: drawn together they leave no chance, drawn alone they would."""
    ranks = np.zeros((3000, 2), dtype=np.int64)
    a = Scores(np.repeat(np.tile([0.0, 1.0, 2.0], 1000), 2).reshape(3000, 2), ranks)
    mean, interval = difference(a, Scores(np.zeros((3000, 2)), ranks), samples=50)
    assert mean == 1.0 and interval == pytest.approx((1.0, 1.0), abs=1e-12)


def test_too_little_text_gives_no_interval() -> None:
    ranks = np.zeros((19, 2), dtype=np.int64)
    assert difference(Scores(np.ones((19, 2)), ranks), Scores(np.zeros((19, 2)), ranks)) == (1.0, None)


# ------------------------------------------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    settings = ["--max-steps", "6", "--save-interval", "3", "--checkpoint-dir", str(directory / "run")]
    assert _run(["train", "-f", "tiny-llama", "--target-device", "cpu", *settings]) == 0
    (directory / "held-out.txt").write_text("The moon goes round the earth.<|endoftext|>Água é vida. " * 20, "utf-8")
    return directory


def evaluated(trained: Path, capsys: pytest.CaptureFixture[str], *flags: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert _run(["eval", str(trained / "run"), "-d", str(trained / "held-out.txt"), "--json", *map(str, flags)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_command_tells_loss_perplexity_bits_and_accuracy(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = evaluated(trained, capsys, "--curve")["models"]
    text = (trained / "held-out.txt").read_text("utf-8")
    tokens = ByteTokenizer().encode(text)
    assert result["tokens"] == len(tokens) - 1
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    octets = len(text.replace("<|endoftext|>", "").encode()) - 1
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2) * (len(tokens) - 1) / octets)
    assert 0 <= result["accuracy"] <= result["accuracy_top5"] <= 1
    assert len(result["loss_by_position"]) == 32


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_batch_size_changes_nothing_but_rounding(
    trained: Path, capsys: pytest.CaptureFixture[str], batch_size: int
) -> None:
    whole = evaluated(trained, capsys)["models"][0]["loss"]
    assert evaluated(trained, capsys, "--batch-size", batch_size)["models"][0]["loss"] == pytest.approx(whole, rel=1e-6)


def test_two_models_are_compared_on_the_same_tokens(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(trained, capsys, "--compare", trained / "run" / "step_3.safetensors")
    a, b = found["models"]
    assert found["difference"]["loss"] == pytest.approx(a["loss"] - b["loss"])
    low, high = found["difference"]["interval"]
    assert low < found["difference"]["loss"] < high
    same = evaluated(trained, capsys, "--compare", trained / "run")["difference"]
    assert (same["loss"], same["interval"]) == (0.0, [0.0, 0.0])
    few = evaluated(trained, capsys, "--compare", trained / "run", "--seq-len", 100)["difference"]
    assert few["interval"] is None


def test_tables_are_for_people(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    argv = ["eval", str(trained / "run"), "-d", str(trained / "held-out.txt"), "--curve", "--compare", str(trained / "run")]
    assert _run(argv) == 0
    out = capsys.readouterr().out
    assert "bits per byte" in out and "17 to 32" in out and "no difference is certain" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["eval", "absent", "-d", "x"], "absent: no such file or directory"),
        (["eval", "{run}", "-d", "absent.bin"], "absent.bin: no such file"),
        (["eval", "{run}"], "Missing option"),
        (["eval", "{run}", "-d", "{bin}"], "not below the model's vocabulary"),
    ],
)
def test_what_cannot_be_evaluated_is_told_in_a_line(
    trained: Path, capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    path = trained / "large.bin"
    np.array([99_999, *range(99)], dtype="<u4").tofile(path)  # what is only read, never predicted
    capsys.readouterr()
    code = _run([part.format(run=trained / "run", bin=path) for part in argv])
    err = capsys.readouterr().err
    assert code in (1, 2) and words in err and len(err.strip().splitlines()) == 1


def test_documents_are_kept_apart_where_training_kept_them_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n % 7} and {n % 5}.<|endoftext|>" for n in range(200)), "utf-8")
    flags = ["--target-device", "cpu", "--max-steps", "2", "--checkpoint-dir", str(tmp_path / "run"), "-d", str(text)]
    assert _run(["train", "-f", "tiny-llama", "--set", "data.document_boundaries=reset", *flags]) == 0
    losses = []
    for more in ([], ["--documents-apart"], ["--documents-together"]):
        capsys.readouterr()
        assert _run(["eval", str(tmp_path / "run"), "-d", str(text), "--json", *more]) == 0
        out, err = capsys.readouterr()
        assert ("kept apart, as they were in training" in err) == (not more)
        losses.append(json.loads(out)["models"][0]["loss"])
    assert losses[0] == losses[1] != losses[2]
