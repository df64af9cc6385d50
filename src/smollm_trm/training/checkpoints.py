"""Checkpoints that are whole or not there, hold no base model, and load without running anything.

A training checkpoint holds what changes: trainable weights, their average, optimizer, schedule, loops and the position
in the data. It is written to a temporary file, flushed to disk and renamed, so a process killed at any moment leaves
the one before. Only tensors and plain values are read back (`weights_only=True`).

Lightning's own `ModelCheckpoint` is not used: it also writes between a batch and its validation, or in the middle of an
accumulation, where a resumed run would skip that validation or lose those gradients.
"""

import errno
import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZipFile

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities import rank_zero_only

from smollm_trm.records import UserMistake, first_line, remove_path, write_whole

logger = logging.getLogger(__name__)


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Refuse a second run in a folder while the first goes on; its lock goes with its process, however that dies."""
    if rank_zero_only.rank or os.name == "nt":  # Windows has no such locks
        yield
        return
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "ab")  # noqa: SIM115 (closed below)
    except OSError:  # the first file that is written says why
        yield
        return
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by worker processes, which may outlive it
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # others: a file system without locks
                raise UserMistake(f"{folder}: another run is writing there; wait, or name another folder") from None
        yield


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written whole or not at all and read as plain tensors only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_whole(Path(path), lambda temporary: torch.save(checkpoint, temporary))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        try:
            return checked_checkpoint(torch.load(path, map_location=map_location or "cpu", weights_only=True))
        except Exception as error:  # whatever a damaged or foreign file makes the reader raise
            raise UserMistake(f"{path}: not a checkpoint of this program ({reason_unread(error)})") from error


def checked_checkpoint(content: Any) -> dict[str, Any]:
    """What a checkpoint file holds, if it is what a run goes on from."""
    kinds = {"global_step": int, "epoch": int, "state_dict": dict, "callbacks": dict, "loops": dict}
    kinds |= {"optimizer_states": list, "lr_schedulers": list, "pytorch-lightning_version": str}
    for name, kind in kinds.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), kind):
            raise ValueError(f"it holds no {name}")
    if "fit_loop" not in content["loops"] or "BestAndLatest" not in content["callbacks"]:
        raise ValueError("it does not say where its run stood")
    return content


def reason_unread(error: Exception) -> str:
    """Why a checkpoint is not read. PyTorch's own message advises to switch its safety off."""
    return "damaged, or more than tensors and plain values" if isinstance(error, UnpicklingError) else first_line(error)


def checkpoints_by_step(folder: Path) -> dict[int, Path]:
    return {int(path.stem[5:]): path for path in folder.glob("step-*.ckpt") if path.stem[5:].isdecimal()}


def damage_of(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None. Checksums are compared; no tensor is built."""
    try:
        with ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is None:
            checked_checkpoint(torch.load(path, map_location="meta", weights_only=True))
    except Exception as error:  # whatever a damaged file makes the reader raise
        return reason_unread(error)
    return broken and f"{broken} does not match its checksum"


def newest_good_checkpoint(folder: Path, damage_of: Callable[[Path], str | None] = damage_of) -> Path | None:
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
        self.folder, self.every_n_steps, self.metric, self.advice = folder, every_n_steps, metric, advice
        self.best_step, self.best_loss = 0, math.inf
        self.recent: list[list[int]] = []  # step and best step of the last two checkpoints
        self.finished = self.asked_to_stop = self.in_training = False
        self.earlier_handler: Any = None

    @property
    def last_word(self) -> str:
        kept = max(checkpoints_by_step(self.folder), default=None)
        if kept is None:
            return "stopped before the first checkpoint: nothing is kept"
        return f"stopped; step {kept} is kept, and the same command goes on from there"

    @property
    def best_path(self) -> Path | None:
        """The checkpoint with the lowest metric; None before the first validation."""
        return self.folder / f"step-{self.best_step}.ckpt" if self.best_step else None

    def state_dict(self) -> dict[str, Any]:
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
        if threading.current_thread() is threading.main_thread():
            self.earlier_handler = signal.signal(signal.SIGINT, self.ask_to_stop)

    def ask_to_stop(self, *_: Any) -> None:
        """Ctrl-C: the optimizer step under way is finished and kept; a second one stops at once."""
        self.give_back_ctrl_c()
        if not self.in_training:
            raise KeyboardInterrupt
        self.asked_to_stop = True
        logger.warning("stopping after this step (Ctrl-C again: at once)")

    def give_back_ctrl_c(self, *_: Any, **__: Any) -> None:
        if self.earlier_handler is not None:
            signal.signal(signal.SIGINT, self.earlier_handler)
            self.earlier_handler = None

    teardown = on_exception = give_back_ctrl_c

    def on_train_batch_start(self, *_: Any) -> None:
        self.in_training = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A Ctrl-C need not wait for a validation, after which a checkpoint would be written."""
        self.in_training = False
        if self.asked_to_stop:
            raise KeyboardInterrupt

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
        due = due or (self.asked_to_stop and trainer.global_step > last_written)
        if due and not (validates or accumulates or trainer.is_last_batch):
            self.write(trainer)
        if self.asked_to_stop and not (validates or accumulates):
            raise KeyboardInterrupt

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
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
        self.recent = [*self.recent[-1:], [trainer.global_step, self.best_step]]
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step}.ckpt", weights_only=False)
        needed = {step for pair in self.recent for step in pair}
        if trainer.is_global_zero:
            for step, path in checkpoints_by_step(self.folder).items():
                if step < trainer.global_step and step not in needed:
                    remove_path(path)
