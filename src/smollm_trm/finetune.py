"""`train_gsm8k`: one call that trains LoRA and a reasoner on GSM8K, resumes, and leaves a usable model behind.

It stands above `training` and `evaluation`, which do not know each other: `trainer.test` answers as `evaluate` does.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer

from smollm_trm.data.answers import annotations_in
from smollm_trm.data.gsm8k import GSM8KSplits
from smollm_trm.evaluation.evaluate import evaluate_gsm8k
from smollm_trm.models.loading import BaseAndTokenizer, device_and_precision
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.storage import CONFIG_FILE, read_config
from smollm_trm.records import UserMistake, run_record, settings_from, write_json, write_whole
from smollm_trm.training.checkpoints import only_run_in
from smollm_trm.training.loggers import quiet_lightning
from smollm_trm.training.module import SmolLMTRMLightningModule
from smollm_trm.training.parts import (
    Rows,
    build_data,
    build_module,
    build_trainer,
    check_fits,
    describe_run,
    gather_splits,
    pick_precision,
)
from smollm_trm.training.reasoner_first import ReasonerFirstModule
from smollm_trm.training.run import begin_run, fit_run, load_average, steps_done
from smollm_trm.training.settings import TrainSettings
from smollm_trm.training.watch import Speedometer

logger = logging.getLogger(__name__)

MAY_CHANGE = (
    *("resume", "progress", "output_dir", "data_dir", "wandb_project", "wandb_name", "save_every_n_steps"),
    *("gradient_checkpointing", "eval_batch_size", "patience", "sample_answers", "trust_remote_code"),
)
ONLY_WITH_TRM = (
    *("reasoner", "num_latents", "latents_per_step", "reasoner_steps", "trm_kwargs", "trm_learning_rate"),
    "supervise",
)
ALONE, ROWS_ALONE, RATE_ALONE = "reasoner", 32, 2.0
"""Of the reasoner alone: its folder in the run's, rows per step, learning rate as a multiple of that beside LoRA."""


def uncounted(settings: TrainSettings) -> tuple[str, ...]:
    return MAY_CHANGE if settings.use_trm else MAY_CHANGE + ONLY_WITH_TRM


def run_identity(settings: TrainSettings, *, split: str) -> str:
    """Eight characters that two runs share where one may go on as the other: a good end for a folder's name."""
    counted = {name: value for name, value in asdict(settings).items() if name not in uncounted(settings)}
    return hashlib.sha256(json.dumps([counted, split], sort_keys=True).encode()).hexdigest()[:8]


def train_gsm8k(
    *,
    train_dataset: Rows | None = None,
    test_dataset: Rows | None = None,
    base: BaseAndTokenizer | None = None,
    module_class: type[SmolLMTRMLightningModule] = SmolLMTRMLightningModule,
    **config: Any,
) -> tuple[Trainer, SmolLMTRMLightningModule]:
    """Train LoRA and a reasoner, on GSM8K unless told otherwise.

        trainer, module = train_gsm8k(data_dir="gsm8k", num_latents=64, target="answer")

    Args:
        train_dataset: rows `{question, answer}` to train on, in place of GSM8K.
        test_dataset: the dev part: it is validated on and may pick a checkpoint. Reports call it "dev".
        base: `model_name` as it is loaded already, with its tokenizer and without an adapter (`model.unload()`); it is
            taken over, so that several trainings need one load.
        module_class: what is trained on, where another loss is wanted.
        config: fields of `TrainSettings`.

    Returns:
        The trainer and the module. `module.model` holds the averaged weights of the checkpoint with the best dev loss;
        the same model lies in `output_dir/model`, and the run's figures in `output_dir/results.json`.

    Raises:
        UserMistake: a setting that cannot be, before anything expensive starts.
        OSError, FloatingPointError, RuntimeError: no space left, a run that diverged, too little memory; what helps.
    """
    settings = settings_from(TrainSettings, config, "train_gsm8k")
    if torch.cuda.is_available() and settings.devices > torch.cuda.device_count():
        raise UserMistake(f"devices={settings.devices}: this machine has {torch.cuda.device_count()} GPU(s)")
    check_fits(settings)
    run = describe_run(settings)
    pick_precision(settings.precision)
    splits = gather_splits(settings, train_dataset, test_dataset)
    with only_run_in(run.folder), quiet_lightning():
        noted = {**asdict(settings), "split": splits.fingerprint}
        start = begin_run(run, noted, may_change=uncounted(settings), may_rise=True)
        first_step = steps_done(start.checkpoint)
        precision, dtype = pick_precision(settings.precision)
        options = {"base": base, "module_class": module_class, "answer_test": answer_test}
        if settings.reasoner_steps and settings.use_trm and has_results(splits):
            rows = {"train_dataset": train_dataset, "test_dataset": test_dataset}
            options["base"] = train_reasoner(settings, **rows, base=base)
        module = build_module(settings, splits, dtype, begins_at=start.raised_at, **options)
        data = build_data(settings, splits, module)
        n_batches = -(-len(data.train_set) // (settings.batch_size * settings.devices * settings.num_nodes))
        trainer = build_trainer(settings, run, start, precision=precision, n_batches=n_batches)
        parts, rows = list(module.parameters()), settings.batch_size * settings.accumulate_grad_batches
        trained = sum(p.numel() for p in parts if p.requires_grad)
        total = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in parts)  # two of 4 bits in a byte
        logger.info(
            f"training {trained:,} of {total:,} parameters on {len(data.train_set):,} examples, {rows} a step and "
            f"process, on {trainer.strategy.root_device} in {precision}, into {run.folder}"
        )
        fit_run(run, trainer, module, checkpoint=start.checkpoint, datamodule=data)
        if trainer.global_step == first_step:
            logger.warning("%s: this run ended at step %d; nothing was trained", run.folder, first_step)
        finish_run(trainer, module, settings, n_batches=n_batches, trained=trainer.global_step > first_step)
    return trainer, module


def train_reasoner(
    settings: TrainSettings, *, train_dataset: Rows | None, test_dataset: Rows | None, base: BaseAndTokenizer | None
) -> SmolLMv3WithTRM:
    """The reasoner alone, before the adapter: a run of its own in `output_dir/reasoner`; the base stands still."""
    several = settings.devices * settings.num_nodes > 1  # nothing asks the halting head here
    strategy = "ddp_find_unused_parameters_true" if several else settings.strategy
    alone = replace(
        settings,
        reasoner_steps=0,
        max_steps=settings.reasoner_steps,
        num_epochs=1_000_000,  # the steps end it
        base_training="frozen",
        lora_kwargs={},
        learning_rate=TrainSettings.learning_rate,
        strategy=strategy,
        batch_size=ROWS_ALONE,
        accumulate_grad_batches=1,
        trm_learning_rate=RATE_ALONE * settings.optimizer_settings().reasoner_learning_rate,
        val_check_interval=max(1, settings.reasoner_steps // 6),
        patience=None,
        sample_answers=0,
        resume="never" if settings.resume == "never" else "auto",
        output_dir=str(Path(settings.output_dir) / ALONE),
    )
    logger.info("the reasoner alone, %d steps of %d rows", alone.max_steps, alone.batch_size)
    rows = {"train_dataset": train_dataset, "test_dataset": test_dataset}
    _, module = train_gsm8k(**rows, base=base, module_class=ReasonerFirstModule, **vars(alone))
    return module.model


def has_results(splits: GSM8KSplits) -> bool:
    """Whether training and dev rows have calculator annotations, whose results a reasoner alone is asked for."""
    parts = {"training": splits.gsm8k_train, "dev": splits.gsm8k_test}
    without = [name for name, rows in parts.items() if not any(annotations_in(row["answer"]) for row in rows)]
    if without:
        told = "no %s row has a calculator annotation <<...>>: the reasoner has no results to learn alone, left out"
        logger.warning(told, without[0])
    return not without


def answer_test(module: SmolLMTRMLightningModule, rows: Sequence[Mapping[str, str]], batch_idx: int) -> float:
    """Answer a process's share of the official test problems for `trainer.test`, keep all, return the accuracy."""
    trainer = module.trainer
    share = module.global_rank + batch_idx * trainer.world_size
    path = Path(trainer.default_root_dir) / "evaluation" / f"trainer_test{f'_{share}' if share else ''}.jsonl"
    data = trainer.datamodule
    size, split = (32, None) if data is None else (data.eval_batch_size, data.splits.summary)
    result = evaluate_gsm8k(module.model, rows, batch_size=size, predictions_path=path)
    write_json(path.with_suffix(".json"), {"part": "test", "split": split, **result, **run_record()})
    return result["accuracy"]


def finish_run(
    trainer: Trainer, module: SmolLMTRMLightningModule, settings: TrainSettings, *, n_batches: int, trained: bool
) -> None:
    """Take the best averaged weights, save the model for use, write the run's figures."""
    folder, kept = Path(settings.output_dir), trainer.checkpoint_callback
    load_average(module, kept.best_path)
    module.eval().to(trainer.strategy.root_device)  # Lightning leaves it on the CPU
    if not trainer.is_global_zero or (not trained and is_exported(folder)):
        return
    data, steps_per_epoch = trainer.datamodule, -(-n_batches // settings.accumulate_grad_batches)
    seconds = next(part.seconds for part in trainer.callbacks if isinstance(part, Speedometer))
    if settings.reasoner_steps and settings.use_trm and (folder / ALONE / "results.json").is_file():
        seconds += json.loads((folder / ALONE / "results.json").read_text(encoding="utf-8"))["seconds"]
    figures = {
        "dev_loss": kept.best_loss,
        "best_step": kept.best_step,
        "optimizer_steps": trainer.global_step,
        "epochs": round(trainer.global_step / steps_per_epoch, 3),
        "seconds": round(seconds, 1),
        "train_rows": len(data.train_set),
        "dropped_rows": data.train_set.dropped,
        "dev_rows": len(data.dev_set),
        "split": data.splits.summary,
    }
    with suppress(UserMistake):  # a model that is exported again keeps its evaluations
        module.model.config.notes |= {} if trained else read_config(folder / "model").notes
    module.model.config.notes |= {"training": figures}
    write_whole(folder / "model", module.model.save_pretrained)
    figures |= {"settings": asdict(settings), **device_and_precision(module.model)}
    write_json(folder / "results.json", {**figures, "model_files": exported_files(folder), **run_record()})


def exported_files(folder: Path) -> dict[str, str]:
    """Bytes and checksum (of its first 256 MiB) of each file of a run's saved model, but for the two that evaluations
    write in."""
    found = {}
    for path in sorted((folder / "model").rglob("*")):
        if path.is_file() and path.name not in (CONFIG_FILE, "README.md"):
            with open(path, "rb") as file:
                found[path.name] = f"{path.stat().st_size} {hashlib.sha256(file.read(2**28)).hexdigest()}"
    return found


def is_exported(folder: Path) -> bool:
    """Whether a finished run's results and its saved model are there and whole."""
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        return bool(read_config(folder / "model")) and results["model_files"] == exported_files(folder)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False
