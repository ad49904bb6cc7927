"""What a model wrote at each of its checkpoints, with equal random numbers, so that only the weights make the difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from oxidizr_ref.errors import OxidizrError
from oxidizr_ref.generation import generate
from oxidizr_ref.interop.opened import open_model
from oxidizr_ref.report.run_directory import StepFile
from oxidizr_ref.sampling import Sampling

#: How the texts are drawn.
SAMPLING = Sampling(max_tokens=120, temperature=0.8)


@dataclass(frozen=True)
class Written:
    """What a checkpoint wrote; problem: why it could not."""

    step: int
    texts: list[str]
    problem: str | None = None


def samples(files: Sequence[StepFile], count: int) -> list[Written]:
    """``count`` texts of every file, from nothing but the token that begins documents."""
    return [_written(file, count) for file in files] if count else []


def _written(file: StepFile, count: int) -> Written:
    try:
        opened = open_model(file.path)
        tokenizer, vocabulary = opened.its_tokenizer(), opened.config.vocab_size
        begin = opened.begin if opened.begin is not None and opened.begin < vocabulary else 0
        prompts = [np.array([begin])] * count
        drawn = generate(opened.model(), prompts, SAMPLING, opened.ends, min(tokenizer.vocab_size, vocabulary))
        return Written(file.step, [tokenizer.decode(text.tokens) for text in drawn])
    except OxidizrError as error:  # no tokenizer, or weights that compute nothing: the page is good without
        return Written(file.step, [], str(error))
