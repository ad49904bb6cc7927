"""Training: the one file that knows all the parts. A step reads as a sentence:

batch → `model.loss` → `backward` → clip → `optimizer.step` → maybe save.

The run's whole progress is (seed, step, cursor). Everything else in a checkpoint is weights and moments.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from oxidizr_ref import optim, parallel
from oxidizr_ref.backend import STORAGE_DTYPES, Array, compute_dtype, device_of, slot_dtype, xp_of
from oxidizr_ref.batch_loader import BatchLoader
from oxidizr_ref.checkpoint import state
from oxidizr_ref.checkpoint.format import predict_size
from oxidizr_ref.checkpoint.records import Record
from oxidizr_ref.checkpoint.saver import Saver
from oxidizr_ref.checkpoint.state import RunState
from oxidizr_ref.checkpoint.store import CheckpointStore, Found, Retention
from oxidizr_ref.config import Config
from oxidizr_ref.data import Batch, TrainingData, open_data
from oxidizr_ref.data_marks import IGNORED
from oxidizr_ref.errors import SaveError, TrainingError
from oxidizr_ref.evaluation import mean_loss
from oxidizr_ref.fingerprint import fingerprint
from oxidizr_ref.layers.feed_forward import Routing
from oxidizr_ref.loss_scale import LossScale
from oxidizr_ref.memory import out_of_memory
from oxidizr_ref.memory_now import resident_bytes
from oxidizr_ref.model import LanguageModel
from oxidizr_ref.optim import AdamW
from oxidizr_ref.run import FirstWeights, Outcome, Reporter, RunOptions, Witness
from oxidizr_ref.signals import Signals
from oxidizr_ref.step_metrics import StepMetrics, StepNumbers

#: Bytes a second that a disk will surely write: what a time limit reserves for a save before one was measured.
_SLOW_DISK = 100e6


class _Stopped(Exception):  # noqa: N818 - a wish, not an error
    """Raised between micro-batches to discard a partial step."""


class Trainer:
    """Trains ``model``, where it lives, as ``config`` says, on ``data`` (default: what the config names)."""

    def __init__(
        self,
        config: Config,
        model: LanguageModel,
        data: TrainingData | None = None,
        options: RunOptions | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        t = config.trainer
        self.config, self.model = config, model
        self.options, self.reporter, self.witness = options or RunOptions(), reporter or Reporter(), Witness()
        data = data or open_data(config)
        self.tokenizer, self.windows = data.tokenizer, data.windows
        self._data_identity = data.identity
        self._parameters = dict(model.named_parameters())
        self.device = device_of(next(iter(self._parameters.values())).data)
        slots = slot_dtype(STORAGE_DTYPES[config.model.dtype], t.optimizer_dtype)
        self.optimizer = AdamW(model.state_dict(), t.learning_rate, t.betas, t.eps, t.weight_decay, t.seed, slots)
        self.loss_scale = LossScale() if self.device == "gpu" and config.model.dtype == "f16" else None
        self.store = CheckpointStore(Path(t.checkpoint_dir), Retention(t.max_checkpoints, t.keep_every, t.keep_best))
        self.saver = Saver(self.store, background=t.async_save)
        self.windows_a_step = t.batch_size * t.gradient_accumulation
        self.tokens_a_step = self.windows_a_step * config.model.max_seq_len
        epochs_in_steps = t.num_epochs * self.windows.train_windows // self.windows_a_step
        self.total_steps = t.max_steps or max(1, epochs_in_steps)
        self.step, self.cursor, self.lineage = 0, 0, list[dict[str, Any]]()
        self._last_save = 0  # the step of the last save that was begun, or of the file the run goes on from
        self._not_saved: SaveError | None = None  # why the last save that was tried failed
        self._not_logged: SaveError | None = None  # the same of the last metric line
        self._evaluated: tuple[int, float | None] = (-1, None)  # the last evaluation in a run: step, loss
        self.metrics = StepMetrics(self._must_be_finite)
        self._seconds: list[float] = []  # of the steps since the last logged one
        self._longest = {"step": 0.0, "save": 0.0}  # seconds

    # --- one step -----------------------------------------------------------------------------------------------------

    @np.errstate(all="ignore")  # what overflows shows in the loss or the norm, and is told in one line
    def train_step(self, batches: Iterator[Batch], signals: Signals | None = None) -> Record:
        """One optimizer step over ``gradient_accumulation`` micro-batches. Returns the step's metrics.

        On a device they are those of the newest step whose numbers are here, mostly the one before: only a step that is
        logged is waited for. Raises TrainingError before anything is changed when the loss or a gradient is not finite; on a
        device, where such a step changes nothing, when its numbers are here.
        """
        t, n = self.config.trainer, self.step + 1
        losses: parallel.TreeCounter[Array] = parallel.TreeCounter()
        gradients: parallel.TreeCounter[optim.Gradients] = parallel.TreeCounter(optim.add_gradients)
        routed: list[list[Routing]] = []  # of every micro-batch
        micro_batches = [next(batches) for _ in range(t.gradient_accumulation)]
        learned = sum(int(np.count_nonzero(batch.targets != IGNORED)) for batch in micro_batches)
        for micro, (tokens, targets, begins) in enumerate(micro_batches, 1):
            self.witness.batch(n, micro, tokens, targets)
            routed.append([])
            loss = self.model.loss(tokens, targets, max(1, learned), t.load_balance_alpha, routed[-1], begins)
            loss.backward(None if self.loss_scale is None else self.loss_scale.seed())
            routed[-1] = [routing._replace(balance=routing.balance.detach()) for routing in routed[-1]]  # free their graphs
            losses.push(loss.data.astype(np.float64))
            gradients.push(self._take_gradients())
            if signals is not None and signals.stop is not None:
                raise _Stopped
        total, summed = losses.total(), gradients.total()
        norm, lr, scale = optim.global_norm(summed), self.learning_rate(n), self.loss_scale
        if scale is not None:
            norm = norm / scale.scale
        epoch = self.windows.epoch(self.cursor + self.windows_a_step)
        used = None if scale is None else scale.scale.copy()
        self.metrics.add(StepNumbers(n, total, norm, used, lr, epoch, routed))
        self._update(summed, norm, lr)
        self.step = n
        self.cursor += self.windows_a_step
        return self.metrics.look(wait=self._is_logged(n))

    def _update(self, summed: optim.Gradients, norm: float | Array, lr: float) -> None:
        """Clip the gradients, whose norm is given, and update the parameters with them."""
        factor, scale = optim.clip_factor(norm, self.config.trainer.max_grad_norm), self.loss_scale
        self.witness.gradients(summed, norm, factor, lr)
        if scale is None:
            self.optimizer.step(summed, lr, factor)
        else:
            self.optimizer.step(summed, lr, factor / scale.scale, scale.skipped)
            scale.update(norm)
        self.witness.updated(self.optimizer.arrays, self.optimizer.state_dict())

    def _is_logged(self, n: int) -> bool:
        t = self.config.trainer
        evaluated = t.eval_interval and n % t.eval_interval == 0 and self.windows.eval_windows > 0
        return bool(n == 1 or n % t.log_interval == 0 or evaluated)

    def learning_rate(self, n: int) -> float:
        """The learning rate of update ``n`` (counted from 1)."""
        t = self.config.trainer
        return optim.learning_rate(
            n,
            peak=t.learning_rate,
            schedule=t.lr_schedule,
            warmup_steps=t.warmup_steps,
            total_steps=self.total_steps,
            min_lr_ratio=t.min_lr_ratio,
        )

    def _take_gradients(self) -> optim.Gradients:
        """This micro-batch's gradients by name, leaving none behind; a parameter without one counts as zero."""
        taken = {}
        for name, p in self._parameters.items():
            taken[name] = p.grad if p.grad is not None else xp_of(p.data).zeros(p.shape, compute_dtype(p.dtype))
            p.grad = None
        return taken

    def _must_be_finite(self, n: int, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        last = self._last_good()
        advice = "try a lower learning_rate, a longer warmup_steps, a smaller max_grad_norm, or --dtype f32"
        raise TrainingError(f"step {n}: {what} is {value}; this state is not saved, {last}; {advice}")

    def _last_good(self) -> str:
        steps = self.store.steps()
        return f"the last good file is {self.store.path(steps[-1])}" if steps else "no checkpoint was saved before it"

    # --- the run ------------------------------------------------------------------------------------------------------

    def fit(self, signals: Signals | None = None) -> Outcome:
        """Train to the end, from where the options say, saving on the way. Returns how it ended.

        ``signals``: those the caller listens to already; without them this method listens itself. Raises SaveError at the
        end when the last save could not be written, after telling of every failed one on the way.
        """
        began = time.monotonic() if self.options.began is None else self.options.began
        with nullcontext(signals) if signals is not None else Signals() as heard, self.store.claimed():
            try:
                self._start()
                if self.step < self.total_steps:
                    self.reporter.begin(self)
                    self._train(heard, began)
                else:
                    of = f"{self.step} of {self.total_steps} steps are done"
                    self.reporter.notice(f"finished: {of}; a larger --max-steps goes on")
                return self._conclude(heard)
            except MemoryError as error:
                raise out_of_memory(self.config, self.device, error, self._last_good()) from error
            finally:
                self._tell_of_saves(wait=True)

    def _conclude(self, signals: Signals) -> Outcome:
        if self._not_saved is None:
            self.store.end()
            self._tell_of_saves()
        where = "before the first step was done"
        if self.step:
            where = f"after step {self.step}, which is {'saved' if self._not_saved is None else 'not saved'}"
        eval_loss = None
        if signals.stop is not None:
            self.reporter.notice(f"stopped by {signal.Signals(signals.stop).name} {where}")
        elif self.step < self.total_steps:
            self.reporter.notice(f"time limit reached {where}")
        else:
            # The last step is often one of eval_interval's, too.
            eval_loss = self._evaluated[1] if self._evaluated[0] == self.step else self.evaluate()
            if eval_loss is not None:
                self._log({"step": self.step, "eval_loss": eval_loss, "final": True})
        failed = self._not_saved or self._not_logged
        if failed is not None:
            raise failed
        return Outcome(signals.stop, eval_loss)

    def _train(self, signals: Signals, began: float) -> None:
        """Step after step, until the last one, a signal or the time limit; then save what is not saved."""
        with self.batches() as batches:
            while self.step < self.total_steps and signals.stop is None and not self._time_is_up(began):
                started = time.perf_counter()
                try:
                    record = self.train_step(batches, signals)
                except _Stopped:
                    break
                self._seconds.append(time.perf_counter() - started)
                self._after_step(record, signals)
                self._longest["step"] = max(self._longest["step"], time.perf_counter() - started)
                self._tell_of_saves()
        self.metrics.look()
        self._tell_of_saves(wait=True)
        if self.step != self._last_save or self._not_saved is not None:
            self._save()
            self._tell_of_saves(wait=True)

    @np.errstate(all="ignore")
    def evaluate(self) -> float | None:
        """Mean cross-entropy (nats a token) over all held-out windows; None when nothing is held out."""
        count, size = self.windows.eval_windows, self.config.trainer.batch_size
        if count == 0:
            return None
        mean = mean_loss(self.model, (self.windows.eval_batch(index, size) for index in range(-(-count // size))))
        self._must_be_finite(self.step, "the held-out loss", mean)
        return mean

    def _after_step(self, record: Record, signals: Signals) -> None:
        t = self.config.trainer
        if t.eval_interval and self.step % t.eval_interval == 0:
            eval_loss = self.evaluate()
            self._evaluated = self.step, eval_loss
            record |= {} if eval_loss is None else {"eval_loss": eval_loss}
        speed = len(self._seconds) / sum(self._seconds)
        record |= {"it/s": speed, "tokens/s": speed * self.tokens_a_step}
        logged = self._is_logged(self.step)
        if logged:
            if memory := resident_bytes(self.device):
                record["memory_mb"] = memory / 1e6
            self._log(record)
            self._seconds.clear()
        self.reporter.step(record, logged)
        asked = self.store.directory / "SAVE"
        if self.step % t.save_interval == 0 or signals.save or asked.is_file():
            self._save()
            signals.save = False
            with suppress(OSError):  # on a disk that has become read-only it asks again after every step
                asked.unlink(missing_ok=True)

    # --- saving -------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Save this step, or begin to. The disk's refusals are told and do not end the run."""
        self.metrics.look()
        bad = optim.first_not_finite({**self.model.state_dict(), **self.optimizer.state_dict()})
        self._must_be_finite(self.step, f"a number in {bad}", 0.0 if bad is None else math.nan)
        self.saver.save(self.step, *state.to_file(self._state()))
        self._last_save = self.step
        self._tell_of_saves()

    def _tell_of_saves(self, wait: bool = False) -> None:
        """Report the saves that ended since the last time, and what the store noticed."""
        for save in self.saver.finished(wait):
            self._not_saved = save.error
            self._longest["save"] = max(self._longest["save"], save.seconds)
            if save.error is None:
                self.reporter.saved(save.path)
            else:
                self.reporter.notice(f"warning: {save.error}; training goes on, and the next save is tried as usual")
        while self.store.notices:
            self.reporter.notice(self.store.notices.pop(0))

    def _log(self, record: Record) -> None:
        try:
            self.store.log(record)
            self._not_logged = None
        except SaveError as error:
            if self._not_logged is None:
                self.reporter.notice(f"warning: {error}; training goes on, and the line is tried again with the next one")
            self._not_logged = error

    def _time_is_up(self, began: float) -> bool:
        """Whether another step, and then the saves under way and due, might take longer than what is left of the limit."""
        if self.options.time_limit is None:
            return False
        saves = (2 if self.config.trainer.async_save else 1) * max(self._longest["save"], self.file_size / _SLOW_DISK)
        return time.monotonic() - began + 1.5 * (self._longest["step"] + saves) >= self.options.time_limit

    @cached_property
    def file_size(self) -> int:
        """Bytes of a checkpoint of this run, but for the padding of a header in which a number has more or fewer digits."""
        last = replace(self._state(), step=self.total_steps)
        return predict_size(state.tensors_of(last), state.metadata_of(last))

    def most_bytes_more(self) -> int:
        """How much larger this run makes the checkpoint directory at its largest."""
        every = self.config.trainer.save_interval
        coming = [*range(self.step - self.step % every + every, self.total_steps, every), self.total_steps]
        return self.store.most_bytes_more(self.file_size, coming)

    def batches(self) -> BatchLoader:
        """The batches that training reads from here on, without end."""
        return BatchLoader(self.windows, self.cursor, self.config.trainer.batch_size, self.options.prefetch)

    # --- where it starts ----------------------------------------------------------------------------------------------

    def _state(self) -> RunState:
        return RunState(
            weights=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            step=self.step,
            cursor=self.cursor,
            windows_an_epoch=self.windows.train_windows,
            config=self.config.canonical(self.device),
            data=self._data_identity,
            tokenizer=dict(self.tokenizer.state()),
            fingerprint=fingerprint(self.device),
            lineage=self.lineage,
            loss_scale=None if self.loss_scale is None else self.loss_scale.state(),
        )

    def _start(self) -> None:
        """Continue a checkpoint, or start afresh; only then is anything in the directory touched."""
        options, store = self.options, self.store
        found = store.find(options.resume) if options.resume else None
        if found is not None:
            notices = self._continue(found)
        else:
            if not options.resume and not options.overwrite:
                store.refuse_to_start_over()
            notices = [] if options.init_from is None else [self._take_weights(options.init_from)]
        store.open(self._readable_config(), found.damaged if found else ())
        self._tell_of_saves()
        for notice in notices:
            self.reporter.notice(notice)
        if options.resume and found is None:
            self.reporter.notice(f"--resume auto: {store.describe()}; starting at step 0")
        from_elsewhere = found is not None and found.path.resolve() != store.path(self.step).resolve()
        # A file from elsewhere begins a branch of its own: what is here under its number is another run's.
        if from_elsewhere:
            tensors, metadata = state.to_file(self._state())
            tensors.wait()
            moved = store.supersede(self.step, self.step, begin_with=(tensors, metadata))
        else:
            moved = store.supersede(self.step + 1 if found else 0, self.step)
        if moved:
            names = ", ".join(f"step_{step}" for step in moved)
            self.reporter.notice(f"moved {names} and their metrics to {store.directory / 'superseded'}")

    def _readable_config(self) -> dict[str, Any]:
        """The whole config, its data paths made absolute."""
        config = self.config.model_dump(mode="json")
        if not self.config.data.is_random:
            config["data"]["path"] = [str(path.absolute()) for path in self.config.data_paths()]
        return config

    def _continue(self, found: Found) -> list[str]:
        """Take over the state of a file. Returns what to tell. Raises MismatchError when it does not fit this run."""
        saved = state.from_file(found.checkpoint, found.path)
        notices, self.lineage = state.continue_from(
            saved, self._state(), found.path, allow=self.options.allow_mismatch, strict=self.options.strict
        )
        self.model.load_state_dict(saved.weights)
        skipped = 0 if saved.loss_scale is None else saved.loss_scale["skipped"]
        if self.loss_scale is not None and saved.loss_scale is not None:
            self.loss_scale.load(saved.loss_scale)
            skipped = 0  # it counts them itself
        self.optimizer.load_state_dict(saved.optimizer, updates=saved.step - skipped)
        self.step, self.cursor = saved.step, saved.cursor
        self._last_save = self.store.resumed_from = saved.step
        return [*notices, f"resumed {found.path} at step {self.step}"]

    def _take_weights(self, first: FirstWeights) -> str:
        self.model.load_state_dict(first.weights)
        self.lineage = [dict(line) for line in first.lineage]
        return f"starting with the weights of {first.what}, a fresh optimizer and step 0"
