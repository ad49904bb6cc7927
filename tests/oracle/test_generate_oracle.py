"""Text as transformers writes it: greedily token for token, by their models and ours; settings as their processors act.

Both decode with their caches: theirs from the same files, which they or we wrote. The likeliest token is always ahead of the
next by so much that no rounding decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tiny
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="needs the extra 'oracle'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'oracle'")

from oracle.measuring import TORCH_DTYPES, randomize  # noqa: E402
from oracle.test_convert_oracle import CASES, Case, nothing_narrowed, randomized  # noqa: E402
from oracle.test_pack_oracle import MODELS  # noqa: E402

from oxidizr_ref import generation  # noqa: E402
from oxidizr_ref.generation import generate  # noqa: E402
from oxidizr_ref.interop.opened import open_model  # noqa: E402
from oxidizr_ref.model import LanguageModel  # noqa: E402
from oxidizr_ref.sampling import Sampling, candidates, choose  # noqa: E402

pytestmark = pytest.mark.oracle

COUNT = 200
#: What the likeliest token must be ahead of the next, in units of the largest logit.
AHEAD = {"f64": 1e-7, "f32": 1e-5}


def ours(model: LanguageModel, prompts: Sequence[Sequence[int]], dtype: str, count: int = COUNT) -> list[list[int]]:
    """What our model writes, all prompts side by side."""
    ahead = []

    def noted(logits: NDArray[np.float64], *arguments: Any) -> int:
        best, second = np.partition(logits, -2)[[-1, -2]]
        ahead.append((best - second) / np.abs(logits).max())
        return choose(logits, *arguments)

    with mock.patch.object(generation, "choose", noted):
        found = generate(model, [np.array(prompt) for prompt in prompts], Sampling(count, temperature=0))
    assert len(ahead) == count * len(prompts) and min(ahead) > AHEAD[dtype], "rounding may have decided"
    assert min(len(set(sequence.tokens)) for sequence in found) > 2, "it says always the same"
    return [sequence.tokens for sequence in found]


def theirs(model: Any, prompts: Sequence[Sequence[int]], count: int = COUNT) -> list[list[int]]:
    """What their model writes after prompts of one length, in a batch."""
    ids = torch.tensor(prompts)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    written = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, use_cache=True, max_new_tokens=count, pad_token_id=0
    )
    return [row[len(prompts[0]) :].tolist() for row in written]


PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 7], [6, 6, 6, 6, 6, 6, 6, 6, 6]]


def with_room(case: Case) -> Case:
    """The same model, that attends to all tokens of this test."""
    longer = {"max_position_embeddings": 256} if "max_position_embeddings" in case.arguments else {}
    return case._replace(arguments={**case.arguments, **longer})


def talkative(case: Case, dtype: str) -> Any:
    """A model of theirs that does not say the same for ever, as it does while the embedding of the last token, or biases,
    outweigh what the layers make of the others."""
    model = randomized(case.build().to(TORCH_DTYPES[dtype])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter is model.get_input_embeddings().weight:
                parameter *= 0.1
            elif name.endswith("proj.weight"):
                parameter *= 3
    return model


@pytest.mark.parametrize("name", CASES)
def test_models_that_transformers_made_write_the_same_tokens_in_float64(name: str, tmp_path: Path) -> None:
    """Prompts of several lengths: ours side by side, theirs one by one."""
    case = with_room(CASES[name])
    model = talkative(case, "f64")
    model.save_pretrained(tmp_path, max_shard_size=case.max_shard_size)
    opened = open_model(tmp_path)
    assert opened.config.dtype == "f64"
    found = ours(opened.model(), PROMPTS, "f64")
    with nothing_narrowed(case, model), torch.no_grad():
        for prompt, tokens in zip(PROMPTS, found, strict=True):
            assert theirs(model, [prompt]) == [tokens]


@pytest.mark.parametrize("name", CASES)
def test_batches_of_prompts_are_continued_as_theirs_are_in_float32(name: str, tmp_path: Path) -> None:
    model = talkative(with_room(CASES[name]), "f32")
    model.save_pretrained(tmp_path)
    prompts = np.random.default_rng(0).integers(0, 97, (4, 11)).tolist()
    assert ours(open_model(tmp_path).model(), prompts, "f32") == theirs(model, prompts)


@pytest.mark.parametrize("name", MODELS)
def test_models_that_we_packed_are_continued_by_transformers_with_the_same_tokens(name: str, tmp_path: Path) -> None:
    """And by the command line, up to the token that ends both."""
    keys, tokenizer = MODELS[name]
    keys = {"num_layers": 2, "kv_heads": 2 if "kv_latent_dim" in keys else 1, **keys, "max_seq_len": 256}
    trainer = {"max_steps": 1, "save_interval": 1}
    run = tiny.make_run(tmp_path / "run", keys, trainer, {"tokenizer": tokenizer}, 2000)
    assert run.train() == 0

    def enliven(tensors: dict[str, Any], _: dict[str, str]) -> None:
        model = open_model(run.path(1)).model()
        randomize(model)
        tensors.update(model.state_dict())

    tiny.rewrite(run.path(1), enliven)
    assert tiny.cli("pack", "--checkpoint-dir", run.directory, "-c", "1", "-o", tmp_path / "packed") == 0
    opened = open_model(tmp_path / "packed")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype="auto").eval()
    assert model.config.model_type == name
    end, prompt = model.generation_config.eos_token_id, PROMPTS[0]
    assert end == opened.its_tokenizer().end_of_text
    found = ours(opened.model(), [prompt], "f32")
    assert found == theirs(model, [prompt])

    ends = (opened.ends or {found[0][10]}) if end in found[0] else {found[0][10]}
    (cut,) = generate(opened.model(), [np.array(prompt)], Sampling(COUNT, temperature=0), ends)
    ids = torch.tensor([prompt])
    stopped = model.generate(ids, do_sample=False, max_new_tokens=COUNT, eos_token_id=sorted(ends), pad_token_id=0)
    assert stopped[0, len(prompt) :].tolist() in ([*cut.tokens, end] for end in ends)


# --- settings ---------------------------------------------------------------------------------------------------------


def their_probabilities(scores: NDArray[np.float64], seen: NDArray[np.int64], sampling: Sampling) -> NDArray[np.float64]:
    """What is left of the probabilities after their processors, as `generate` orders them."""
    config = transformers.GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p or None,
        repetition_penalty=sampling.repetition_penalty,
    )
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    )
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    processors = model._get_logits_processor(config, input_ids_seq_length=len(seen), logits_processor=[], device="cpu")
    processed = processors(torch.from_numpy(seen)[None], torch.from_numpy(scores)[None])
    found: NDArray[np.float64] = torch.softmax(processed, dim=-1)[0].numpy()
    return found


def test_the_tokens_kept_and_their_probabilities_are_those_of_transformers() -> None:
    random = np.random.default_rng(0)
    active = dict.fromkeys(("top_k", "top_p", "min_p", "repetition_penalty"), 0)
    for trial in range(300):
        vocabulary = int(random.integers(2, 60))
        scores = random.standard_normal(vocabulary) * random.uniform(0.1, 6)
        seen = random.integers(0, vocabulary, random.integers(1, 20))
        sampling = Sampling(
            temperature=float(random.uniform(0.2, 2.5)),
            top_k=int(random.integers(0, vocabulary + 3)) * int(random.integers(0, 2)),
            top_p=float(random.uniform(0.05, 1)) if random.integers(0, 2) else 1.0,
            min_p=float(random.uniform(0, 0.5)) if random.integers(0, 2) else 0.0,
            repetition_penalty=float(random.uniform(0.5, 2)) if random.integers(0, 2) else 1.0,
        )
        expected = their_probabilities(scores, seen, sampling)
        tokens, weights = candidates(scores, seen, sampling)
        found = np.zeros(vocabulary)
        found[tokens] = weights / weights.sum()
        assert (found > 0).tolist() == (expected > 0).tolist(), trial
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        for name in active:
            whole = candidates(scores, seen, Sampling(**{**vars(sampling), name: getattr(Sampling(top_k=0), name)}))
            active[name] += whole[1].size != weights.size or not np.array_equal(whole[1], weights)
    assert min(active.values()) > 50, f"a setting hardly ever acted: {active}"
