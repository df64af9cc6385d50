"""The training of the arithmetic model, as the document has it: data folder in, trained and tested model out.

The output folder holds the trained model for `from_pretrained`, the same of the model on the way (`checkpoint-1000/`),
`training_config.json`, `test_results.json`, the logs, and where an interrupted run goes on (see `training/run.py`).
"""

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer

from smollm_trm.arithmetic.data_set import read_data_folder
from smollm_trm.arithmetic.evaluation import evaluate_sums
from smollm_trm.arithmetic.model import build_arithmetic_model, load_arithmetic_model, save_arithmetic_model
from smollm_trm.arithmetic.module import EncodedSums, SumModule, repeat_one_column_sums
from smollm_trm.arithmetic.settings import SumTrainingSettings
from smollm_trm.data.datamodule import ResumableLoader
from smollm_trm.models.loading import default_device
from smollm_trm.records import UserMistake, picked, remove_path, run_record, write_json, write_whole
from smollm_trm.training.checkpoints import only_run_in
from smollm_trm.training.loggers import quiet_lightning
from smollm_trm.training.run import Run, Start, begin_run, build_run_trainer, fit_run
from smollm_trm.training.text_log import training_log

logger = logging.getLogger(__name__)

FREE_ON_RESUME = (
    *("preset", "data_dir", "output_dir", "num_workers", "save_steps", "eval_steps", "logging_steps"),
    *("no_wandb", "eval_batch_size", "eval_examples", "resume", "command", "versions", "machine"),
)


class ExportedModels(Callback):
    """Writes `checkpoint-<step>`, a model for use, every `save_steps` and at the last one."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: SumModule, *args: Any) -> None:
        step = trainer.global_step
        if step % pl_module.settings.save_steps == 0 or step == trainer.max_steps:
            path = Path(trainer.default_root_dir) / f"checkpoint-{step}"
            write_whole(path, lambda unfinished: save_arithmetic_model(pl_module.model, unfinished))


def train_sums(settings: SumTrainingSettings) -> dict[str, Any]:
    """Train, or go on with the run found in the output folder; the test results, of a finished run those it has."""
    folder = Path(settings.output_dir)
    if settings.fp16 and not torch.cuda.is_available():
        raise UserMistake("fp16 needs a GPU, and there is none: leave --fp16 out")
    if (folder / "model.safetensors").is_file() and not (folder / "training_config.json").is_file():
        raise UserMistake(f"{folder} holds a model without training_config.json: name another --output-dir")
    files = read_data_folder(Path(settings.data_dir))
    max_length = settings.max_length
    lines = repeat_one_column_sums(files["train"].examples, settings.one_column_repeats)
    train = EncodedSums(lines, max_length=max_length, problem_weight=settings.problem_weight)
    few = None if settings.eval_examples == -1 else settings.eval_examples
    val = EncodedSums(files["val"].examples[:few], max_length=max_length)
    EncodedSums(files["test"].examples, max_length=max_length)  # too long a sum is refused now, not at the end
    model = build_arithmetic_model(settings.model_size, max_length=max_length, seed=settings.seed)
    model.config.digit_order = files["train"].digit_order  # tells the interactive command how answers are written
    has_key = bool(os.environ.get("WANDB_API_KEY")) and not settings.no_wandb
    run = Run(
        folder=folder,
        **picked(settings, "resume", "seed"),
        settings_file="training_config.json",
        results_file="test_results.json",
        metric="val_loss",
        save_every_n_steps=settings.save_steps,
        wandb=("smollm-trm-arithmetic" if has_key else None, None),
        not_finite="lower --learning-rate (checkpoints written so far are kept)",
        out_of_memory="lower --batch-size or --eval-batch-size",
    )
    fingerprints = {f"{part}_fingerprint": file.fingerprint for part, file in files.items()}
    noted = {**asdict(settings), **fingerprints, "num_parameters": model.num_parameters(), **run_record()}
    with only_run_in(folder), training_log(folder / "logs" / "training.log"):
        start = begin_run(run, noted, may_change=FREE_ON_RESUME)
        if settings.resume == "never":
            for stale in [*folder.glob("checkpoint-*"), folder / "model.safetensors"]:
                remove_path(stale)
        if (results := finished_results(folder, run)) is not None:
            hint = "name another --output-dir for a new one"
            logger.warning("%s holds this very run, finished: nothing to train (%s)", folder, hint)
            return results
        fit_sums(run, start, SumModule(model=model, settings=settings), train, val)
        save_arithmetic_model(model, folder)
        sizes = {"batch_size": settings.eval_batch_size, "max_length": max_length}
        results = evaluate_sums(model.to(default_device()), files["test"], **sizes)
        results |= {"seed": settings.seed, **run_record()}
        write_json(folder / run.results_file, results)
        shares = [100 * results[name] for name in ("exact_match", "token_accuracy")]
        logger.info("test: exact match %.2f%%, token accuracy %.2f%%; all in %s", *shares, folder)
    return results


def finished_results(folder: Path, run: Run) -> dict[str, Any] | None:
    """What a finished run found; None where its results or its model are not there and whole, to be made again."""
    try:
        load_arithmetic_model(folder)
        results = json.loads((folder / run.results_file).read_text(encoding="utf-8"))
        return results if "exact_match" in results else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def fit_sums(run: Run, start: Start, module: SumModule, train: EncodedSums, val: EncodedSums) -> None:
    """Train in place, from a checkpoint if there is one."""
    settings = module.settings
    workers = min(settings.num_workers, os.cpu_count() or 1)
    loader = ResumableLoader(train, batch_size=settings.batch_size, seed=settings.seed, num_workers=workers)
    num_steps = settings.count_steps(len(train))
    logger.info("training %s on %d examples: %d steps", settings.model_size, len(train), num_steps)
    with quiet_lightning():
        trainer = build_run_trainer(
            run,
            start,
            callbacks=[ExportedModels()],
            max_steps=num_steps,
            max_epochs=-(-num_steps // len(loader)),
            precision="16-mixed" if settings.fp16 else "32-true",
            gradient_clip_val=1.0,
            val_check_interval=min(settings.eval_steps, num_steps),
            check_val_every_n_epoch=None,  # counted over all epochs
            log_every_n_steps=settings.logging_steps,
        )
        data = {"val_dataloaders": ResumableLoader(val, batch_size=settings.eval_batch_size)}
        fit_run(run, trainer, module, checkpoint=start.checkpoint, train_dataloaders=loader, **data)
