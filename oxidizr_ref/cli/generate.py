"""``oxidizr-ref generate``: text from a model, as it is drawn; without a prompt, a conversation."""

from __future__ import annotations

import io
import json
import math
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from oxidizr_ref import parallel
from oxidizr_ref.chat import ROLES, Message, chat_prompt
from oxidizr_ref.cli.options import Debug, TargetDevice, Threads, device_for
from oxidizr_ref.cli.words import of, printable
from oxidizr_ref.errors import DataError, OxidizrError, UsageError
from oxidizr_ref.generation import Continuation, Generation
from oxidizr_ref.interop.opened import Opened, open_model
from oxidizr_ref.prepare.inputs import JSONL
from oxidizr_ref.sampling import Sampling
from oxidizr_ref.text_stream import TextStream

_PROMPT, _DRAWING, _OUTPUT = "Prompt", "Drawing", "Output"
_DEFAULT = Sampling()
#: Prompts whose answers are drawn side by side. 256 were 1.7 times as fast (8 M weights), for four times the memory.
_TOGETHER = 64


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
    target_device: TargetDevice = None,
    threads: Threads = None,
    debug: Debug = False,
) -> int:
    """Generate text, streamed as it is drawn. Without a prompt: a conversation, or the text on stdin."""
    del debug  # read by main
    sampling = Sampling(max_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed)
    if threads is not None:
        parallel.set_threads(threads)
    asked = [*_asked(prompt or [], prompts, user, system)]
    conversing = not asked and sys.stdin is not None and sys.stdin.isatty()
    if conversing and as_json:
        raise UsageError("--json needs a prompt: give --prompt, --prompts or --user, or a text on stdin")
    if system is not None and user is None and not conversing:
        raise UsageError("--system begins a conversation: give --user with it, or no prompt at all on a terminal")
    opened = open_model(model)
    for notice in opened.notices:
        print(printable(notice), file=sys.stderr)
    opened.its_tokenizer()  # refuses before the work
    device, takes_all = device_for(target_device), _settle_stdout()
    writer = _Writer(opened, device, sampling, tuple(stop or ()), raw, logprobs)
    if conversing:
        _converse(writer, system, opened.what)
        return 0
    asked = asked or [_text_on_stdin()]
    if as_json:
        for answer in writer.answers(asked):
            print(json.dumps(answer, ensure_ascii=sys.stdout.isatty() or not takes_all), flush=True)
    elif len(asked) > 1:
        for number, answer in enumerate(writer.answers(asked), 1):
            print(f"--- {number}\n{_shown(answer['text'])}", flush=True)
            if answer.get("logprobs"):
                print(f"[{_mean(answer['logprobs'])}]", file=sys.stderr, flush=True)
    else:
        writer.stream(asked[0])
    return 0


def _settle_stdout() -> bool:
    """Have a question mark stand for each sign that stdout's encoding lacks. Returns whether it lacks none: UTF-8."""
    if not isinstance(sys.stdout, io.TextIOWrapper) or sys.stdout.encoding.lower() == "utf-8":
        return True
    sys.stdout.reconfigure(errors="replace")
    return False


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
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # only these end a line: JSON may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path}: cannot be read ({error}); give a file of UTF-8 text") from None
    there = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not there:
        raise UsageError(f"--prompts {path}: holds no prompt; give one a line")
    for number, line in there:
        yield _prompt_of(line, f"--prompts {path}, line {number}") if path.suffix in JSONL else line


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


def _text_on_stdin() -> str:
    try:
        return sys.stdin.read()
    except (AttributeError, UnicodeDecodeError) as error:  # it is closed; or bytes that are no text
        raise UsageError(f"stdin: cannot be read ({error}); give UTF-8 text, or --prompt TEXT") from None


def _mean(log_probs: list[float]) -> str:
    return f"mean log-probability {math.fsum(log_probs) / len(log_probs):.3f} nats"


class _Writer:
    """A model with all that is needed to write with it."""

    def __init__(
        self, opened: Opened, device: str, sampling: Sampling, stops: tuple[str, ...], raw: bool, log_probs: bool
    ) -> None:
        self.tokenizer, self.sampling, self._ends = opened.its_tokenizer(), sampling, opened.ends
        self._model, self._stops, self._log_probs = opened.model(device), stops, log_probs
        self._begin = [] if raw or opened.begin is None else [opened.begin]

    @property
    def chats(self) -> bool:
        """Whether the tokenizer knows the roles of a conversation."""
        return "<|user|>" in self.tokenizer.special_tokens

    def answers(self, asked: list[_Prompt]) -> Iterator[dict[str, Any]]:
        """What each prompt is answered with, in their order. Raises DataError before the first answer."""
        ids = []
        for number, prompt in enumerate(asked, 1):
            try:
                ids.append(self._ids(prompt))
            except DataError as error:
                raise DataError(f"prompt {number}: {error}" if len(asked) > 1 else str(error)) from None
        for first in range(0, len(asked), _TOGETHER):
            yield from self._answers_of(asked[first : first + _TOGETHER], ids[first : first + _TOGETHER], first)

    def _answers_of(self, asked: list[_Prompt], ids: list[NDArray[np.int64]], first: int) -> Iterator[dict[str, Any]]:
        generation = self._generation(asked, ids, self.sampling, first)
        texts = [TextStream(self.tokenizer, self._stops, prompt.tolist()) for prompt in ids]
        while not generation.done:
            for index in generation.step():
                self._push(generation.sequences[index], texts[index])
        for prompt, sequence, text in zip(asked, generation.sequences, texts, strict=True):
            text.close()
            sequence.finish = "stop" if text.stopped else sequence.finish
            shown = prompt if isinstance(prompt, str) else [message._asdict() for message in prompt]
            answer = {"prompt": shown, "text": text.text, "tokens": sequence.tokens, "finish": sequence.finish}
            yield answer | ({"logprobs": sequence.log_probs} if self._log_probs else {})

    def stream(self, prompt: _Prompt, turn: int = 0) -> str:
        """Answer a prompt on stdout, piece by piece. turn: how many answers of a conversation came before. Returns it."""
        sampling = replace(self.sampling, seed=(self.sampling.seed + turn) % 2**64)
        generation = self._generation([prompt], [self._ids(prompt)], sampling)
        (sequence,) = generation.sequences
        text = TextStream(self.tokenizer, self._stops, sequence.prompt.tolist())
        began = time.perf_counter()
        while not generation.done:
            for _ in generation.step():
                print(_shown(self._push(sequence, text)), end="", flush=True)
        print(_shown(text.close()), flush=True)
        finish = "stop" if text.stopped else sequence.finish
        seconds = time.perf_counter() - began
        rate = f"{of(len(sequence.tokens), 'token')} in {seconds:.2f} s ({len(sequence.tokens) / seconds:.0f} a second)"
        if self._log_probs and sequence.log_probs:
            rate += f", {_mean(sequence.log_probs)}"
        print(f"[{rate}, ended by {finish}]", file=sys.stderr, flush=True)
        return text.text

    def _generation(
        self, asked: list[_Prompt], ids: list[NDArray[np.int64]], sampling: Sampling, first: int = 0
    ) -> Generation:
        below = self.tokenizer.vocab_size
        generation = Generation(self._model, ids, sampling, self._ends, below, self._log_probs, first)
        special = self.tokenizer.special_tokens
        roles = {special[f"<|{role}|>"] for role in ROLES if f"<|{role}|>" in special}
        for prompt, sequence in zip(asked, generation.sequences, strict=True):
            if isinstance(prompt, list):  # an answer ends where somebody else begins to speak
                sequence.ends |= roles
        return generation

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
            raise DataError("the prompt is empty, and this model has no token that begins documents; give --prompt TEXT")
        return joined


def _converse(writer: _Writer, system: str | None, what: str) -> None:
    """Ask and answer until the end of the input. Lines are edited as in a shell, where Python has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401 - input() uses it
    way = "Say something" if writer.chats else "Begin a text"
    print(printable(f"{what}. {way}; Ctrl-C stops an answer, /new forgets what was said, Ctrl-D ends."), file=sys.stderr)
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
        except UnicodeDecodeError as error:
            print(f"error: no UTF-8 ({error.reason}); say it again", file=sys.stderr)
            continue
        if line.strip() == "/new":
            messages = list(first)
            continue
        if not line.strip():
            continue
        messages.append(Message("user", line))
        try:
            said = writer.stream(messages if writer.chats else line, turn)
        except (KeyboardInterrupt, OxidizrError) as error:  # as if it had not been asked
            print()
            if isinstance(error, OxidizrError):
                print(f"error: {printable(str(error))}", file=sys.stderr)
            messages.pop()
            continue
        messages.append(Message("assistant", said))
        turn += 1


def _shown(text: str) -> str:
    """What a young model of bytes says may be a command to the terminal."""
    return "".join(c if _is_harmless(c) else "\N{REPLACEMENT CHARACTER}" for c in text) if sys.stdout.isatty() else text


def _is_harmless(c: str) -> bool:
    """Printable, a space of any width, or one of the joiners that Indic and Persian words and some emoji are made with."""
    return c.isprintable() or c in "\n\t\u200c\u200d" or unicodedata.category(c) == "Zs"
