"""``oxidizr-ref generate``: text from a model, as it is drawn; without a prompt, a conversation."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from oxidizr_ref import parallel
from oxidizr_ref.backend import resolve_device
from oxidizr_ref.chat import ROLES, Message, chat_prompt
from oxidizr_ref.cli.train import Device
from oxidizr_ref.cli.words import of
from oxidizr_ref.errors import UsageError
from oxidizr_ref.generation import Continuation, Generation
from oxidizr_ref.interop.opened import open_model
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.sampling import Sampling
from oxidizr_ref.text_stream import TextStream
from oxidizr_ref.tokenizers import Tokenizer

_PROMPT, _DRAWING, _OUTPUT = "Prompt", "Drawing", "Output"
_DEFAULT = Sampling()


def generate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A step file, a run's directory, or a model's directory.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option("-p", "--prompt", metavar="TEXT", help="What to continue; repeatable.", rich_help_panel=_PROMPT),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Prompts: JSON lines of {"prompt"} or {"messages"}; or text, one a line.',
            rich_help_panel=_PROMPT,
        ),
    ] = None,
    user: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Say this as the user of a chat model.", rich_help_panel=_PROMPT)
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the system says first.", rich_help_panel=_PROMPT)
    ] = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", metavar="", help="Put no token that begins documents before it.", rich_help_panel=_PROMPT),
    ] = False,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens to draw, at most.", rich_help_panel=_DRAWING)
    ] = _DEFAULT.max_tokens,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0: always the likeliest token.", rich_help_panel=_DRAWING)
    ] = _DEFAULT.temperature,
    top_k: Annotated[
        int, typer.Option(metavar="K", help="Draw from the K likeliest; 0: all.", rich_help_panel=_DRAWING)
    ] = _DEFAULT.top_k,
    top_p: Annotated[
        float, typer.Option(metavar="P", help="From the likeliest of this probability.", rich_help_panel=_DRAWING)
    ] = _DEFAULT.top_p,
    min_p: Annotated[
        float, typer.Option(metavar="P", help="From those with this part of the best one's.", rich_help_panel=_DRAWING)
    ] = _DEFAULT.min_p,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="X", help="Above 1: repeat less.", rich_help_panel=_DRAWING)
    ] = _DEFAULT.repetition_penalty,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Equal seeds, equal text.", rich_help_panel=_DRAWING)
    ] = _DEFAULT.seed,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; repeatable.", rich_help_panel=_DRAWING)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", metavar="", help="One JSON object a prompt, on stdout.", rich_help_panel=_OUTPUT)
    ] = False,
    logprobs: Annotated[
        bool,
        typer.Option("--logprobs", metavar="", help="Log-probabilities of the tokens (nats).", rich_help_panel=_OUTPUT),
    ] = False,
    target_device: Annotated[
        Device | None, typer.Option(help="Demand a device. Default: a GPU if there is one.", rich_help_panel=_OUTPUT)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Threads (default: all cores).", rich_help_panel=_OUTPUT)
    ] = None,
    debug: Annotated[
        bool, typer.Option("--debug", metavar="", help="Show tracebacks of errors.", rich_help_panel=_OUTPUT)
    ] = False,
) -> int:
    """Generate text, streamed as it is drawn. Without a prompt: a conversation, or the text on stdin."""
    del debug  # read by main
    sampling = Sampling(max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed)
    if threads is not None:
        parallel.set_threads(threads)
    asked = [*_asked(prompt or [], prompts, user, system)]
    opened = open_model(model)
    for notice in opened.notices:
        print(notice, file=sys.stderr)
    tokenizer = opened.its_tokenizer()
    device = resolve_device(target_device or "gpu", demanded_by="--target-device gpu" if target_device == "gpu" else None)
    begin = [] if raw or opened.begin is None else [opened.begin]
    writer = _Writer(opened.model(device), tokenizer, sampling, tuple(stop or ()), begin, logprobs)
    if not asked and sys.stdin.isatty():
        _converse(writer, system, opened.what)
    elif as_json:
        for answer in writer.answers(asked or [sys.stdin.read()]):
            print(json.dumps(answer, ensure_ascii=False), flush=True)
    elif len(asked) > 1:
        for number, answer in enumerate(writer.answers(asked), 1):
            print(f"--- {number}\n{_shown(answer['text'])}", flush=True)
    else:
        writer.stream(asked[0] if asked else sys.stdin.read())
    return 0


#: A text to continue, or a conversation to answer in.
_Prompt = str | list[Message]


def _asked(texts: list[str], file: Path | None, user: str | None, system: str | None) -> Iterator[_Prompt]:
    """All prompts that were given, in order."""
    if sum((bool(texts), file is not None, user is not None)) > 1:
        raise UsageError("--prompt, --prompts and --user are three ways to ask; give one")
    yield from texts
    if file is not None:
        yield from _prompts_in(file)
    if user is not None:
        yield [*([] if system is None else [Message("system", system)]), Message("user", user)]


def _prompts_in(path: Path) -> Iterator[_Prompt]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path}: cannot be read ({error}); give a file of UTF-8 text") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _prompt_of(line, f"--prompts {path}, line {number}") if path.suffix == ".jsonl" else line


def _prompt_of(line: str, where: str) -> _Prompt:
    try:
        entry = json.loads(line)
        if isinstance(entry.get("prompt"), str):
            return str(entry["prompt"])
        messages = [Message(message["role"], message["content"]) for message in entry["messages"]]
        good = messages and all(m.role in ROLES and isinstance(m.content, str) for m in messages)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise UsageError(f'{where}: expected {{"prompt": TEXT}} or {{"messages": [{{"role", "content"}}]}}')
    return messages


class _Writer:
    """A model with all that is needed to write with it."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        sampling: Sampling,
        stops: tuple[str, ...],
        begin: list[int],
        log_probs: bool,
    ) -> None:
        self.tokenizer, self.sampling = tokenizer, sampling
        self._model, self._stops, self._begin, self._log_probs = model, stops, begin, log_probs

    @property
    def chats(self) -> bool:
        """Whether the tokenizer knows the roles of a conversation."""
        return "<|user|>" in self.tokenizer.special_tokens

    def answers(self, asked: list[_Prompt]) -> Iterator[dict[str, Any]]:
        """What each prompt is answered with, in their order, all drawn side by side."""
        ids = [self._ids(prompt) for prompt in asked]
        generation = self._generation(ids, any(isinstance(prompt, list) for prompt in asked), self.sampling)
        texts = [TextStream(self.tokenizer, self._stops, prompt.tolist()) for prompt in ids]
        while not generation.done:
            for index in generation.step():
                self._push(generation.sequences[index], texts[index])
        for prompt, sequence, text in zip(asked, generation.sequences, texts, strict=True):
            text.close()
            shown = prompt if isinstance(prompt, str) else [message._asdict() for message in prompt]
            answer = {"prompt": shown, "text": text.text, "tokens": sequence.tokens, "finish": sequence.finish}
            yield answer | ({"logprobs": sequence.log_probs} if self._log_probs else {})

    def stream(self, prompt: _Prompt, turn: int = 0) -> str:
        """Answer a prompt on stdout, piece by piece. Ctrl-C ends the answer of a conversation. Returns it."""
        sampling = Sampling(**{**vars(self.sampling), "seed": self.sampling.seed + turn})
        ids = self._ids(prompt)
        generation = self._generation([ids], isinstance(prompt, list), sampling)
        (sequence,), text = generation.sequences, TextStream(self.tokenizer, self._stops, ids.tolist())
        began = time.perf_counter()
        while not generation.done:
            for _ in generation.step():
                print(_shown(self._push(sequence, text)), end="", flush=True)
        print(_shown(text.close()), flush=True)
        seconds = time.perf_counter() - began
        rate = f"{of(len(sequence.tokens), 'token')} in {seconds:.2f} s ({len(sequence.tokens) / seconds:.0f} a second)"
        if self._log_probs and sequence.log_probs:
            mean = math.fsum(sequence.log_probs) / len(sequence.log_probs)
            rate += f", mean log-probability {mean:.3f} nats"
        print(f"[{rate}, ended by {sequence.finish}]", file=sys.stderr, flush=True)
        return text.text

    def _generation(self, ids: list[NDArray[np.int64]], chat: bool, sampling: Sampling) -> Generation:
        special, end = self.tokenizer.special_tokens, self.tokenizer.end_of_text
        ends = [] if end is None else [end]
        if chat:
            ends += [special[f"<|{role}|>"] for role in ROLES if f"<|{role}|>" in special]
        return Generation(self._model, ids, sampling, ends, self.tokenizer.vocab_size)

    def _push(self, sequence: Continuation, text: TextStream) -> str:
        piece = text.push(sequence.tokens[-1])
        if text.stopped:
            sequence.finish = "stop"
        return piece

    def _ids(self, prompt: _Prompt) -> NDArray[np.int64]:
        parts = [prompt] if isinstance(prompt, str) else chat_prompt(prompt)
        ids = [np.array(self._begin, dtype=np.int64), *(self.tokenizer.encode(part).astype(np.int64) for part in parts)]
        joined = np.concatenate(ids)
        if not joined.size:
            raise UsageError("the prompt is empty, and this model has no token that begins documents; give --prompt TEXT")
        return joined


def _converse(writer: _Writer, system: str | None, what: str) -> None:
    """Ask and answer until the end of the input. Lines are edited as in a shell, where Python has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401 - input() uses it
    way = "Say something" if writer.chats else "Begin a text"
    print(f"{what}. {way}; Ctrl-C stops an answer, Ctrl-D ends.", file=sys.stderr)
    first = [] if system is None else [Message("system", system)]
    messages, turn = list(first), 0
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if line.strip() == "/new":
            messages = list(first)
            continue
        if not line.strip():
            continue
        messages.append(Message("user", line))
        try:
            said = writer.stream(messages if writer.chats else line, turn)
        except KeyboardInterrupt:
            print()
            messages.pop()
            continue
        messages.append(Message("assistant", said))
        turn += 1


def _shown(text: str) -> str:
    """What a young model of bytes says may be a command to the terminal."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
