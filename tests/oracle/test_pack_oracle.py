"""Packages in the hands of others: transformers opens them and computes what we do, from the same ids."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from oxidizr_ref.chat import Message, chat_parts, chat_prompt
from oxidizr_ref.interop.opened import Opened, open_model
from oxidizr_ref.tokenizers import ByteTokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

_MAMBA2 = {"mamba2_num_heads": 4, "mamba2_state_size": 8, "mamba2_chunk_size": 8, "mamba2_n_groups": 2}
_DEEPSEEK = {"kv_latent_dim": 12, "d_rope": 4, "mla_latent_norm": True, "rms_norm_eps": 1e-6}
_EXPERTS = {"num_experts": 4, "experts_per_tok": 2}
#: Models that are somebody's in Hugging Face's layout, and the tokenizer each is trained with.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({}, "byte"),
    "mamba": ({"mamba_layers": [0, 1]}, "char"),
    "mamba2": ({"mamba_layers": [0, 1], **_MAMBA2}, "byte"),
    "mixtral": (_EXPERTS, "char"),
    "deepseek_v2": ({**_DEEPSEEK, **_EXPERTS, "norm_topk_prob": False, "shared_expert_enabled": True}, "byte"),
}
TEXTS = ("the cat sat on a mat", "a", "on and on<|endoftext|>it ran")
STRANGE = (
    "héllo, Wörld\r\n\t\0 日本語 𝔘<|user|>hi<|assistant|>",
    "<|endoftext|><|endoftext|>",
    "<|user|",
    "  two  spaces  ",
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of packages ``me/<model>``, each trained a few steps by the command line."""
    root = tmp_path_factory.mktemp("hub")
    for name, (model, tokenizer) in MODELS.items():
        keys = {"num_layers": 2, "kv_heads": 2 if "kv_latent_dim" in model else 1, **model, "name": name}
        trainer = {"max_steps": 8, "save_interval": 8, "eval_fraction": 0.1}
        run = tiny.make_run(root / "runs" / name, keys, trainer, {"tokenizer": tokenizer}, 500)
        if tokenizer == "char":
            run.text.write_text(run.text.read_text() + "<|endoftext|>")
        assert run.train() == 0
        output = root / "me" / name
        assert tiny.cli("pack", "--checkpoint-dir", run.directory, "-c", "final", "-u", "me", "-o", output) == 0
    return root


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest, hub: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model, whose package lies where its name says."""
    monkeypatch.chdir(hub)
    return f"me/{request.param}"


def ours(name: str) -> Opened:
    return open_model(Path(name))


def texts_for(package: Opened) -> tuple[str, ...]:
    return (*TEXTS, *STRANGE) if isinstance(package.tokenizer, ByteTokenizer) else TEXTS


def test_transformers_computes_our_logits(name: str) -> None:
    package = ours(name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(name)
    assert theirs.config.model_type == name.removeprefix("me/")
    assert theirs.generation_config.eos_token_id == package.tokenizer.end_of_text  # type: ignore[union-attr]
    tokens = np.random.default_rng(0).integers(0, 260, (3, 8))
    logits = package.model()(tokens).data
    with torch.no_grad():
        found = theirs(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(found - logits).max() <= 1e-5 * np.abs(logits).max()


def test_transformers_makes_our_ids(name: str) -> None:
    package = ours(name)
    tokenizer, theirs = package.tokenizer, transformers.AutoTokenizer.from_pretrained(name)
    assert tokenizer is not None
    assert theirs.eos_token_id == tokenizer.end_of_text
    for text in texts_for(package):
        ids = tokenizer.encode(text).tolist()
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids) == text


def dicts(messages: list[Message]) -> list[dict[str, str]]:
    return [message._asdict() for message in messages]


def test_conversations_have_our_layout(name: str) -> None:
    package = ours(name)
    theirs = transformers.AutoTokenizer.from_pretrained(name)
    if not isinstance(package.tokenizer, ByteTokenizer):
        assert theirs.chat_template is None
        return
    talk = [Message("system", "Be brief."), Message("user", "Hé?"), Message("assistant", "Yes."), Message("user", "<|x|>")]
    asked = theirs.apply_chat_template(dicts(talk), add_generation_prompt=True, tokenize=False)
    assert asked == "".join(chat_prompt(talk)) == "<|system|>Be brief.<|user|>Hé?<|assistant|>Yes.<|user|><|x|><|assistant|>"
    answered = theirs.apply_chat_template(dicts(talk[:3]), return_dict=False)
    parts = [package.tokenizer.encode(text).tolist() for text, _ in chat_parts(talk[:3])]
    assert answered == [*itertools.chain(*parts), package.tokenizer.end_of_text]
    with pytest.raises(Exception, match="the roles are system, user, assistant, not tool"):
        theirs.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


def test_the_code_on_the_card_runs_as_it_stands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"With transformers:[^`]*```python\n(.*?)```", Path(name, "README.md").read_text(), re.DOTALL)
    assert code is not None
    exec(code[1], {})
    assert len(capsys.readouterr().out) > 1


@pytest.mark.parametrize("flags", [["--dtype", "bf16"], ["--max-shard-size", "20kB"]])
def test_transformers_opens_other_dtypes_and_shards(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = hub / "runs" / "llama" / "checkpoints"
    assert tiny.cli("pack", "--checkpoint-dir", run, "-c", "final", "-u", "me", *flags) == 0
    package, theirs = ours("hf/me/llama"), transformers.AutoModelForCausalLM.from_pretrained("hf/me/llama", dtype="auto")
    embedding = theirs.model.embed_tokens.weight.detach()
    assert embedding.dtype == (torch.bfloat16 if "bf16" in flags else torch.float32)
    np.testing.assert_array_equal(embedding.float().numpy(), np.asarray(package.weights["embed_tokens.weight"], np.float32))


def test_a_package_in_our_own_layout_has_a_tokenizer_for_transformers(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path / "run", {"num_layers": 2, "mamba_layers": [0]}, {"max_steps": 1, "save_interval": 1})
    assert run.train() == 0
    assert tiny.cli("pack", "--checkpoint-dir", run.directory, "-c", "1", "-o", tmp_path / "mixed") == 0
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "mixed")
    assert theirs(STRANGE[0]).input_ids == ByteTokenizer().encode(STRANGE[0]).tolist()
