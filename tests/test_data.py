"""Streams, windows and batches: every token where it belongs, the same however it is stored, cut, read ahead or resumed."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from oxidizr_ref import data
from oxidizr_ref.batch_loader import BatchLoader
from oxidizr_ref.data import Source, TokenStream, Windows, bundled_corpus, open_stream
from oxidizr_ref.errors import DataError

THREADED = settings(max_examples=40, deadline=None)  # starting threads on a busy machine takes what it takes


def counting(length: int) -> TokenStream:
    """A stream whose tokens are their own positions."""
    return TokenStream([Source("counting", np.arange(length, dtype=np.uint32))])


def split(tokens: NDArray[np.uint32], cuts: list[int]) -> TokenStream:
    return TokenStream([Source(f"part {i}", part) for i, part in enumerate(np.split(tokens, sorted(cuts)))])


def write_bin(path: Path, tokens: Any) -> Path:
    path.write_bytes(np.asarray(tokens, dtype="<u4").tobytes())
    return path


def opened(*paths: str | Path, tokenizer: str = "byte", vocab_size: int = 260, seed: int = 0) -> TokenStream:
    return open_stream(paths, tokenizer, vocab_size=vocab_size, seed=seed)[0]


# ---------------------------------------------------------------------------------------------------------- the stream


@given(st.integers(0, 40), st.lists(st.integers(0, 40), max_size=6), st.data())
def test_a_split_stream_reads_as_the_whole_one(length: int, cuts: list[int], draw: st.DataObject) -> None:
    tokens = np.arange(length, dtype=np.uint32) * 7
    stream = split(tokens, cuts)
    start = draw.draw(st.integers(0, length))
    stop = draw.draw(st.integers(start, length))
    assert len(stream) == length
    np.testing.assert_array_equal(stream.read(start, stop), tokens[start:stop], strict=True)


def test_reading_within_one_source_copies_nothing() -> None:
    stream = split(np.arange(20, dtype=np.uint32), [10])
    for start, stop, part in ((0, 10, 0), (10, 20, 1), (12, 15, 1)):
        assert np.shares_memory(stream.read(start, stop), stream.sources[part].tokens)
    assert not any(np.shares_memory(stream.read(9, 11), source.tokens) for source in stream.sources)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 11), (5, 4), (11, 11)])
def test_reading_beyond_the_stream_is_refused(start: int, stop: int) -> None:
    with pytest.raises(IndexError):
        counting(10).read(start, stop)


def test_tokens_of_another_dtype_are_refused() -> None:
    with pytest.raises(TypeError, match="must be uint32, not int64"):
        TokenStream([Source("x", np.zeros(3, dtype=np.int64))])


@THREADED
@given(st.integers(1, 60), st.lists(st.integers(0, 60), max_size=5), st.integers(1, 70))
def test_the_digest_is_one_however_the_stream_is_split(length: int, cuts: list[int], chunk: int) -> None:
    tokens = np.arange(length, dtype=np.uint32) * 2654435761
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_CHUNK_TOKENS", chunk)
        assert split(tokens, cuts).facts().digest == split(tokens, []).facts().digest


def test_the_digest_is_sha256_over_the_sha256s_of_chunks_of_4_mib() -> None:
    tokens = np.arange(2 * 2**20 + 5, dtype=np.uint32)
    raw = tokens.astype("<u4").tobytes()
    chunks = [hashlib.sha256(raw[i : i + 4 * 2**20]).digest() for i in range(0, len(raw), 4 * 2**20)]
    assert len(chunks) == 3
    assert split(tokens, [1_000_001]).facts().digest == hashlib.sha256(b"".join(chunks)).hexdigest()


def test_the_digest_changes_with_any_token() -> None:
    tokens = np.arange(50, dtype=np.uint32)
    seen = {split(tokens, []).facts().digest}
    for position in (0, 25, 49):
        changed = tokens.copy()
        changed[position] ^= 1
        seen.add(split(changed, []).facts().digest)
    assert len(seen | {split(tokens[:-1], []).facts().digest}) == 5


def test_a_text_and_the_bin_made_of_it_have_the_same_tokens_and_digest(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes("Zoë said:\r\n<|user|>hi<|endoftext|>".encode())
    from_text = opened(text)
    tokens = from_text.read(0, len(from_text))
    halves = [write_bin(tmp_path / "a.bin", tokens[:9]), write_bin(tmp_path / "b.bin", tokens[9:])]
    assert (
        from_text.facts().digest
        == opened(*halves).facts().digest
        == opened(write_bin(tmp_path / "c.bin", tokens)).facts().digest
    )


def test_several_paths_are_one_stream_in_the_order_given(tmp_path: Path) -> None:
    first, second = tmp_path / "z.txt", write_bin(tmp_path / "a.bin", [1, 2, 3])
    first.write_text("AB")
    assert opened(first, second).read(0, 5).tolist() == [65, 66, 1, 2, 3]
    assert opened(second, first).read(0, 5).tolist() == [1, 2, 3, 65, 66]


def test_the_char_vocabulary_comes_from_all_texts_together(tmp_path: Path) -> None:
    for name, text in (("one", "ba"), ("two", "dc")):
        (tmp_path / name).write_text(text)
    stream, tokenizer = open_stream([tmp_path / "one", tmp_path / "two"], "char", vocab_size=4, seed=0)
    assert tokenizer.vocab_size == 4
    assert stream.read(0, 4).tolist() == [1, 0, 3, 2]


def test_random_tokens_are_a_function_of_the_seed_and_cover_the_vocabulary() -> None:
    stream = opened("random", vocab_size=300, seed=1)
    tokens = stream.read(0, len(stream))
    counts = np.bincount(tokens, minlength=300)
    assert len(stream) == 262_144
    assert counts.size == 300
    # 874 expected of each id, standard deviation 30: six of them is a chance of 1e-6 over all ids
    assert abs(counts - 262_144 / 300).max() < 180
    assert opened("random", vocab_size=300, seed=1).facts().digest == stream.facts().digest
    assert opened("random", vocab_size=300, seed=2).facts().digest != stream.facts().digest


def test_no_path_means_the_bundled_corpus() -> None:
    stream = open_stream([], "byte", vocab_size=260, seed=0)[0]
    assert stream.facts().digest == opened(bundled_corpus()).facts().digest
    assert len(stream) > 10_000


def test_opening_a_bin_does_not_read_it_into_memory(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    path = tmp_path / "sparse.bin"
    with path.open("wb") as file:
        file.truncate(2**30)
    script = (
        "import sys; from oxidizr_ref.data import open_stream, Windows\n"
        "stream, _ = open_stream([sys.argv[1]], 'byte', vocab_size=260, seed=0)\n"
        "windows = Windows(stream, 4096, 0.1)\n"
        "assert not windows.batch(0, 4)[0].any() and len(stream) == 2**28\n"
        # VmHWM, not ru_maxrss: the latter is inherited from the process that started this one.
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    result = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 150 * 1024  # KiB


# ---------------------------------------------------------------------------------------- what is refused, and the line


def refusal(*paths: str | Path, tokenizer: str = "byte") -> str:
    with pytest.raises(DataError) as caught:
        opened(*paths, tokenizer=tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_file_is_named_with_what_is_near_it(tmp_path: Path) -> None:
    (tmp_path / "train.bin").touch()
    (tmp_path / "other").touch()
    (tmp_path / "gone.html").symlink_to("nowhere")
    wrong, nowhere = tmp_path / "trian.bin", tmp_path / "no" / "x.bin"
    assert refusal(wrong) == f"{wrong}: no such file; did you mean train.bin?"
    assert refusal(nowhere) == f"{nowhere}: no such file, and {tmp_path / 'no'} cannot be listed; check the path"
    assert refusal(tmp_path / "zzz").endswith("zzz: no such file; check the path")
    assert refusal(tmp_path / "gone.html").endswith("gone.html: no such file; check the path")


def test_any_other_trouble_with_a_file_is_one_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", failing)
    path = tmp_path / "x.bin"
    assert refusal(path) == f"{path}: cannot be read (Input/output error); check the path and the disk"


def test_a_directory_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: this is a directory; name the files in it, one -d for each"


@pytest.mark.parametrize("name", ["x.txt", "x.bin"])
def test_an_unreadable_file_is_refused(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    path.write_bytes(b"1234")

    def denied(*_: object, **__: object) -> None:  # root may read everything, so a mode of 0 would prove nothing
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert refusal(path) == f"{path}: no permission to read this file; change its mode, or run as its owner"


@pytest.mark.parametrize("name", ["x.txt", "x.bin"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch()
    assert refusal(path).startswith(f"{path}: the file is empty; give a file with")


@pytest.mark.parametrize("size", [1, 2, 3, 4097])
def test_a_bin_that_is_no_whole_number_of_tokens_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(size))
    assert refusal(path).startswith(f"{path}: {size} bytes are no whole number of u32 tokens (4 bytes each)")


def test_text_that_is_no_utf8_is_refused_with_the_byte_offset(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("é".encode() + b"ab\xff")
    assert refusal(path).startswith(f"{path}: the byte 0xff at offset 4 is not UTF-8; save the text as UTF-8")


def test_char_without_text_is_refused(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "x.bin", [1, 2])
    message = refusal(path, "random", tokenizer="char")
    assert message.startswith(f"{path}, random: holds tokens, and the char tokenizer takes its vocabulary from text;")
    assert opened(path, tokenizer="byte").read(0, 2).tolist() == [1, 2]


def test_an_unknown_tokenizer_is_refused_with_those_there_are(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "x.bin", [1, 2])
    assert "there are byte, char, cl100k_base" in refusal(path, tokenizer="llama9")


@given(st.integers(1, 50), st.lists(st.integers(0, 50), max_size=4), st.integers(1, 60), st.data())
def test_a_token_beyond_the_vocabulary_is_named_with_its_position(
    length: int, cuts: list[int], chunk: int, draw: st.DataObject
) -> None:
    tokens = np.full(length, 9, dtype=np.uint32)
    first = draw.draw(st.integers(0, length - 1))
    tokens[first:] = 10
    tokens[first] = 4_000_000_000
    stream = split(tokens, cuts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_CHUNK_TOKENS", chunk)
        stream.check_vocabulary(4_000_000_001)
        with pytest.raises(DataError) as caught:
            stream.check_vocabulary(10)
    part = sum(cut <= first for cut in cuts)
    assert str(caught.value).startswith(
        f"part {part}: token id 4000000000 at position {first} of the stream is not below the vocabulary size 10; "
        "raise model.vocab_size"
    )


# ------------------------------------------------------------------------------------------------- windows and batches

GEOMETRY = {
    "seq_len": st.integers(1, 7),
    "train": st.integers(1, 20),
    "tail": st.integers(0, 6),
    "seed": st.integers(0, 2**63),
}


def windows_of(seq_len: int, train: int, tail: int, seed: int = 0, shuffle: bool = True) -> Windows:
    """``train`` training windows and a ragged tail of tokens."""
    return Windows(counting(train * seq_len + 1 + tail % seq_len), seq_len, 0.0, seed, shuffle)


@given(**GEOMETRY)
def test_every_window_is_seen_exactly_once_an_epoch(seq_len: int, train: int, tail: int, seed: int) -> None:
    windows = windows_of(seq_len, train, tail, seed)
    assert windows.train_windows == train
    for epoch in range(3):
        seen = [windows.window_index(epoch * train + position) for position in range(train)]
        assert sorted(seen) == list(range(train))


@given(**GEOMETRY)
def test_every_token_but_the_first_is_a_target_once_an_epoch(seq_len: int, train: int, tail: int, seed: int) -> None:
    tokens, targets, _ = windows_of(seq_len, train, tail, seed).batch(0, train)
    assert sorted(targets.ravel().tolist()) == list(range(1, train * seq_len + 1))
    np.testing.assert_array_equal(targets, tokens + 1)


@given(cursor=st.integers(0, 200), batch_size=st.integers(1, 9), **GEOMETRY)
def test_a_batch_is_int64_contiguous_and_holds_the_windows_of_its_cursor(
    cursor: int, batch_size: int, seq_len: int, train: int, tail: int, seed: int
) -> None:
    windows = windows_of(seq_len, train, tail, seed)
    tokens, targets, _ = windows.batch(cursor, batch_size)
    for array in (tokens, targets):
        assert array.shape == (batch_size, seq_len)
        assert array.dtype == np.int64
        assert array.flags.c_contiguous
        assert array.flags.owndata
    assert tokens[:, 0].tolist() == [windows.window_index(cursor + i) * seq_len for i in range(batch_size)]


def test_epochs_and_seeds_shuffle_differently_and_no_shuffle_keeps_the_order() -> None:
    def order(epoch: int, **options: Any) -> list[int]:
        windows = windows_of(4, 50, 0, **options)
        return [windows.window_index(epoch * 50 + i) for i in range(50)]

    assert order(0) != order(1)
    assert order(0) != order(0, seed=1)
    assert order(0) == order(0)
    assert order(3, shuffle=False) == list(range(50))


@given(st.integers(2, 300), st.floats(0.0, 0.9), st.integers(1, 8))
def test_the_held_out_part_is_the_last_fraction_and_never_trained_on(total: int, fraction: float, seq_len: int) -> None:
    held_out = int(total * fraction)
    try:
        windows = Windows(counting(total), seq_len, fraction)
    except DataError:
        assert total - held_out < seq_len + 1 or (fraction > 0 and held_out < seq_len + 1)
        return
    assert windows.train_windows == (total - held_out - 1) // seq_len
    assert int(windows.batch(0, windows.train_windows)[1].max()) < total - held_out
    if fraction:
        assert windows.eval_windows == (held_out - 1) // seq_len
        assert int(windows.eval_batch(0, 1)[0][0, 0]) == total - held_out


def test_held_out_batches_come_in_order_and_the_last_has_what_is_left() -> None:
    windows = Windows(counting(200), 4, 0.2)  # 40 tokens held out: 9 windows
    batches = [windows.eval_batch(i, 4) for i in range(3)]
    assert [batch.tokens.shape for batch in batches] == [(4, 4), (4, 4), (1, 4)]
    np.testing.assert_array_equal(np.concatenate([batch.tokens for batch in batches]).ravel(), np.arange(160, 196))
    np.testing.assert_array_equal(np.concatenate([batch.targets for batch in batches]).ravel(), np.arange(161, 197))
    for index in (-1, 3):
        with pytest.raises(IndexError):
            windows.eval_batch(index, 4)


def test_evaluating_leaves_no_trace_in_the_training_order() -> None:
    windows, untouched = Windows(counting(200), 4, 0.2), Windows(counting(200), 4, 0.2)
    windows.batch(3, 5)
    windows.eval_batch(1, 2)
    np.testing.assert_array_equal(windows.batch(8, 50)[:2], untouched.batch(8, 50)[:2])


def test_the_epoch_is_the_cursor_over_the_windows() -> None:
    windows = windows_of(4, 8, 0)
    assert [windows.epoch(cursor) for cursor in (0, 2, 8, 20)] == [0.0, 0.25, 1.0, 2.5]
    with pytest.raises(IndexError):
        windows.window_index(-1)


def test_data_shorter_than_one_window_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        Windows(counting(8), 8)
    assert str(caught.value) == (
        "counting: the training part has 8 tokens, but one window needs 9 (--seq-len, and 1 for the last target); "
        "use a shorter --seq-len or more data"
    )
    assert Windows(counting(9), 8).train_windows == 1


def test_a_held_out_part_shorter_than_one_window_is_refused() -> None:
    with pytest.raises(DataError, match=r"^counting: the held-out part has 5 tokens, but one window needs 9 .*eval_frac"):
        Windows(counting(100), 8, 0.05)


@pytest.mark.parametrize(("seq_len", "fraction"), [(0, 0.0), (8, 1.0), (8, -0.1), (8, float("nan"))])
def test_windows_that_cannot_be_are_refused(seq_len: int, fraction: float) -> None:
    with pytest.raises(ValueError, match="seq_len"):
        Windows(counting(100), seq_len, fraction)


def test_a_thread_that_cuts_in_anywhere_gets_its_own_epoch_and_disturbs_no_other() -> None:
    windows, alone = windows_of(1, 5, 0), windows_of(1, 5, 0)
    expected = [alone.window_index(cursor) for cursor in range(15)]

    def cut_in(frame: FrameType, *_: object) -> Any:
        """What another thread might do between any two bytecodes of the method that holds the cached order."""
        if frame.f_code is not Windows._order.__code__:
            return None
        frame.f_trace_opcodes = True
        cursor = intruder.randrange(15)
        assert windows.window_index(cursor) == expected[cursor]
        return cut_in

    intruder = random.Random(0)
    tracer = sys.gettrace()
    sys.settrace(cut_in)
    try:
        seen = [[windows.window_index(cursor) for cursor in range(15)] for _ in range(20)]
    finally:
        sys.settrace(tracer)
    assert seen == [expected] * 20
    assert intruder.getstate() != random.Random(0).getstate()  # it did cut in


# ----------------------------------------------------------------------------------------------------------- the loader


@THREADED
@given(cursor=st.integers(0, 60), batch_size=st.integers(1, 5), prefetch=st.integers(1, 4), **GEOMETRY)
def test_prefetch_never_changes_what_is_seen(
    cursor: int, batch_size: int, prefetch: int, seq_len: int, train: int, tail: int, seed: int
) -> None:
    plain = BatchLoader(windows_of(seq_len, train, tail, seed), cursor, batch_size)
    with BatchLoader(windows_of(seq_len, train, tail, seed), cursor, batch_size, prefetch) as ahead:
        for _ in range(8):
            np.testing.assert_array_equal(next(ahead)[:2], next(plain)[:2], strict=True)
            assert ahead.cursor == plain.cursor


@THREADED
@given(skipped=st.integers(0, 9), batch_size=st.integers(1, 5), prefetch=st.sampled_from([0, 3]), **GEOMETRY)
def test_starting_at_a_cursor_equals_skipping_to_it(
    skipped: int, batch_size: int, prefetch: int, seq_len: int, train: int, tail: int, seed: int
) -> None:
    with BatchLoader(windows_of(seq_len, train, tail, seed), 0, batch_size, prefetch) as whole:
        for _ in range(skipped):
            next(whole)
        with BatchLoader(windows_of(seq_len, train, tail, seed), whole.cursor, batch_size, prefetch) as resumed:
            assert resumed.cursor == skipped * batch_size
            for _ in range(4):
                np.testing.assert_array_equal(next(resumed)[:2], next(whole)[:2], strict=True)


class BrokenAt(Windows):
    """Windows whose file goes away at one cursor."""

    def __init__(self, cursor: int) -> None:
        super().__init__(counting(100), 4)
        self.broken_at = cursor

    def batch(self, cursor: int, batch_size: int) -> data.Batch:
        if cursor >= self.broken_at:
            raise DataError(f"broken at {cursor}")
        return super().batch(cursor, batch_size)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_an_error_is_raised_when_its_batch_is_asked_for_and_again_after_that(prefetch: int) -> None:
    with BatchLoader(BrokenAt(6), 0, 2, prefetch) as loader:
        for _ in range(3):
            next(loader)
        for _ in range(2):
            with pytest.raises(DataError, match=r"^broken at 6$"):
                next(loader)
            assert loader.cursor == 6


def wait_until_full(loader: BatchLoader, prefetch: int) -> None:
    deadline = time.monotonic() + 30
    while len(loader._ready) < prefetch and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(loader._ready) == prefetch


@pytest.mark.parametrize("prefetch", [1, 3])
def test_reading_ahead_stops_at_the_queue_and_a_full_queue_closes_at_once(prefetch: int) -> None:
    loader = BatchLoader(windows_of(4, 10, 0), 0, 2, prefetch)
    wait_until_full(loader, prefetch)
    begin = time.monotonic()
    loader.close()
    loader.close()
    assert time.monotonic() - begin < 5.0
    assert not loader._thread.is_alive()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_closed_loader_refuses_to_go_on(prefetch: int) -> None:
    with BatchLoader(windows_of(4, 10, 0), 0, 2, prefetch) as loader:
        assert iter(loader) is loader
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_closing_does_not_wait_for_a_read_that_hangs() -> None:
    release = threading.Event()

    class Hanging(Windows):
        def batch(self, cursor: int, batch_size: int) -> data.Batch:
            release.wait(60)
            return super().batch(cursor, batch_size)

    loader = BatchLoader(Hanging(counting(100), 4), 0, 2, 1)
    begin = time.monotonic()
    loader.close()
    assert time.monotonic() - begin < 5.0
    release.set()
    loader._thread.join(5)
    assert not loader._thread.is_alive()


def test_a_program_that_forgets_to_close_still_ends() -> None:
    script = (
        "import numpy as np; from oxidizr_ref.data import *; from oxidizr_ref.batch_loader import BatchLoader\n"
        "windows = Windows(TokenStream([Source('x', np.arange(100, dtype=np.uint32))]), 4)\n"
        "loader = BatchLoader(windows, 0, 2, 3); next(loader)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(("batch_size", "prefetch"), [(0, 0), (1, -1)])
def test_a_loader_that_cannot_be_is_refused(batch_size: int, prefetch: int) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        BatchLoader(windows_of(4, 10, 0), 0, batch_size, prefetch)
