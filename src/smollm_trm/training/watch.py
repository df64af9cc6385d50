"""Callbacks that watch a run: gradients that are not finite, latents that collapse, sample answers, time and memory."""

import logging
import time
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from smollm_trm.data.answers import gold_answer, is_correct

logger = logging.getLogger(__name__)


def gradient_norm(module: nn.Module) -> Tensor:
    """The norm of a module's gradients, which are dropped where it is not finite."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
    if not bool(torch.isfinite(norm)):
        module.zero_grad()
    return norm


class NonFiniteGuard(Callback):
    """Counts steps whose gradients are not finite, leaves them out, and ends a run that has too many in a row."""

    def __init__(self, *, limit: int = 25, advice: str = "lower learning_rate") -> None:
        self.limit, self.advice = limit, advice
        self.in_a_row = self.total = 0

    def state_dict(self) -> dict[str, int]:
        return {"in_a_row": self.in_a_row, "total": self.total}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        vars(self).update(state_dict)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure the gradient before it is clipped; drop it if it is not finite."""
        norm = gradient_norm(pl_module)
        pl_module.log("grad_norm", norm)
        finite = bool(torch.isfinite(norm))
        self.in_a_row = 0 if finite else self.in_a_row + 1
        self.total += not finite
        if self.total:
            pl_module.log("nonfinite_steps", float(self.total), prog_bar=True)
        if self.in_a_row >= self.limit:
            raise FloatingPointError(f"the gradients of {self.in_a_row} steps in a row were not finite: {self.advice}")


class CollapseWarning(Callback):
    """Warns once when the latents become the same for every problem.

    On SmolLM2 and on the twin, latents that came to be used never varied by less than 0.07 of their size after the
    first steps; those that were ignored fell to 0.03 and below (docs/log.md).
    """

    def __init__(self, *, threshold: float = 0.04, after: int = 50) -> None:
        self.threshold, self.after, self.warned = threshold, after, False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        variation = trainer.callback_metrics.get("latent_variation")
        if self.warned or variation is None or trainer.global_step < self.after or not variation < self.threshold:
            return
        self.warned = True
        told = f"the latents hardly differ between problems (variation {variation:.2g} at step {trainer.global_step})"
        advice = "lower trm_learning_rate or lengthen warmup_fraction (with the TRM also lower trm_kwargs branch_scale)"
        logger.warning("%s and act as a soft prompt: %s", told, advice)


class SampleAnswers(Callback):
    """Lets the model, with its averaged weights, answer the first dev problems at every validation, and logs them."""

    def __init__(self, count: int) -> None:
        self.count = count

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer, before the average goes back."""
        if not (self.count and trainer.state.fn == "fit" and trainer.is_global_zero):
            return
        rows = trainer.datamodule.splits.gsm8k_test[: self.count]
        with torch.autocast(pl_module.device.type, enabled=False):  # as in an evaluation
            texts = pl_module.model.generate_with_thinking([row["question"] for row in rows], max_new_tokens=200)
        for row, text in zip(rows, texts, strict=True):
            mark, right = ("✓" if is_correct(text, row["answer"]) else "✗"), gold_answer(row["answer"])
            written = " ".join(text.split())[:300]
            step, asked = trainer.global_step, row["question"][:60]
            logger.info("step %d %s %s … → %s (right: %s)", step, mark, asked, written, right)


class Speedometer(Callback):
    """Logs tokens per second, peak GPU memory and, beside a validation's figures, the `seconds` of all sessions."""

    def __init__(self) -> None:
        self.tokens = 0
        self.started = self.since = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time spent on this run, earlier sessions up to the checkpoint included."""
        return time.perf_counter() - self.started

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.started -= state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_validation_end()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: dict[str, Tensor], batch_idx: int
    ) -> None:
        self.tokens += next(iter(batch.values())).shape[:2].numel()  # (B, L)
        steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if steps and trainer.global_step % trainer.log_every_n_steps == 0:
            now = time.perf_counter()
            pl_module.log("tokens_per_second", self.tokens / max(1e-9, now - self.since))
            self.tokens, self.since = 0, now
            if torch.cuda.is_available():
                pl_module.log("peak_memory_gib", torch.cuda.max_memory_allocated() / 2**30)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            pl_module.log("seconds", self.seconds, sync_dist=True)

    def on_validation_end(self, *_: Any) -> None:
        """Leave the validation out of the training speed."""
        self.tokens, self.since = 0, time.perf_counter()
