"""The progress of a whole run: optimizer steps done and left, losses, and the time that is left.

Lightning's own bar counts an epoch, whatever ends the run, and writes a line a step where it cannot go back.
"""

import logging
import sys
import time
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar
from tqdm import tqdm

from smollm_trm.bars import progress_bar

progress_log = logging.getLogger("smollm_trm.training.progress")

FIRST_STEPS = 3  # behind the very first, which is slower: enough to say how long the others will take


class RunProgress(ProgressBar):
    """Shows a run's optimizer steps, earlier sessions' included, out of all that it will make."""

    def __init__(self, *, metric: str = "dev_loss") -> None:
        super().__init__()
        self.metric, self.enabled = metric, True
        self.bar: tqdm | None = None
        self.timed_from: tuple[int, float] | None = None  # a step, and when it ended
        self.told = False

    def disable(self) -> None:
        """Show nothing: Lightning asks for it on every process but the first."""
        self.enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the run's steps: by its epochs, or fewer where `max_steps` ends it."""
        self.total, self.first = int(trainer.estimated_stepping_batches), trainer.global_step
        if self.enabled:
            style = {"unit": "step", "dynamic_ncols": True, "smoothing": 0, "miniters": 0, "file": sys.stderr}
            self.bar = progress_bar(total=self.total, initial=self.first, desc="training", **style)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step, now = trainer.global_step, time.perf_counter()
        if self.timed_from is None and step > self.first:
            self.timed_from = step, now
        elif self.timed_from is not None and not self.told and step - self.timed_from[0] >= FIRST_STEPS:
            self.told, left = True, max(0, self.total - step)  # a module may make several steps a batch
            a_step = (now - self.timed_from[1]) / (step - self.timed_from[0])
            told = "%.2g s a step: about %s for the %d steps that are left, validations not counted"
            if self.enabled:
                progress_log.info(told, a_step, tqdm.format_interval(a_step * left), left)
        self.show(trainer, "training")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if trainer.state.fn == "fit":
            self.show(trainer, f"validating {batch_idx + 1}/{trainer.num_val_batches[0]}")

    def on_train_end(self, trainer: Trainer, *args: Any) -> None:
        self.show(trainer, "trained")
        self.on_exception()

    def on_exception(self, *args: Any) -> None:
        """Leave the line to the message that follows."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def show(self, trainer: Trainer, doing: str) -> None:
        """Note what is to be drawn; tqdm draws it when that is due."""
        if self.bar is None:
            return
        metrics = trainer.callback_metrics
        shown = [f"{name}={float(metrics[name]):.3f}" for name in ("train_loss", self.metric) if name in metrics]
        stage = [f"stage={int(metrics['stage'])}"] if "stage" in metrics else []
        self.bar.set_description(doing, refresh=False)
        self.bar.set_postfix_str(", ".join(stage + shown), refresh=False)
        self.bar.update(trainer.global_step - self.bar.n)
