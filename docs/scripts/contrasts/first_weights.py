"""First weights other than the package's, where a small model would otherwise need many more steps; the same idea for every
kind of model that is compared."""

from __future__ import annotations

import math

import numpy as np

from contrasts.tasks import PARITY_VOCABULARY
from oxidizr_ref import LanguageModel
from oxidizr_ref.layers.attention import GroupedQueryAttention
from oxidizr_ref.layers.mamba1 import Mamba1
from oxidizr_ref.layers.mamba2 import Mamba2
from oxidizr_ref.layers.mamba3 import Mamba3
from oxidizr_ref.model import INIT_STD, AttentionLayer

#: First rates of decay: -A where a token lasts for hundreds of steps.
SLOW, SLOWEST = 0.1, 0.005


def for_memory(model: LanguageModel) -> None:
    """Attention: queries and keys at the scale that keeps a product of theirs near 1, ``1 / sqrt(inputs)``: at the package's
    0.02 all scores of so small a model begin at nearly zero. Mamba1 and Mamba2: a slow decay, so that a token is remembered
    through a string from the start. Mamba3 stays: its decay is a function of the token, with no parameter of its own."""
    for layer in model.layers:
        if isinstance(layer, AttentionLayer):
            assert isinstance(layer.self_attn, GroupedQueryAttention)
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.weight.data *= np.float32(1 / (INIT_STD * math.sqrt(projection.weight.shape[1])))
        elif isinstance(layer.mixer, Mamba1 | Mamba2):
            layer.mixer.A_log.data[...] = math.log(SLOW)


def for_parity(model: LanguageModel) -> None:
    """For a task in which nothing may be forgotten, and one token must turn a state half way round.

    Mamba2 and Mamba3 get the same: embeddings of standard deviation 1, which the layer's output cannot outgrow at once, so
    that the final norm does not hide how large that output is; a time step of softplus(0) = 0.69; a slow decay. Mamba3 reads
    its decay from the token, so all embeddings share a direction, 1 in every channel, and the rows of ``in_proj`` that read
    the decay point against it.
    """
    embeddings, layer = model.embed_tokens.weight.data, model.layers[0]
    assert not isinstance(layer, AttentionLayer) and isinstance(layer.mixer, Mamba2 | Mamba3)
    embeddings *= np.float32(1 / INIT_STD)
    layer.mixer.dt_bias.data[...] = 0.0
    if isinstance(layer.mixer, Mamba2):
        layer.mixer.A_log.data[...] = math.log(SLOWEST)
        return
    embeddings += np.float32(1.0)
    channels = layer.norm(model.embed_tokens(np.arange(PARITY_VOCABULARY))).data.sum(axis=1).mean()
    begin = sum(layer.mixer.sizes[:5])  # rows z | x | B | C | dd_dt | dd_A | …
    # -A = 1 / (1 - dd_A) for dd_A < 0; what is added to each row counts once for every channel.
    layer.mixer.in_proj.weight.data[begin : begin + layer.mixer.heads] += np.float32((1 - 1 / SLOWEST) / channels)
