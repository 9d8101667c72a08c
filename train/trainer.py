"""The training loop: updates of accumulated batches, evaluation, checkpoints, and an orderly stop."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models.transformer import DecoderOnly, EncoderDecoder, build_model
from train.checkpoint import Checkpoints, TrainState
from train.config import RunConfig
from train.data.batching import Batch, Collate, load_batches, share_of, updates_in
from train.data.dataset import PairData, TextData
from train.distributed import Distributed
from train.evaluation import decoded_exact_match, sum_loss, validation_loss
from train.metrics import Reporter
from train.optimizer import build_optimizer, learning_rate_factor, set_learning_rate

COMPILED_LENGTH_MULTIPLE = 8  # compiled graphs specialise on shapes: give them few


class DivergenceError(RuntimeError):
    """The loss is no longer a finite number."""


class Trainer:
    """One run on one rank. ``train()`` carries it from wherever it stands to its end, or to a signal to stop.

    ``model`` is what to fine-tune; without one the run starts from new weights.
    """

    def __init__(
        self, config: RunConfig, data: PairData | TextData, distributed: Distributed,
        model: DecoderOnly | EncoderDecoder | None = None,
    ) -> None:  # fmt: skip
        self.config, self.data, self.distributed = config, data, distributed
        self.options = config.training
        torch.manual_seed(self.options.seed)
        torch.set_flush_denormal(True)  # denormal gradients of small models cost a CPU tens of times a normal one
        self.model = (model or _new_model(config, data)).to(distributed.device)
        self.model.set_activation_checkpointing(self.options.activation_checkpointing)
        torch.manual_seed(self.options.seed + distributed.rank)  # same weights everywhere, dropout of one's own
        self.optimizer = build_optimizer(
            self.model,
            self.options.learning_rate,
            self.options.weight_decay,
            (self.options.beta1, self.options.beta2),
        )
        self.precision = _precision(self.options.precision, distributed.device)
        self.scaler = torch.amp.GradScaler(distributed.device.type, enabled=self.precision == torch.float16)
        self.module = self._wrap()
        self.checkpoints = Checkpoints(config.run_folder, distributed)
        self.state = TrainState()
        self.total_steps = self.options.max_steps or self.options.num_epochs * self._updates_in_epoch(0)
        self.signalled = False  # this rank got a signal
        self.stop_requested = False  # some rank did: the same on every rank

    def _wrap(self) -> nn.Module:
        """The model as the loop calls it: compiled as asked, and under DDP when there are several ranks."""
        module: nn.Module = self.model
        if self.options.compile == "block":
            self.model.compile_blocks(lambda block: block.compile())
        elif self.options.compile == "model":
            module = torch.compile(module)  # type: ignore[assignment]
        if self.distributed.world_size == 1:
            return module
        devices = [self.distributed.device.index] if self.distributed.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)

    def resume(self, folder: Path) -> None:
        """Continues from a checkpoint's weights, optimizer, random state and place in the data."""
        self.state = self.checkpoints.restore(folder, self.model, self.optimizer, self.scaler)

    def train(self, reporter: Reporter) -> TrainState:
        """Runs updates until ``total_steps`` or a signal; evaluates and saves on the way. Returns the final state."""
        meter = Meter(self.distributed)
        with self._catch_signals():
            for updates in self._epochs():
                for batches, num_tokens, is_last in updates:
                    meter.add(*self.update(batches, num_tokens), batches)
                    self.state.step += 1
                    self.state.update += 1
                    if self.state.step % self.options.log_interval == 0 or self.state.step == self.total_steps:
                        self._log(reporter, meter)
                    if self._evaluation_due(is_last) and not self.stop_requested:
                        self._evaluate_and_save(reporter)
                        meter.restart()
                    if self.stop_requested:
                        self._save(is_best=False)
                        reporter.note(f"stopped by a signal; saved at step {self.state.step}")
                        return self.state
        return self.state

    def update(self, batches: list[Batch], num_target_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step over this rank's ``batches``; returns the summed loss and the gradient's norm.

        The loss is divided by ``num_target_tokens``, the target tokens of the whole update: every pass, every rank.
        """
        factor = learning_rate_factor(
            self.state.step, self.options.schedule, self.options.warmup_steps, self.total_steps
        )
        set_learning_rate(self.optimizer, self.options.learning_rate * factor)
        loss = self.accumulate_gradients(batches, num_target_tokens)
        self.scaler.unscale_(self.optimizer)
        limit = self.options.max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def accumulate_gradients(self, batches: list[Batch], num_target_tokens: int) -> torch.Tensor:
        """Adds the gradients of the mean loss a target token; returns this rank's summed loss."""
        self.module.train()
        total = torch.zeros((), device=self.distributed.device)
        for i, batch in enumerate(batches):
            batch = batch.to(self.distributed.device)
            last = i == len(batches) - 1
            with self._without_sync(last), self._autocast():
                loss = sum_loss(self.module, batch, self.options.label_smoothing, self.options.z_loss)
                # DDP averages over ranks: undo that, for the sum is already divided by every rank's tokens.
                scaled = loss * (self.distributed.world_size / max(num_target_tokens, 1))
                self.scaler.scale(scaled).backward()
            total += loss.detach()
        return total

    def evaluate(self) -> dict[str, float]:
        """Validation loss and, for pairs, exact match of the decoded output."""
        self.model.eval()
        # The engine calls the blocks in shapes and with caches that training's compiled graphs do not fit.
        with torch.compiler.set_stance("force_eager"):
            with self._autocast():
                size, budget = self.options.batch_size, self.config.data.max_tokens
                figures = {"val_loss": validation_loss(self.model, self.data, size, budget, self.distributed)}
            if self.data.validation_pairs and self.options.eval_samples:
                figures["exact_match"] = decoded_exact_match(
                    self.model, self.data, self.options.eval_samples, self.distributed
                )
        return figures

    def _epochs(self) -> Iterator[Iterator[tuple[list[Batch], int, bool]]]:
        while self.state.step < self.total_steps:
            yield self._updates()
            self.state.epoch, self.state.update = self.state.epoch + 1, 0

    def _updates(self) -> Iterator[tuple[list[Batch], int, bool]]:
        """The rest of the epoch: an update's batches, its target tokens over all ranks, whether it is the last."""
        world_size, accumulation = self.distributed.world_size, self.options.accumulation
        examples, plan = self._plan(self.state.epoch)
        count = min(
            updates_in(plan, world_size * accumulation),
            self.state.update + self.total_steps - self.state.step,
        )
        indices = share_of(plan, self.distributed.rank, world_size, accumulation, self.state.update)
        indices = indices[: (count - self.state.update) * accumulation]
        compiled = self.options.compile != "none"
        stream = load_batches(
            Collate(examples, COMPILED_LENGTH_MULTIPLE if compiled else 1, self.model.config.max_seqlen,
                    self.model.generation),
            indices, self.config.data.num_workers, pin_memory=self.distributed.device.type == "cuda",
        )  # fmt: skip
        for update in range(self.state.update, count):
            batches = [next(stream) for _ in range(accumulation)]
            tokens, stops = self.distributed.sum(sum(b.num_target_tokens for b in batches), self.signalled)
            self.stop_requested = stops > 0  # every rank stops after the same update
            yield batches, int(tokens), update == count - 1

    def _plan(self, epoch: int) -> Any:
        return self.data.epoch(self.options.seed, epoch, self.options.batch_size, self.config.data.max_tokens)

    def _updates_in_epoch(self, epoch: int) -> int:
        return updates_in(self._plan(epoch)[1], self.distributed.world_size * self.options.accumulation)

    def _evaluation_due(self, end_of_epoch: bool) -> bool:
        if self.state.step == self.total_steps:
            return True
        interval = self.options.eval_interval
        return self.state.step % interval == 0 if interval else end_of_epoch

    def _evaluate_and_save(self, reporter: Reporter) -> None:
        figures = self.evaluate()
        self._check_finite("validation loss", figures["val_loss"])
        reporter.evaluation(self.state.step, figures)
        metric = self.options.best_metric
        score = figures[metric] if metric == "exact_match" else -figures[metric]
        is_best = self.state.best is None or score > self.state.best
        if is_best:
            self.state.best = score
        self._save(is_best)

    def _save(self, is_best: bool) -> None:
        self.checkpoints.save(
            self.model, self.data.tokenizer, self.optimizer, self.scaler, self.state, is_best
        )  # fmt: skip

    def _log(self, reporter: Reporter, meter: Meter) -> None:
        figures = meter.read()
        if not self.scaler.is_enabled():  # an overflow under fp16 is the scaler's to handle
            self._check_finite("loss", figures["loss"])
        rate = self.optimizer.param_groups[0]["lr"]
        reporter.training(self.state.step, epoch=self.state.epoch, learning_rate=rate, **figures)

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise DivergenceError(f"the {name} is {value} at step {self.state.step}: lower training.learning_rate")

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.distributed.device.type, dtype=self.precision, enabled=self.precision != torch.float32
        )

    def _without_sync(self, last: bool) -> contextlib.AbstractContextManager[None]:
        if last or not isinstance(self.module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.module.no_sync()

    @contextlib.contextmanager
    def _catch_signals(self) -> Iterator[None]:
        def request_stop(number: int, frame: object) -> None:
            self.signalled = True

        previous = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class Meter:
    """Sums since the last reading: loss a target token and tokens a second, over all ranks."""

    def __init__(self, distributed: Distributed) -> None:
        self.distributed = distributed
        self.restart()

    def restart(self) -> None:
        self.loss: torch.Tensor | float = 0.0
        self.norm: torch.Tensor | float = 0.0
        self.target_tokens = self.tokens = 0
        self.since = time.monotonic()

    def add(self, loss: torch.Tensor, norm: torch.Tensor, batches: list[Batch]) -> None:
        # Tensors are added up where they are: reading one would make the host wait for the device.
        self.loss, self.norm = self.loss + loss, norm
        self.target_tokens += sum(batch.num_target_tokens for batch in batches)
        self.tokens += sum(batch.num_tokens for batch in batches)

    def read(self) -> dict[str, float]:
        loss, target_tokens, tokens = self.distributed.sum(float(self.loss), self.target_tokens, self.tokens)
        seconds = time.monotonic() - self.since
        norm = float(self.norm)
        self.restart()
        return {
            "loss": loss / max(target_tokens, 1),
            "grad_norm": norm,
            "tokens_per_second": tokens / seconds,
        }


def _new_model(config: RunConfig, data: PairData | TextData) -> DecoderOnly | EncoderDecoder:
    tokenizer = data.tokenizer
    shared = tokenizer.target is tokenizer.source
    return build_model(config.transformer(tokenizer.vocab_size, None if shared else tokenizer.target_vocab_size))


def _precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
