"""The tokenizer of a package: files from which Hugging Face's libraries make the ids that training made.

The built-in tokenizers become a tokenizer.json of their own. Both models split a text and look its pieces up, merging
nothing, so that their ids are those of `ByteTokenizer` and `CharTokenizer` for every text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oxidizr_ref.chat import ROLES
from oxidizr_ref.checkpoint import disk
from oxidizr_ref.errors import DataError
from oxidizr_ref.interop.weight_files import json_text, read_json
from oxidizr_ref.tokenizer_libraries import JSON_NAME, JsonTokenizer
from oxidizr_ref.tokenizers import Tokenizer, tokenizer_from_state

#: The one file that every package has: `Tokenizer.state`, without what another file holds or must not be published.
STATE_FILE = "oxidizr_tokenizer.json"

#: The layout of `chat`, with the end token that `prepare` puts after a conversation.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{% if message['role'] not in {list(ROLES)} %}}"
    f"{{{{ raise_exception('the roles are {', '.join(ROLES)}, not ' + message['role']) }}}}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else eos_token }}"
)
#: Parts of a tokenizer.json that training leaves aside: they would add tokens to a text, or cut it.
_LEFT_ASIDE = ("post_processor", "truncation", "padding")
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def tokenizer_files(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    """JSON by file name: tokenizer.json and tokenizer_config.json, where there can be any, and always `STATE_FILE`.

    Of splintr's tokenizers only name and digest are given: their vocabularies are not ours to publish. max_length: the
    tokens the model was trained to see.
    """
    state = tokenizer.state()
    made = _made_for(tokenizer, state)
    if made is None:
        return {STATE_FILE: state}
    if state.pop("json", None) is not None:
        state["digest"] = hashlib.sha256(json_text(made).encode()).hexdigest()
    return {JSON_NAME: made, "tokenizer_config.json": _tokenizer_config(tokenizer, max_length), STATE_FILE: state}


def tokenizer_in(directory: Path) -> Tokenizer | None:
    """The tokenizer whose files are in a directory: ours, or a tokenizer.json; None where there is neither.

    Raises DataError naming the file that does not hold it.
    """
    own, given = directory / STATE_FILE, directory / JSON_NAME
    if not disk.exists(own):
        return JsonTokenizer.from_file(given) if disk.exists(given) else None
    state = read_json(own)
    try:
        if state.get("name") == JSON_NAME:
            state["json"] = _text_of(given)
        return tokenizer_from_state(state)
    except (DataError, OSError) as error:
        raise DataError(f"{own}: {error}") from None


def _text_of(given: Path) -> str:
    if not disk.exists(given):
        raise DataError(f"there is no {JSON_NAME} beside it; get it from where the model is from")
    try:
        return disk.read(given).decode()
    except UnicodeDecodeError as error:
        what = f"{given.name} is not UTF-8 (byte {error.start})"
        raise DataError(f"{what}; get it anew from where the model is from") from None


def _made_for(tokenizer: Tokenizer, state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The content of tokenizer.json; None where only a name may be published."""
    if tokenizer.name == JSON_NAME:
        given: dict[str, Any] = json.loads(state["json"])
        return {key: None if key in _LEFT_ASIDE else value for key, value in given.items()}
    if tokenizer.name == "byte":
        bytes_by_sign = {sign: octet for octet, sign in enumerate(_signs_of_bytes())}
        model = {"type": "BPE", "vocab": bytes_by_sign, "merges": []}
        return _tokenizer_json(tokenizer, model, splitter=_BYTE_LEVEL, decoder=_BYTE_LEVEL)
    if tokenizer.name == "char":
        characters = {entry: index for index, entry in enumerate(state["vocabulary"]) if len(entry) == 1}
        # No unknown token is in the vocabulary: a strange character is an error there as it is here.
        model = {"type": "WordLevel", "vocab": characters, "unk_token": "(a character outside the vocabulary)"}
        every = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        return _tokenizer_json(tokenizer, model, splitter=every, decoder={"type": "Fuse"})
    return None


def _tokenizer_json(
    tokenizer: Tokenizer, model: dict[str, Any], splitter: dict[str, Any], decoder: dict[str, Any]
) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for token, i in tokenizer.special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": splitter,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _signs_of_bytes() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (Radford et al. 2019, GPT-2).

    Bytes that are printable in Latin-1 stand for themselves, the others for the characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(octet if octet in printable else next(others)) for octet in range(256)]


def _tokenizer_config(tokenizer: Tokenizer, max_length: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.end_of_text is not None:
        config["eos_token"] = tokenizer.decode([tokenizer.end_of_text])
        if all(f"<|{role}|>" in tokenizer.special_tokens for role in ROLES):
            config["chat_template"] = _CHAT_TEMPLATE
    return config
