"""`LanguageModel` against Hugging Face's `LlamaForCausalLM`: the model's own code path, with equal random weights.

"Relative error" is max|a - b| / max|b| per tensor, as everywhere. Adam amplifies float32 noise in near-zero gradients, so
parameters after ten steps are compared in float64 only.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra 'oracle'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'oracle'")

from oxidizr_ref.autograd import no_grad  # noqa: E402
from oxidizr_ref.config import ModelConfig  # noqa: E402
from oxidizr_ref.fused.register import reference  # noqa: E402
from oxidizr_ref.model import LanguageModel  # noqa: E402
from oxidizr_ref.optim import AdamW, clip_factor, decays, global_norm  # noqa: E402

pytestmark = pytest.mark.oracle

STEPS, LR, DECAY = 10, 3e-3, 0.1
# (forward, gradients, losses of ten steps)
BOUNDS = {"f64": (1e-10, 1e-7, 1e-10), "f32": (1e-5, 1e-5, 1e-5)}


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def model_pair(dtype: str, tied: bool = False):
    """Our model and Hugging Face's: GQA 4:2, random weights of a size at which nothing is negligible."""
    config = ModelConfig(
        name="oracle",
        hidden_size=48,
        num_layers=3,
        num_heads=4,
        kv_heads=2,
        intermediate_size=112,
        vocab_size=97,
        max_seq_len=64,
        rope_theta=10000.0,
        dtype=dtype,
        tie_word_embeddings=tied,
    )
    ours = LanguageModel(config, seed=0)
    generator = np.random.default_rng(7)
    for name, p in ours.named_parameters():
        centre = 1.0 if name.endswith("norm.weight") else 0.0
        p.data[...] = centre + generator.standard_normal(p.shape) * 0.15
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=112,
            vocab_size=97,
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
            attn_implementation="sdpa",  # the "eager" one takes its softmax in float32, whatever the dtype
        )
    ).to(torch.float64 if dtype == "f64" else torch.float32)
    if dtype == "f64":
        # Hugging Face keeps the rotation frequencies in float32 whatever the model's dtype; the formula's are meant.
        exact = 10000.0 ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12)
        theirs.model.rotary_emb = Float64Rotary(exact)
    weights = {their_name(name): torch.from_numpy(p.data.copy()) for name, p in ours.named_parameters()}
    if tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    theirs.load_state_dict(weights)
    return ours, theirs


class Float64Rotary(torch.nn.Module):
    """cos and sin in float64 of the same formula; the library's own module computes them in float32."""

    def __init__(self, inverse_frequency):
        super().__init__()
        self.inverse_frequency = inverse_frequency

    def forward(self, x, position_ids):
        angles = position_ids[..., None].to(torch.float64) * self.inverse_frequency
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def float64_norms(theirs) -> None:
    """Hugging Face's RMSNorm computes in float32 whatever comes in; in float64 it must not."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for module in theirs.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = forward.__get__(module)


def their_name(name: str) -> str:
    return name if name == "lm_head.weight" else f"model.{name}"


def batches(count: int):
    generator = np.random.default_rng(3)
    for _ in range(count):
        ids = generator.integers(0, 97, (3, 38))
        yield ids[:, :-1].copy(), ids[:, 1:].copy()


def their_loss(theirs, tokens, targets):
    logits = theirs(torch.from_numpy(tokens)).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten())


@pytest.fixture(params=["f64", "f32"])
def dtype(request):
    return request.param


@pytest.fixture(params=["fused", "reference", "tied"])
def pair(request, dtype):
    ours, theirs = model_pair(dtype, tied=request.param == "tied")
    if dtype == "f64":
        float64_norms(theirs)
    if request.param == "reference":
        with reference():
            yield ours, theirs
    else:
        yield ours, theirs


def test_logits_equal_those_of_hugging_face(pair, dtype):
    ours, theirs = pair
    tokens, _ = next(batches(1))
    with no_grad():
        mine = ours(tokens).data
    assert mine.dtype == (np.float64 if dtype == "f64" else np.float32)
    assert relative_error(mine, theirs(torch.from_numpy(tokens)).logits.detach().numpy()) < BOUNDS[dtype][0]


def test_loss_and_every_gradient_equal_those_of_hugging_face(pair, dtype):
    ours, theirs = pair
    tokens, targets = next(batches(1))
    loss = ours.loss(tokens, targets)
    loss.backward()
    expected = their_loss(theirs, tokens, targets)
    expected.backward()
    assert abs(loss.item() - expected.item()) / expected.item() < BOUNDS[dtype][0]
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        assert relative_error(p.grad, gradients[their_name(name)]) < BOUNDS[dtype][1], name


def test_ten_clipped_adamw_steps_equal_those_of_pytorch(pair, dtype):
    ours, theirs = pair
    optimizer = AdamW(ours.state_dict(), LR, weight_decay=DECAY)
    named = dict(theirs.named_parameters())
    names = {name: named[their_name(name)] for name, _ in ours.named_parameters()}
    groups = [
        {"params": [p for name, p in names.items() if decays(name)], "weight_decay": DECAY},
        {"params": [p for name, p in names.items() if not decays(name)], "weight_decay": 0.0},
    ]
    reference_optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-8)
    clipped = 0
    for tokens, targets in batches(STEPS):
        loss = ours.loss(tokens, targets)
        loss.backward()
        gradients = {name: p.grad for name, p in ours.named_parameters()}
        factor = clip_factor(global_norm(gradients), 1.0)
        clipped += factor < 1
        optimizer.step(gradients, gradient_scale=factor)
        ours.zero_grad()

        expected = their_loss(theirs, tokens, targets)
        reference_optimizer.zero_grad()
        expected.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        reference_optimizer.step()
        assert abs(loss.item() - expected.item()) / expected.item() < BOUNDS[dtype][2]
    assert clipped  # otherwise clipping was not compared
    if dtype == "f64":
        for name, p in ours.named_parameters():
            assert relative_error(p.data, names[name].detach().numpy()) < 1e-10, name
