"""Trains in processes that are killed, and goes on: run by test_resume.py in an interpreter of its own.

    python killed_runs.py BASE OUTPUT SEED

Every session is a fork of this process, so that the imports are paid once; it dies by SIGKILL, at a moment drawn from
the seed. Each run in PLANS, with LoRA dropout, is trained once unbroken and once through all its deaths. A line of
JSON tells each death.
"""

import io
import json
import os
import random
import signal
import sys
import warnings
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
# In the middle of the second epoch's first accumulation; and when the best checkpoint is not the last.
FIRST_DEATHS = {"mid_epoch": ("forward", 7), "early_stop": ("validation", 3)}
SITES = ("forward", "backward", "validation", "half written", "written")


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


def session(base: str, output_dir: Path, plan: dict, death: tuple[str, int] | None) -> bool:
    """Train in a fork until it ends or dies; whether it died."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if death is not None:
                die_at(*death)
            train_tiny(base, output_dir, **plan)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit(f"a session of {output_dir.name} failed")
    return os.WIFSIGNALED(status)


def main(base: str, output: str, seed: str) -> None:
    draw = random.Random(int(seed))
    for name, plan in PLANS.items():
        session(base, Path(output) / name / "unbroken", plan, None)
        sites = draw.sample(SITES, 3)
        deaths = [(site, draw.randint(2, 4) if site in ("forward", "backward") else 1) for site in sites]
        for death in [FIRST_DEATHS[name], *deaths]:
            died = session(base, Path(output) / name / "broken", plan, death)
            print(json.dumps({"plan": name, "death": death, "died": died}), flush=True)
        session(base, Path(output) / name / "broken", plan, None)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        bend_dev_loss(patch, best_step=6)
        main(*sys.argv[1:])
