"""Vocabularies taken from the text itself, read once before it is encoded: characters, or byte pairs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from oxidizr_ref.errors import DataError, UsageError
from oxidizr_ref.tokenizer_libraries import JsonTokenizer
from oxidizr_ref.tokenizers import END_OF_TEXT, SPECIAL_TOKENS, CharTokenizer

_FEWEST_IDS = 256 + len(SPECIAL_TOKENS)


def needs_two_readings(name: str, bpe_size: int | None) -> bool:
    """Whether the tokenizer comes from the text itself."""
    return name == "char" or bpe_size is not None


def characters(texts: Iterable[str], has_ends: Callable[[], bool]) -> CharTokenizer:
    """What `CharTokenizer.from_text` makes of all texts together, in the memory of one.

    has_ends: asked when the texts are read, whether there are end-of-text tokens between them.
    """
    found, specials = set[str](), set[str]()
    for text in texts:
        found.update(text)
        specials.update(token for token in SPECIAL_TOKENS if token in text)
    if has_ends():
        found.update(END_OF_TEXT)
        specials.add(END_OF_TEXT)
    return CharTokenizer([*sorted(found), *(token for token in SPECIAL_TOKENS if token in specials)])


def train_bpe(texts: Iterable[str], size: int) -> JsonTokenizer:
    """A byte-level BPE tokenizer of at most ``size`` ids (fewer where the text repeats too little), the same every time.

    Source: Sennrich, Haddow and Birch (2016), arXiv:1508.07909, on bytes (Radford et al., 2019).
    Raises UsageError for a size without room for bytes and special tokens.
    """
    if size < _FEWEST_IDS:
        raise UsageError(f"--train-bpe {size}: bytes and special tokens take {_FEWEST_IDS} ids already; give more")
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise DataError('--train-bpe needs the library tokenizers; pip install "oxidizr-ref[tokenizers]"') from None
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(_without_special_tokens(texts), trainer)
    return JsonTokenizer(core.to_str(pretty=True) + "\n")


def _without_special_tokens(texts: Iterable[str]) -> Iterator[str]:
    special = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    for text in texts:
        yield from special.split(text)
