"""Checkpoints that are whole or not there, hold no base model, and load without running anything.

A training checkpoint holds what changes: trainable weights, their average, optimizer, schedule, loops and the position
in the data. It is written to a temporary file, flushed to disk and renamed, so a process killed at any moment leaves
the one before. Only tensors and plain values are read back (`weights_only=True`).
"""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint

logger = logging.getLogger(__name__)


def write_whole(path: Path, write: Any) -> None:
    """Write a file or leave what was there: `write(temporary_path)`, flush to disk, rename.

    Args:
        path: the file to be.
        write: called with a temporary path beside it.

    Raises:
        OSError: one line naming the file, where the disk is full or the folder not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"could not write {path}: {error}; free some disk space or choose another output folder"
        ) from error


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written whole or not at all and read as plain tensors only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`."""
        write_whole(Path(path), lambda temporary: torch.save(checkpoint, temporary))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        """Read tensors and plain values; anything that would run code is refused."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)


def newest_good_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with most optimizer steps that can be read; damaged ones are skipped with a message.

    Args:
        folder: where training left its `*.ckpt` files.
    """
    found: list[tuple[int, float, Path]] = []
    for path in sorted(folder.glob("*.ckpt")):
        try:
            checkpoint = torch.load(path, map_location="meta", weights_only=True)
            found.append((int(checkpoint["global_step"]), path.stat().st_mtime, path))
        except Exception as error:  # whatever a damaged file makes the reader raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            logger.warning("skipped the damaged checkpoint %s (%s); the one before it is used", path, reason)
    return max(found)[2] if found else None


def checkpoint_callbacks(folder: Path, *, save_every_n_steps: int) -> list[ModelCheckpoint]:
    """Two writers: the best by dev loss, and the last two by time, so that one may be damaged.

    Args:
        folder: where to write.
        save_every_n_steps: optimizer steps between two writes of the latest state.
    """
    best = ModelCheckpoint(dirpath=folder, filename="best-{step}", monitor="dev_loss", mode="min", save_top_k=1)
    latest = ModelCheckpoint(
        dirpath=folder,
        filename="latest-{step}",
        monitor="step",
        mode="max",
        save_top_k=2,
        every_n_train_steps=save_every_n_steps,
        save_on_train_epoch_end=False,
    )
    return [best, latest]
