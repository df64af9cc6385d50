"""A run: its folder, what it was begun with, where it goes on, and how it is trained. It knows no model.

    folder/settings.json              what it was begun with; other settings are refused
    folder/checkpoints/step-<n>.ckpt  the newest two and the best: see `training/checkpoints.py`
    folder/logs/metrics.csv           every figure; beside it TensorBoard's and, where there is a key, W&B's

The way of a run: `begin_run`, `build_run_trainer`, `fit_run`, and where an average is kept, `load_average` of the best
checkpoint.
"""

import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor
from pytorch_lightning.utilities import rank_zero_only

from smollm_trm.records import (
    UserMistake,
    noted_settings,
    refuse_other_settings,
    remove_path,
    remove_unfinished,
    write_json,
)
from smollm_trm.training.checkpoints import BestAndLatest, WholeCheckpointIO, damage_of, newest_good_checkpoint
from smollm_trm.training.ema import AverageWeights
from smollm_trm.training.loggers import build_loggers, finish_wandb
from smollm_trm.training.progress import RunProgress
from smollm_trm.training.watch import NonFiniteGuard, Speedometer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run lies and how it is kept."""

    folder: Path
    resume: str = "auto"  # goes on from the newest good checkpoint, "never" starts anew; or a checkpoint file
    settings_file: str = "settings.json"
    results_file: str = "results.json"  # what a run leaves when it is done; the caller writes it
    metric: str = "dev_loss"  # the validation's figure whose lowest value is the best
    save_every_n_steps: int = 100  # optimizer steps between checkpoints; every validation writes one too
    ema_decay: float | None = None  # limit of the weight average, which then is what is validated; None keeps none
    patience: int | None = None  # validations without a better metric before the run stops; None never stops it
    wandb: tuple[str | None, str | None] = (None, None)  # project at Weights & Biases and the run's name there
    seed: int = 0  # with the folder, the run's identity at Weights & Biases
    progress: bool = True
    not_finite: str = "lower learning_rate"  # what to do about gradients or a metric that are not finite
    out_of_memory: str = "lower batch_size"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


class Start(NamedTuple):
    """Where a session of a run begins."""

    checkpoint: Path | None = None  # what it goes on from; None at the run's beginning
    raised_at: int = 0  # where the run had ended when its `max_steps` was raised; 0 where it was not


def begin_run(
    run: Run,
    settings: Mapping[str, Any],
    *,
    may_change: Sequence[str] = (),
    may_rise: bool = False,
    damage_of: Callable[[Path], str | None] = damage_of,
) -> Start:
    """Note what a run is begun with; where it goes on. `may_rise`: with a higher `max_steps`, where it had ended."""
    anew, raised_at = run.resume == "never", 0
    begun = any(run.checkpoints.glob("*.ckpt")) or (run.folder / run.results_file).is_file()
    checkpoint = newest_good_checkpoint(run.checkpoints, damage_of) if run.resume == "auto" else Path(run.resume)
    if begun and not anew:
        before, most = noted_settings(run.folder / run.settings_file), settings.get("max_steps", -1)
        raised_at = before.get("raised_at", 0)
        if may_rise and run.resume == "auto" and checkpoint is not None and most != before.get("max_steps", most):
            found = WholeCheckpointIO().load_checkpoint(checkpoint, "meta")
            if found["callbacks"]["BestAndLatest"]["finished"] and most > found["global_step"]:
                may_change, raised_at = (*may_change, "max_steps"), found["global_step"]
                told = "this run had ended at step %d: it goes on to step %d, with a new warm-up and cosine"
                logger.info(told, raised_at, most)
        refuse_other_settings(run.folder / run.settings_file, settings, ignored=tuple(may_change))
    prepare_folder(run, {**settings, "raised_at": raised_at} if raised_at else settings, anew=anew)
    if anew:
        return Start()
    if checkpoint is not None and not checkpoint.exists():
        raise UserMistake(f"resume={run.resume!r}: no such file; choose 'auto', 'never' or a checkpoint file")
    if checkpoint is not None:
        step = steps_done(checkpoint) if checkpoint.is_file() else checkpoint.stem.removeprefix("step-")
        logger.info("resuming from step %s, going on from %s", step, checkpoint)
    return Start(checkpoint, raised_at)


@rank_zero_only
def prepare_folder(run: Run, settings: Mapping[str, Any], *, anew: bool) -> None:
    """Note the settings in a run's folder; remove what a killed process left, or a whole earlier run."""
    for place in (run.folder, run.checkpoints):
        remove_unfinished(place)
    if anew:
        for stale in [*run.checkpoints.glob("*.ckpt"), run.folder / run.results_file]:
            remove_path(stale)
    write_json(run.folder / run.settings_file, settings)


def steps_done(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else WholeCheckpointIO().load_checkpoint(checkpoint, "meta")["global_step"]


class NewCourse(Callback):
    """Lets a run that had ended go on: not finished, patient again, its learning rates at the start of their course."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the end; `BestAndLatest` comes after this."""
        for part in trainer.callbacks:
            if isinstance(part, BestAndLatest):
                part.finished = False
            elif isinstance(part, EarlyStopping):
                part.wait_count = part.stopped_epoch = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first step is a new course's; the optimizer came back with the end of the old one."""
        for schedule in [one.scheduler for one in trainer.lr_scheduler_configs]:
            of_groups = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
            for group, peak, share in of_groups:
                group["lr"] = peak * share(schedule.last_epoch)


def build_run_trainer(run: Run, start: Start, *, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
    """Lightning's trainer with what every run has: guard, average, clock, checkpoints, loggers, progress."""
    metric, advice = run.metric, run.not_finite
    own: list[Callback] = [NonFiniteGuard(advice=advice)]
    if run.ema_decay is not None:
        own.append(AverageWeights(limit=run.ema_decay))
    first_step = steps_done(start.checkpoint)
    if first_step and first_step == start.raised_at:
        own.append(NewCourse())
    own += [*callbacks, Speedometer(), LearningRateMonitor(logging_interval="step")]
    own.append(BestAndLatest(run.checkpoints, every_n_steps=run.save_every_n_steps, metric=metric, advice=advice))
    if run.patience is not None:
        own.append(EarlyStopping(metric, patience=run.patience, check_finite=False, check_on_train_epoch_end=False))
    if run.progress:
        own.append(RunProgress(metric=run.metric))
    return Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        num_sanity_val_steps=0,
        callbacks=own,
        plugins=[WholeCheckpointIO()],
        logger=build_loggers(run.folder, first_step=first_step, wandb=run.wandb, seed=run.seed),
        default_root_dir=str(run.folder),
        use_distributed_sampler=False,
        enable_progress_bar=run.progress,
        enable_model_summary=False,
        **options,
    )


def fit_run(run: Run, trainer: Trainer, module: LightningModule, *, checkpoint: Path | None, **data: Any) -> None:
    """Train, from a checkpoint if there is one; Ctrl-C stays one, and too little memory says what helps."""
    try:
        trainer.fit(module, ckpt_path=checkpoint and str(checkpoint), weights_only=True, **data)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(f"out of memory: {run.out_of_memory}") from error
    except SystemExit:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves Ctrl-C switched off
        raise KeyboardInterrupt(trainer.checkpoint_callback.last_word) from None
    finally:
        finish_wandb(trainer.loggers)


@torch.no_grad()
def load_average(module: LightningModule, checkpoint: Path) -> None:
    """Put a checkpoint's averaged weights into the module, and the buffers it holds, which are not averaged."""
    found = WholeCheckpointIO().load_checkpoint(checkpoint)
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    for name, average in found["callbacks"]["AverageWeights"]["averages"].items():
        parameters[name].copy_(average)
    for name in buffers.keys() & found["state_dict"].keys():
        buffers[name].copy_(found["state_dict"][name])
