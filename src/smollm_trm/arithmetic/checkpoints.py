"""Checkpoint folders: `checkpoint-1000/model.safetensors` for use, `training_state.ckpt` to go on from.

A folder is written under another name and then renamed: it is there whole or not at all. Every checkpoint
keeps its weights; the training state (optimizer, schedule, position, random numbers) is kept in the newest
two. A state that does not load, or says another step than its folder, is passed over with a message, and the
one before it is used.
"""

import logging
import os
import shutil
from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from smollm_trm.arithmetic.model import save_arithmetic_model

TRAINING_STATE_NAME = "training_state.ckpt"
STATES_KEPT = 2


class SumCheckpoints(Callback):
    """Write a checkpoint folder every so many steps and at the last one.

    Args:
        folder: the output folder.
        every_n_steps: steps between checkpoints.
        num_steps: of the whole run.
    """

    def __init__(self, *, folder: Path, every_n_steps: int, num_steps: int) -> None:
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.num_steps = num_steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Save where a checkpoint is due."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == self.num_steps:
            self.save(trainer, pl_module)

    def save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `checkpoint-<step>`, then drop the training states of old ones."""
        final = self.folder / f"checkpoint-{trainer.global_step}"
        unfinished = self.folder / f"{final.name}.{os.getpid()}.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        save_arithmetic_model(pl_module.model, unfinished)
        trainer.save_checkpoint(unfinished / TRAINING_STATE_NAME)
        if final.exists():  # a damaged one that was passed over
            shutil.rmtree(final)
        os.replace(unfinished, final)
        for old in checkpoint_folders(self.folder)[STATES_KEPT:]:
            (old / TRAINING_STATE_NAME).unlink(missing_ok=True)


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest_good_state(folder: Path) -> tuple[Path, int] | None:
    """The newest training state that loads, and its step; None where there is none.

    Unfinished folders of a killed run are removed on the way.
    """
    log = logging.getLogger("smollm_trm.arithmetic")
    for unfinished in folder.glob("checkpoint-*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)
    for checkpoint in checkpoint_folders(folder):
        state = checkpoint / TRAINING_STATE_NAME
        if not state.is_file():
            continue
        try:
            step = torch.load(state, map_location="cpu", weights_only=True)["global_step"]
        except Exception as error:  # a cut or overwritten file fails in many ways
            log.warning("passing over the damaged %s (%s)", state, str(error).strip().partition("\n")[0])
            continue
        if step != _step_of(checkpoint):
            log.warning("passing over %s: it says step %d", state, step)
            continue
        return state, step
    return None
