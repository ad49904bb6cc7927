"""From one's own text to a published model, and back: every command as a user types it, each in a process of its own.

Text and conversations are prepared, trained on, generated from, evaluated, packed, pushed over HTTP to a stand-in of the
hub, downloaded by the hub's own client into another directory, and generate the same text there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

pytest.importorskip("huggingface_hub", reason="needs the extra 'hub'")
from hub_stand_in import WRITER, hub

SENTENCES = ["The moon goes round the earth.", "Água é vida. 水", "A clock shows the time.", "Bees make honey. 🐝"]
QUESTIONS = [("What does a bee make?", "Honey."), ("What is two and two?", "Four."), ("Who are you?", "A model.")]


class Shell:
    """A user in a directory."""

    def __init__(self, directory: Path, **environment: str) -> None:
        directory.mkdir()
        self.directory, self.environment = directory, environment

    def __call__(self, *argv: Any, code: int = 0) -> str:
        """What a command prints on stdout."""
        done = subprocess.run(
            [sys.executable, "-m", "oxidizr_ref", *map(str, argv)],
            cwd=self.directory,
            env=tiny.environment(**self.environment),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, done.stderr
        return done.stdout

    def json(self, *argv: Any) -> Any:
        return json.loads(self(*argv, "--json"))


def write_corpus(directory: Path) -> None:
    """A text of several documents, and conversations."""
    (directory / "text").mkdir()
    for number, sentence in enumerate(SENTENCES):
        (directory / "text" / f"{number}.txt").write_text((sentence + "\n") * 60, "utf-8")
    chats = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in QUESTIONS * 30]
    (directory / "text" / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats), "utf-8")


def settings(vocab_size: int) -> list[str]:
    """Room for the vocabulary, documents kept apart, answers learned alone, a part held out."""
    keys = [
        f"model.vocab_size={vocab_size}",
        "data.loss_on=responses",
        "data.document_boundaries=reset",
        "eval_fraction=0.1",
    ]
    return [word for key in keys for word in ("--set", key)]


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [
        ("tiny-hybrid", ["--tokenizer", "byte"]),
        pytest.param("tiny-llama", ["--train-bpe", "300"], marks=pytest.mark.thorough),
        pytest.param("tiny-mamba2", ["--tokenizer", "char"], marks=pytest.mark.long),
    ],
)
def test_from_text_to_a_published_model_and_back(name: str, tokenizer: list[str], tmp_path: Path) -> None:
    if "--train-bpe" in tokenizer:
        pytest.importorskip("tokenizers", reason="needs the extra 'tokenizers'")
    with hub() as server:
        author = Shell(tmp_path / "author", **server.environment(tmp_path / "home", WRITER))
        write_corpus(author.directory)

        prepared = author.json("prepare", "text", "-o", "corpus.bin", "--validation", "0.1", *tokenizer)
        tokens = np.fromfile(author.directory / "corpus.bin", dtype="<u4")
        meta = json.loads((author.directory / "corpus.meta.json").read_text())
        assert len(tokens) == meta["tokens"] and prepared

        run = ("--max-steps", 30, "--save-interval", 15, "--checkpoint-dir", "run", "--target-device", "cpu")
        author("train", "-f", name, "-d", "corpus.bin", *run, *settings(meta["vocab_size"]), "--headless")
        assert (author.directory / "run" / "step_30.safetensors").is_file()

        asking = ("--user", "What does a bee make?", "--max-tokens", 24, "--seed", 7)
        said = author.json("generate", "run", *asking)
        assert author.json("generate", "run/step_30.safetensors", *asking) == said

        (result,) = author.json("eval", "run", "-d", "corpus.validation.bin")["models"]
        assert 0 < result["loss"] < np.log(meta["vocab_size"])

        author("pack", "--checkpoint-dir", "run", "-c", "final", "-u", "someone", "-n", "bee", "--license", "mit")
        assert author.json("generate", "hf/someone/bee", *asking) == said
        author("push", "-m", "hf/someone/bee", "--create-repo", "--yes")
        packed = {path.name: path.read_bytes() for path in (author.directory / "hf" / "someone" / "bee").iterdir()}
        published = {path: data for path, data in server.repos["someone/bee"].files().items() if path != ".gitattributes"}
        assert published == packed

        reader = Shell(tmp_path / "reader", **server.environment(tmp_path / "another-home"))
        download = "from huggingface_hub import snapshot_download; snapshot_download('someone/bee', local_dir='bee')"
        subprocess.run(
            [sys.executable, "-c", download],
            cwd=reader.directory,
            env=tiny.environment(**reader.environment),
            check=True,
            timeout=120,
        )
        assert reader.json("generate", "bee", *asking) == said
        (again,) = reader.json("eval", "bee", "-d", author.directory / "corpus.validation.bin")["models"]
        assert again["loss"] == result["loss"]

        going_on = ("--init-from", "bee", "-d", author.directory / "corpus.bin", "--max-steps", 2)
        reader("train", *going_on, "--target-device", "cpu", "--checkpoint-dir", "run")
        assert (reader.directory / "run" / "step_2.safetensors").is_file()
