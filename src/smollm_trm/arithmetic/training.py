"""The training of the arithmetic model, as the document has it: data folder in, trained and tested model out.

output_dir/
  model.safetensors, config.json, tokenizer.json ...   the trained model, for from_pretrained
  checkpoint-1000/ ...                                 the same of the model on the way
  training_config.json                                 settings, data fingerprints, versions, parameters
  test_results.json                                    the evaluation of the test part
  logs/training.log, logs/metrics.csv                  what happened, with timestamps, and every figure
  checkpoints/                                         where an interrupted run goes on: see `training/run.py`
"""

import json
import logging
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from smollm_trm.arithmetic.batches import EncodedSums, SumBatches, encode_sums, repeat_one_column_sums
from smollm_trm.arithmetic.evaluation import evaluate_sums
from smollm_trm.arithmetic.files import SumFile, read_data_folder
from smollm_trm.arithmetic.model import build_arithmetic_model, count_parameters, save_arithmetic_model
from smollm_trm.arithmetic.module import SumModule
from smollm_trm.arithmetic.settings import FREE_ON_RESUME, SumTrainingSettings
from smollm_trm.arithmetic.tokenizer import build_arithmetic_tokenizer
from smollm_trm.data.batching import LengthGroupedBatches
from smollm_trm.data.datamodule import ResumableLoader
from smollm_trm.models.loading import default_device
from smollm_trm.records import remove_path, run_record, write_json, write_whole
from smollm_trm.training.loggers import quiet_lightning
from smollm_trm.training.run import Run, begin_run, build_run_trainer, fit_run, steps_done
from smollm_trm.training.text_log import training_log

logger = logging.getLogger(__name__)


class ExportedModels(Callback):
    """Writes `checkpoint-<step>`, a model for use, every so many optimizer steps and at the last one.

    Args:
        folder: of the run.
        every_n_steps: optimizer steps between them.
        num_steps: of the whole run.
    """

    def __init__(self, *, folder: Path, every_n_steps: int, num_steps: int) -> None:
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.num_steps = num_steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Write where one is due."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == self.num_steps:
            path = self.folder / f"checkpoint-{step}"
            write_whole(path, lambda unfinished: save_arithmetic_model(pl_module.model, unfinished))


def train_sums(settings: SumTrainingSettings) -> dict[str, Any]:
    """Train as the settings say, or go on with the run found in the output folder; returns the test results.

    A finished run is not trained again: its results are returned.

    Raises:
        FileNotFoundError: a data file is missing.
        ValueError: the data is not of this format, an example is longer than max_length, the folder holds a
            run with other settings or data, or fp16 without a GPU.
        FloatingPointError: gradients or validation loss are not finite.
        OSError: the output folder cannot be written to.
    """
    if settings.fp16 and not torch.cuda.is_available():
        raise ValueError("fp16 needs a GPU, and there is none: leave --fp16 out")
    files = read_data_folder(Path(settings.data_dir))
    folder = Path(settings.output_dir)
    if (folder / "model.safetensors").is_file() and not (folder / "training_config.json").is_file():
        raise ValueError(f"{folder} holds a model without training_config.json: name another --output-dir")
    tokenizer = build_arithmetic_tokenizer(max_length=settings.max_length)
    parts = _encode_parts(files, tokenizer, settings)
    model = build_arithmetic_model(settings.model_size, max_length=settings.max_length, seed=settings.seed)
    model.config.digit_order = files["train"].digit_order  # tells the interactive command how answers are written
    run = _describe_sum_run(settings)
    with training_log(folder / "logs" / "training.log"):
        checkpoint = begin_run(run, _noted(settings, files, model), may_change=FREE_ON_RESUME)
        if settings.resume == "never":
            for stale in [*folder.glob("checkpoint-*"), folder / "model.safetensors"]:
                remove_path(stale)
        if (folder / run.results_file).is_file() and (folder / "model.safetensors").is_file():
            logger.warning(
                "%s holds this very run, finished: nothing to train (name another --output-dir for a new one)", folder
            )
            return json.loads((folder / run.results_file).read_text(encoding="utf-8"))
        _fit(run, model, parts, settings, checkpoint)
        save_arithmetic_model(model, folder)
        return _test(model, tokenizer, files["test"], settings)


def _encode_parts(
    files: dict[str, SumFile], tokenizer: PreTrainedTokenizerFast, settings: SumTrainingSettings
) -> dict[str, EncodedSums]:
    """The three parts as tokens, as many of them as the settings say."""
    parts = {
        part: encode_sums(file.examples, tokenizer, max_length=settings.max_length) for part, file in files.items()
    }
    if settings.eval_examples != -1:
        parts["val"] = parts["val"].select(torch.arange(min(settings.eval_examples, len(parts["val"]))))
    parts["train"] = repeat_one_column_sums(parts["train"], files["train"].examples, settings.one_column_repeats)
    return parts


def _describe_sum_run(settings: SumTrainingSettings) -> Run:
    has_key = bool(os.environ.get("WANDB_API_KEY")) and not settings.no_wandb
    return Run(
        folder=Path(settings.output_dir),
        resume=settings.resume,
        settings_file="training_config.json",
        results_file="test_results.json",
        metric="val_loss",
        save_every_n_steps=settings.save_steps,
        wandb=("smollm-trm-arithmetic" if has_key else None, None),
        seed=settings.seed,
        not_finite="lower --learning-rate (checkpoints written so far are kept)",
        out_of_memory="lower --batch-size or --eval-batch-size",
    )


def _noted(settings: SumTrainingSettings, files: dict[str, SumFile], model: PreTrainedModel) -> dict[str, Any]:
    """What the run is begun with: a run can only be resumed where what decides its weights is the same."""
    return {
        **asdict(settings),
        **{f"{part}_fingerprint": file.fingerprint for part, file in files.items()},
        "num_parameters": count_parameters(model),
        **run_record(),
    }


def _fit(
    run: Run,
    model: PreTrainedModel,
    parts: dict[str, EncodedSums],
    settings: SumTrainingSettings,
    checkpoint: Path | None,
) -> None:
    """Train the model in place, from a checkpoint if there is one."""
    workers = min(settings.num_workers, os.cpu_count() or 1)
    train = _loader(
        parts["train"],
        settings.batch_size,
        problem_weight=settings.problem_weight,
        seed=settings.seed,
        num_workers=workers,
    )
    num_steps = settings.count_steps(len(parts["train"]))
    logger.info("training %s on %d examples: %d steps", settings.model_size, len(parts["train"]), num_steps)
    with quiet_lightning():
        trainer = build_run_trainer(
            run,
            first_step=steps_done(checkpoint),
            callbacks=[ExportedModels(folder=run.folder, every_n_steps=settings.save_steps, num_steps=num_steps)],
            max_steps=num_steps,
            max_epochs=-(-num_steps // len(train)),
            precision="16-mixed" if settings.fp16 else "32-true",
            gradient_clip_val=1.0,
            val_check_interval=min(settings.eval_steps, num_steps),
            check_val_every_n_epoch=None,  # counted over all epochs
            log_every_n_steps=settings.logging_steps,
        )
        fit_run(
            run,
            trainer,
            SumModule(model=model, settings=settings, num_steps=num_steps),
            checkpoint=checkpoint,
            train_dataloaders=train,
            val_dataloaders=_loader(parts["val"], settings.eval_batch_size),
        )


def _loader(
    sums: EncodedSums, batch_size: int, *, problem_weight: float = 0.0, seed: int = 0, num_workers: int = 0
) -> ResumableLoader:
    batches = LengthGroupedBatches(lengths=sums.lengths.tolist(), batch_size=batch_size, seed=seed)
    dataset = SumBatches(sums=sums, problem_weight=problem_weight)
    return ResumableLoader(dataset, batches=batches, num_workers=num_workers)


def _test(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: SumFile, settings: SumTrainingSettings
) -> dict[str, Any]:
    """Evaluate the test part and write `test_results.json`."""
    started = time.perf_counter()
    results = evaluate_sums(
        model.to(default_device()),
        tokenizer,
        data,
        batch_size=settings.eval_batch_size,
        max_length=settings.max_length,
        show_progress=True,
    )
    results = {**results, "seed": settings.seed, **run_record()}
    write_json(Path(settings.output_dir) / "test_results.json", results)
    logger.info(
        "test: exact match %.2f%%, token accuracy %.2f%% on %s problems (%.0f s); all in %s",
        100 * results["exact_match"], 100 * results["token_accuracy"], f"{results['num_examples']:,}",
        time.perf_counter() - started, settings.output_dir,
    )  # fmt: skip
    return results
