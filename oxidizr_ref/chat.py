"""The layout of conversations, oxidizr's: ``<|system|>…<|user|>…<|assistant|>…``, without anything between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """What one of `ROLES` said."""

    role: str
    content: str


def chat_parts(messages: Sequence[Message]) -> list[tuple[str, bool]]:
    """Prompts and responses in turn: (``<|user|>question<|assistant|>``, False), (``answer``, True), …

    Each is encoded by itself, so that tokens never reach from one into the other.
    """
    parts, prompt = [], ""
    for role, content in messages:
        prompt += f"<|{role}|>"
        if role == "assistant":
            parts += [(prompt, False), (content, True)]
            prompt = ""
        else:
            prompt += content
    return [*parts, (prompt, False)] if prompt else parts


def chat_prompt(messages: Sequence[Message]) -> list[str]:
    """The parts of a conversation to which the assistant is to say something next."""
    return [text for text, _ in chat_parts([*messages, Message("assistant", "")])[:-1]]
