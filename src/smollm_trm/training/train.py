"""`train_gsm8k`: one call that trains LoRA and a reasoner on GSM8K, resumes, and leaves a usable model behind."""

import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.utilities import rank_zero_only

from smollm_trm.data.datamodule import GSM8KDataModule
from smollm_trm.models.loading import device_and_precision
from smollm_trm.records import (
    refuse_other_settings,
    remove_path,
    remove_unfinished,
    run_record,
    settings_from,
    write_json,
    write_whole,
)
from smollm_trm.training.checkpoints import WholeCheckpointIO, newest_good_checkpoint
from smollm_trm.training.loggers import finish_wandb, quiet_lightning
from smollm_trm.training.module import SmolLMTRMLightningModule
from smollm_trm.training.parts import (
    Rows,
    build_data,
    build_module,
    build_trainer,
    check_fits,
    gather_splits,
    pick_precision,
)
from smollm_trm.training.settings import TrainSettings
from smollm_trm.training.watch import Speedometer

MAY_CHANGE = (
    *("resume", "progress", "output_dir", "data_dir", "wandb_project", "wandb_name", "save_every_n_steps"),
    *("gradient_checkpointing", "eval_batch_size", "patience"),
)
ONLY_WITH_TRM = ("reasoner", "num_latents", "trm_kwargs", "trm_learning_rate", "supervise", "read_with_adapter")
OUT_OF_MEMORY = (
    "out of memory: set gradient_checkpointing=True, then lower batch_size (and raise accumulate_grad_batches), "
    "num_latents or max_length"
)


def checkpoint_to_resume(settings: TrainSettings, folder: Path, *, split: str) -> Path | None:
    """The checkpoint that `resume` asks for; a run begun with other settings or other rows is refused.

    Args:
        settings: of the run; they are noted in its folder.
        folder: of the run.
        split: fingerprint of its rows.
    """
    noted = {**asdict(settings), "split": split}
    begun = any((folder / "checkpoints").glob("*.ckpt")) or (folder / "results.json").is_file()
    if settings.resume != "never" and begun:
        ignored = MAY_CHANGE if settings.use_trm else MAY_CHANGE + ONLY_WITH_TRM
        refuse_other_settings(folder / "settings.json", noted, ignored=ignored)
    prepare_folder(folder, noted, anew=settings.resume == "never")
    if settings.resume == "never":
        return None
    if settings.resume == "auto":
        return newest_good_checkpoint(folder / "checkpoints")
    if not Path(settings.resume).is_file():
        raise ValueError(f"resume={settings.resume!r}: no such file; choose 'auto', 'never' or a checkpoint file")
    return Path(settings.resume)


@rank_zero_only
def prepare_folder(folder: Path, noted: dict[str, Any], *, anew: bool) -> None:
    """Note the settings in a run's folder; remove what a killed process left, or a whole earlier run.

    Args:
        folder: of the run.
        noted: what `settings.json` is to hold.
        anew: whether an earlier run goes.
    """
    for place in (folder, folder / "checkpoints"):
        remove_unfinished(place)
    if anew:
        for stale in [*(folder / "checkpoints").glob("*.ckpt"), folder / "results.json"]:
            remove_path(stale)
    write_json(folder / "settings.json", noted)


def load_average(module: SmolLMTRMLightningModule, checkpoint: Path) -> None:
    """Put a checkpoint's averaged weights into the model."""
    averages = WholeCheckpointIO().load_checkpoint(checkpoint)["callbacks"]["AverageWeights"]["averages"]
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, average in averages.items():
            parameters[name].copy_(average)


def train_gsm8k(
    *, train_dataset: Rows | None = None, test_dataset: Rows | None = None, **config: Any
) -> tuple[Trainer, SmolLMTRMLightningModule]:
    """Train LoRA and a reasoner, on GSM8K unless told otherwise.

        trainer, module = train_gsm8k(data_dir="gsm8k", num_latents=64, target="answer")

    Args:
        train_dataset: rows `{question, answer}` to train on, in place of GSM8K.
        test_dataset: the dev part: it is validated on and may pick a checkpoint. Reports call it "dev".
        config: fields of `TrainSettings`.

    Returns:
        The trainer and the module. `module.model` holds the averaged weights of the checkpoint with the best dev loss;
        the same model lies in `output_dir/model`, and the run's figures in `output_dir/results.json`.

    Raises:
        ValueError: a setting that cannot be, before anything expensive starts.
        OSError: the output folder cannot be written to, or the disk is full.
        FloatingPointError: the gradients or the dev loss are not finite, with the settings that help.
        RuntimeError: out of memory, with the settings that help.
    """
    settings = settings_from(TrainSettings, config, "train_gsm8k")
    if torch.cuda.is_available() and settings.devices > torch.cuda.device_count():
        raise ValueError(f"devices={settings.devices}: this machine has {torch.cuda.device_count()} GPU(s)")
    check_fits(settings)
    folder = Path(settings.output_dir)
    splits = gather_splits(settings, train_dataset, test_dataset)
    checkpoint = checkpoint_to_resume(settings, folder, split=splits.fingerprint)
    first_step = 0 if checkpoint is None else WholeCheckpointIO().load_checkpoint(checkpoint, "meta")["global_step"]
    with quiet_lightning():
        precision, dtype = pick_precision(settings.precision)
        module = build_module(settings, splits, dtype)
        data = build_data(settings, splits, module)
        n_batches = -(-len(data.train_set) // (settings.batch_size * settings.devices * settings.num_nodes))
        trainer = build_trainer(settings, folder, precision=precision, n_batches=n_batches, first_step=first_step)
        fit(trainer, module, data, checkpoint)
    finish_run(trainer, module, settings, n_batches=n_batches, trained=trainer.global_step > first_step)
    return trainer, module


def fit(trainer: Trainer, module: SmolLMTRMLightningModule, data: GSM8KDataModule, checkpoint: Path | None) -> None:
    """Train, from a checkpoint if there is one, with the user's interruptions and mistakes as they are."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint and str(checkpoint), weights_only=True)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(OUT_OF_MEMORY) from error
    except SystemExit:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves Ctrl-C switched off
        raise KeyboardInterrupt from None
    finally:
        finish_wandb(trainer.loggers)


def finish_run(
    trainer: Trainer, module: SmolLMTRMLightningModule, settings: TrainSettings, *, n_batches: int, trained: bool
) -> None:
    """Take the best averaged weights, save the model for use, write the run's figures.

    Args:
        trainer: after the fit.
        module: its module.
        settings: of the run.
        n_batches: of an epoch, per process.
        trained: whether this sitting made a step; if not, the figures that are there stay.
    """
    folder, kept = Path(settings.output_dir), trainer.checkpoint_callback
    load_average(module, kept.best_path)
    module.eval().to(trainer.strategy.root_device)  # Lightning leaves it on the CPU
    if not trainer.is_global_zero or (not trained and (folder / "results.json").is_file()):
        return
    data, steps_per_epoch = trainer.datamodule, -(-n_batches // settings.accumulate_grad_batches)
    figures = {
        "dev_loss": kept.best_loss,
        "best_step": kept.best_step,
        "optimizer_steps": trainer.global_step,
        "epochs": round(trainer.global_step / steps_per_epoch, 3),
        "seconds": round(next(part.seconds for part in trainer.callbacks if isinstance(part, Speedometer)), 1),
        "train_rows": len(data.train_set),
        "dropped_rows": data.train_set.dropped,
        "dev_rows": len(data.dev_set),
        "split": data.splits.summary,
    }
    write_whole(folder / "model", lambda temporary: module.model.save_pretrained(temporary, training=figures))
    where = device_and_precision(module.model)
    write_json(folder / "results.json", {**figures, "settings": asdict(settings), **where, **run_record()})
