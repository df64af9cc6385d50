"""Checkpoints that are whole or not there, hold no base model, and load without running anything.

A training checkpoint holds what changes: trainable weights, their average, optimizer, schedule, loops and the position
in the data. It is written to a temporary file, flushed to disk and renamed, so a process killed at any moment leaves
the one before. Only tensors and plain values are read back (`weights_only=True`).

Lightning's own `ModelCheckpoint` is not used: it also writes between a batch and its validation, or in the middle of an
accumulation, where a resumed run would skip that validation or lose those gradients.
"""

import logging
import math
import re
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

from smollm_trm.records import UserMistake, first_line, remove_path, write_whole

logger = logging.getLogger(__name__)


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written whole or not at all and read as plain tensors only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_whole(Path(path), lambda temporary: torch.save(checkpoint, temporary))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Tensors and plain values; a file that is damaged or holds something that would run code is refused."""
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except Exception as error:  # whatever a damaged or foreign file makes the reader raise
            raise UserMistake(f"{path}: not a checkpoint of this program ({first_line(error)})") from error


def checkpoints_by_step(folder: Path) -> dict[int, Path]:
    """The `step-<n>.ckpt` files of a folder by their n."""
    names = {path: re.fullmatch(r"step-(\d+)", path.stem) for path in folder.glob("*.ckpt")}
    return {int(match[1]): path for path, match in names.items() if match}


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None. Checksums are compared; no tensor is built."""
    try:
        with ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is None:
            torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:  # whatever a damaged file makes the reader raise
        return first_line(error)
    return broken and f"{broken} does not match its checksum"


def newest_good_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with most optimizer steps that can be read; damaged ones are skipped with a message."""
    found = checkpoints_by_step(folder)
    for _, path in sorted(found.items(), reverse=True):
        if (damage := damage_of(path)) is None:
            return path
        logger.warning("skipped the damaged checkpoint %s (%s)", path, damage)
    if found:
        logger.warning("no good checkpoint is left in %s: the run starts anew", folder)
    return None


class BestAndLatest(Checkpoint):
    """Writes `step-<n>.ckpt` after every validation and every so many steps; keeps two, and each one's best."""

    def __init__(self, folder: Path, *, every_n_steps: int, metric: str = "dev_loss", advice: str = "") -> None:
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.metric = metric
        self.advice = advice
        self.best_step = 0
        self.best_loss = math.inf
        self.recent: list[list[int]] = []
        """Step and best step of the last two checkpoints."""
        self.finished = False

    @property
    def best_path(self) -> Path | None:
        """The checkpoint with the lowest metric; None before the first validation."""
        return self.folder / f"step-{self.best_step}.ckpt" if self.best_step else None

    def state_dict(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return {name: getattr(self, name) for name in ("best_step", "best_loss", "recent", "finished")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that had ended is not trained further; one from another folder left its best checkpoint there."""
        if self.best_path is not None and not self.best_path.is_file():
            if self.finished:
                raise UserMistake(f"{self.best_path} is missing: resume a run that has ended in its own output_dir")
            self.best_step, self.best_loss, self.recent = 0, math.inf, []
        trainer.should_stop = self.finished

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask for the last validation, or write after a step that no validation and no end of an epoch follows."""
        last_epoch = trainer.is_last_batch and 0 < trainer.max_epochs <= trainer.current_epoch + 1
        if last_epoch or 0 < trainer.max_steps <= trainer.global_step:
            trainer.check_val_every_n_epoch = 1
            trainer.should_stop = True
        over_epochs = trainer.check_val_every_n_epoch is None  # validations are counted over all batches of the run
        batch_number = 1 + (trainer.fit_loop.epoch_loop.total_batch_idx if over_epochs else batch_idx)
        validates = trainer.should_stop or batch_number % trainer.val_check_batch == 0
        accumulates = (batch_idx + 1) % trainer.accumulate_grad_batches != 0
        last_written = self.recent[-1][0] if self.recent else 0
        due = trainer.global_step - last_written >= self.every_n_steps
        if due and not (validates or accumulates or trainer.is_last_batch):
            self.write(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metric and write."""
        if trainer.state.fn != "fit":
            return
        loss = float(trainer.callback_metrics[self.metric])
        if not math.isfinite(loss):
            raise FloatingPointError(f"{self.metric} is {loss}: {self.advice}")
        if loss < self.best_loss:
            self.best_step, self.best_loss = trainer.global_step, loss
        self.finished = trainer.should_stop
        self.write(trainer)

    def write(self, trainer: Trainer) -> None:
        """Write a checkpoint, then remove what is no longer needed."""
        self.recent = [*self.recent[-1:], [trainer.global_step, self.best_step]]
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step}.ckpt", weights_only=False)
        needed = {step for pair in self.recent for step in pair}
        if trainer.is_global_zero:
            for step, path in checkpoints_by_step(self.folder).items():
                if step < trainer.global_step and step not in needed:
                    remove_path(path)
