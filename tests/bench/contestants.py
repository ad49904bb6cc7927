"""Who takes part in the benchmark: oxidizr_ref and its peers, each a class that makes one whole training step at a time.

A step is forward pass, cross-entropy (and balance loss), backward pass, clipping of the global norm, AdamW with decoupled
weight decay, gradients forgotten; in the dtype of the config. `process.py` runs one of them. A contestant is made with its
weights, then `begin` makes what training needs besides. The peers import nothing of oxidizr_ref but its config: neither its
arrays nor what it sets at import is in their processes, and PyTorch and JAX are imported only where they are used.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from oxidizr_ref.config import Config, DataConfig, ModelConfig

Array = np.ndarray[Any, Any]
Gradients = dict[str, Array]

#: AdamW does not pull parameters whose names end so towards zero.
NO_DECAY = ("norm.weight", "bias", "A_log", ".D")


# --- oxidizr_ref ------------------------------------------------------------------------------------------------------


class Ours:
    """oxidizr_ref, by its own `Trainer`."""

    needs: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def suits(config: ModelConfig) -> bool:  # noqa: ARG004
        """Whether it has this model."""
        return True

    @staticmethod
    def use_threads(count: int) -> None:
        """How many threads a step has."""
        from oxidizr_ref import parallel

        parallel.set_threads(count)

    def __init__(self, config: Config, weights: Mapping[str, Array]) -> None:
        from oxidizr_ref.model import LanguageModel

        self.config = config
        self.model = LanguageModel(config.model, config.trainer.seed)
        self.model.load_state_dict(weights)

    def begin(self) -> None:
        """Make what training needs besides the weights."""
        from oxidizr_ref.data import Batch
        from oxidizr_ref.trainer import Trainer

        self.batch = Batch
        self.trainer = Trainer(self.config.model_copy(update={"data": DataConfig(path=("random",))}), self.model)

    def step(self, tokens: Array, targets: Array) -> float:
        """Train on int ``[B,T]``. Returns the loss before."""
        loss: float = self.trainer.train_step(iter([self.batch(tokens, targets)]))["loss"]
        return loss

    def gradients(self, tokens: Array, targets: Array) -> Gradients:
        """Those of the loss by parameter, not clipped; nothing changes."""
        self.model.loss(tokens, targets, load_balance_alpha=self.config.trainer.load_balance_alpha).backward()
        found = {name: p.grad for name, p in self.model.named_parameters()}
        self.model.zero_grad()
        return found

    @staticmethod
    def compiled() -> int:
        """How often something was compiled."""
        return 0

    @staticmethod
    def facts() -> dict[str, Any]:
        """Versions, threads, kernels."""
        from oxidizr_ref import parallel

        blas = parallel.blas_info()[0]
        kernel = " ".join(str(blas.get(key)) for key in ("internal_api", "version", "architecture"))
        return {"numpy": np.__version__, "blas": kernel, "threads": parallel.get_threads()}


# --- PyTorch ----------------------------------------------------------------------------------------------------------


class Eager:
    """The PyTorch twin, eagerly: fused AdamW, clipping of all gradients in one go."""

    needs: ClassVar[tuple[str, ...]] = ("torch",)

    @staticmethod
    def suits(config: ModelConfig) -> bool:
        """Whether it has this model."""
        mimo = bool(config.mamba3_mimo_rank or config.mamba3_use_conv) and "mamba3" in config.layer_kinds
        return not (mimo or config.mla_latent_norm or (config.uses_moe and config.experts_per_tok < 2))

    @staticmethod
    def use_threads(count: int) -> None:
        """How many threads a step has."""
        import torch

        torch.set_num_threads(count)

    def __init__(self, config: Config, weights: Mapping[str, Array]) -> None:
        import torch

        self.trainer, self.alpha = config.trainer, config.trainer.load_balance_alpha
        self.model = self.build(config.model)
        self.named = {self.our_name(name): p for name, p in self.model.named_parameters()}
        if self.named.keys() != weights.keys():
            raise ValueError(f"the models have other parameters: {sorted(self.named.keys() ^ weights.keys())[:3]}")
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(torch.from_numpy(weights[name]))

    def build(self, config: ModelConfig) -> Any:
        """The model, with any weights."""
        from .twins import LanguageModel

        return LanguageModel(config)

    @staticmethod
    def our_name(name: str) -> str:
        """oxidizr_ref's name of a parameter."""
        return name

    def loss(self, tokens: Any, targets: Any) -> Any:
        """The loss of int64 tensors ``[B,T]``."""
        return self.model(tokens, targets, self.alpha)

    def begin(self) -> None:
        """Make what training needs besides the weights."""
        import torch

        t = self.trainer
        kept = [p for name, p in self.named.items() if name.endswith(NO_DECAY)]
        decayed = [p for name, p in self.named.items() if not name.endswith(NO_DECAY)]
        groups = [{"params": decayed, "weight_decay": t.weight_decay}, {"params": kept, "weight_decay": 0.0}]
        self.parameters = decayed + kept
        self.optimizer = torch.optim.AdamW(groups, lr=t.learning_rate, betas=t.betas, eps=t.eps, fused=True)

    def step(self, tokens: Array, targets: Array) -> float:
        """Train on int ``[B,T]``. Returns the loss before."""
        import torch

        loss = self.loss(torch.from_numpy(tokens), torch.from_numpy(targets))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.trainer.max_grad_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    def gradients(self, tokens: Array, targets: Array) -> Gradients:
        """Those of the loss by parameter, not clipped; nothing changes."""
        import torch

        self.loss(torch.from_numpy(tokens), torch.from_numpy(targets)).backward()
        found = {name: p.grad.numpy().copy() for name, p in self.named.items()}
        self.model.zero_grad(set_to_none=True)
        return found

    @staticmethod
    def compiled() -> int:
        """How often something was compiled."""
        return 0

    @staticmethod
    def facts() -> dict[str, Any]:
        """Versions, threads, kernels."""
        import torch

        mkl = re.search(r"Math Kernel Library Version \S+", torch.__config__.show())
        kernels = f"{mkl.group() if mkl else 'no MKL'}, {torch.backends.cpu.get_cpu_capability()}"
        return {"torch": torch.__version__, "kernels": kernels, "threads": torch.get_num_threads()}


class Compiled(Eager):
    """The same under ``torch.compile``, in its default mode."""

    def build(self, config: ModelConfig) -> Any:
        """The model, which compiles itself when it is called first."""
        model = super().build(config)
        model.compile()
        return model

    @staticmethod
    def load_compiler() -> None:
        """What the compiler imports is no memory of a step: let it import."""
        import torch

        torch.compile(lambda x: x + 1)(torch.ones(1))

    @staticmethod
    def compiled() -> int:
        """How often something was compiled."""
        from torch._dynamo.utils import counters

        return int(counters["stats"]["unique_graphs"])


class HuggingFace(Eager):
    """The Mamba or Mamba2 of transformers on its paths of plain PyTorch, with the same optimizer."""

    needs: ClassVar[tuple[str, ...]] = ("torch", "transformers")

    @staticmethod
    def suits(config: ModelConfig) -> bool:
        """Whether it has this model."""
        return set(config.layer_kinds) in ({"mamba1"}, {"mamba2"}) and not config.tie_word_embeddings

    def build(self, config: ModelConfig) -> Any:
        """The library's model of these sizes."""
        from golden import write_mamba1, write_mamba2

        writer = write_mamba2 if config.mamba2_num_heads else write_mamba1
        self.our_name = writer.our_name  # type: ignore[method-assign]
        model = writer.make_model(config.model_dump())
        # A model for the tests, in which nothing of the library's is narrowed to float32.
        return (write_mamba1.in_float64(model) if config.dtype == "f64" else model).train()

    def loss(self, tokens: Any, targets: Any) -> Any:
        """The loss of int64 tensors ``[B,T]``."""
        from torch.nn import functional

        logits = self.model(tokens, use_cache=False).logits
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @staticmethod
    def facts() -> dict[str, Any]:
        """Versions, threads, kernels."""
        import transformers

        return {"transformers": transformers.__version__, **Eager.facts()}


# --- JAX --------------------------------------------------------------------------------------------------------------


class Jax:
    """The Llama in jax.numpy: one jitted function is the whole step, and its state's memory is given back to it."""

    needs: ClassVar[tuple[str, ...]] = ("jax",)

    @staticmethod
    def suits(config: ModelConfig) -> bool:
        """Whether it has this model."""
        return set(config.layer_kinds) == {"attention"} and not (config.uses_mla or config.uses_moe)

    @staticmethod
    def use_threads(count: int) -> None:
        """XLA takes as many threads as the process has cores, which `limit_cores` settled before."""

    def __init__(self, config: Config, weights: Mapping[str, Array]) -> None:
        from . import jax_llama

        self.llama, self.config = jax_llama, config
        self.parameters = jax_llama.place(weights)

    def begin(self) -> None:
        """Make what training needs besides the weights."""
        self.moments = self.llama.zero_moments(self.parameters)
        decays = {name: not name.endswith(NO_DECAY) for name in self.parameters}
        self.train = self.llama.make_step(self.config.model, self.config.trainer, decays)
        self.updates = 0

    def step(self, tokens: Array, targets: Array) -> float:
        """Train on int ``[B,T]``. Returns the loss before."""
        self.updates += 1
        state = self.train(self.parameters, self.moments, float(self.updates), tokens, targets)
        self.parameters, self.moments, loss = self.llama.wait_for(state)
        return float(loss)

    def gradients(self, tokens: Array, targets: Array) -> Gradients:
        """Those of the loss by parameter, not clipped; nothing changes."""
        return self.llama.gradients(self.config.model, self.parameters, tokens, targets)

    @staticmethod
    def compiled() -> int:
        """How often something was compiled."""
        return 0

    @staticmethod
    def facts() -> dict[str, Any]:
        """Versions, threads, kernels."""
        import jax

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return {"jax": jax.__version__, "threads": cores}


CONTESTANTS: dict[str, type[Ours] | type[Eager] | type[Jax]] = {
    "ours": Ours,
    "eager": Eager,
    "compile": Compiled,
    "hf": HuggingFace,
    "jax": Jax,
}
