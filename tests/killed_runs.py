"""Training that dies by SIGKILL in a chosen place: what test_resume.py runs in processes of their own."""

import io
import os
import signal
from pathlib import Path

import pytest
import torch
from runs import bend_dev_loss, train_tiny

from smollm_trm.training.checkpoints import BestAndLatest, WholeCheckpointIO
from smollm_trm.training.module import SmolLMTRMLightningModule

PLANS = {
    # An epoch has 5 batches and 3 optimizer steps; validations after batch 4 and at the end of the run.
    "mid_epoch": {"num_epochs": 3, "val_check_interval": 4, "save_every_n_steps": 1},
    # Validations at the ends of epochs; ends early, because the dev loss rises after step 6.
    "early_stop": {"num_epochs": 8, "save_every_n_steps": 2, "patience": 2, "ema_decay": 0.5},
}
# Where the sessions die one after the other. The first ones: in the middle of the second epoch's first accumulation;
# and when the best checkpoint is not the last.
DEATHS = {
    "mid_epoch": (("forward", 7), ("half written", 1), ("backward", 3)),
    "early_stop": (("validation", 3), ("written", 1)),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(site: str, count: int) -> None:
    """Let this process die at the `count`-th time it comes to a place."""
    left = count

    def now() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    def before(owner: type, name: str) -> None:
        method = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: die() if now() else method(*args, **kwargs))

    def half_write(checkpoint: dict, path: Path) -> None:
        whole = io.BytesIO()
        save(checkpoint, whole)
        if now():
            Path(path).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
            die()
        Path(path).write_bytes(whole.getvalue())

    def write_then_die(self: WholeCheckpointIO, checkpoint: dict, path: Path, storage_options=None) -> None:
        write(self, checkpoint, path, storage_options)
        if now():
            die()

    save, write = torch.save, WholeCheckpointIO.save_checkpoint
    if site == "forward":
        before(SmolLMTRMLightningModule, "training_step")
    elif site == "backward":
        before(BestAndLatest, "on_train_batch_end")
    elif site == "validation":
        before(SmolLMTRMLightningModule, "validation_step")
    elif site == "half written":
        torch.save = half_write
    elif site == "written":
        WholeCheckpointIO.save_checkpoint = write_then_die


def session(base: str, output_dir: str, plan: str, death: tuple[str, int] | None) -> None:
    """Train until it ends or dies."""
    if death is not None:
        die_at(*death)
    with pytest.MonkeyPatch.context() as patch:
        bend_dev_loss(patch, best_step=6)
        train_tiny(base, Path(output_dir), **PLANS[plan])
