"""`train_gsm8k`: one call that trains LoRA and a reasoner on GSM8K, resumes, and leaves a usable model behind."""

import logging
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import EarlyStopping, LearningRateMonitor, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger

from smollm_trm.data.answers import strip_annotations
from smollm_trm.data.datamodule import GSM8KDataModule
from smollm_trm.data.gsm8k import GSM8KSplits, load_gsm8k, split_fingerprint, split_gsm8k
from smollm_trm.data.reasoning_dataset import ReasoningDataset
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.records import refuse_other_settings, run_record, settings_from, write_json
from smollm_trm.training.checkpoints import WholeCheckpointIO, checkpoint_callbacks, newest_good_checkpoint
from smollm_trm.training.ema import AverageWeights
from smollm_trm.training.module import SmolLMTRMLightningModule
from smollm_trm.training.settings import TrainSettings
from smollm_trm.training.watch import CollapseWarning, NonFiniteGuard, Speedometer, require_finite

logger = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, str]]

MAY_CHANGE = ("resume", "progress", "output_dir", "data_dir", "wandb_project", "wandb_name", "save_every_n_steps")
OUT_OF_MEMORY = (
    "out of memory: set gradient_checkpointing=True, then lower batch_size (and raise accumulate_grad_batches), "
    "num_latents or max_length"
)


def pick_precision(precision: str) -> tuple[str, torch.dtype]:
    """Lightning's precision and the dtype of the base's weights.

    "auto": bf16 on GPUs of compute capability 8 and up, fp16 below (a T4 claims bf16 but only emulates it), fp32 on a
    CPU. The base's weights get the dtype that autocast computes in; what is trained stays fp32.
    """
    if precision == "auto":
        if not torch.cuda.is_available():
            precision = "32-true"
        else:
            precision = "bf16-mixed" if torch.cuda.get_device_capability() >= (8, 0) else "16-mixed"
    dtypes = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    if precision not in dtypes:
        raise ValueError(f"precision={precision!r}: choose 'auto', '32-true', 'bf16-mixed' or '16-mixed'")
    return precision, dtypes[precision]


def gather_splits(settings: TrainSettings, train_dataset: Rows | None, test_dataset: Rows | None) -> GSM8KSplits:
    """The parts to train and validate on: given rows, an own file, or GSM8K.

    Args:
        settings: `dataset_path`, `data_dir` and `seed` count here.
        train_dataset: rows to train on.
        test_dataset: the dev part (the documents call the 20% part "test").
    """
    if train_dataset is None and settings.dataset_path is None:
        if test_dataset is not None:
            raise ValueError("test_dataset was given without train_dataset: give both, or neither for GSM8K")
        return load_gsm8k(settings.data_dir, seed=settings.seed)
    given = ReasoningDataset(settings.dataset_path) if train_dataset is None else train_dataset
    rows = [dict(row) for row in given]
    if test_dataset is None:
        train, dev = split_gsm8k(rows, seed=settings.seed)
    else:
        train, dev = rows, [dict(row) for row in test_dataset]
    if not train or not dev:
        raise ValueError(f"{len(train)} rows to train on and {len(dev)} for dev: both need at least 1")
    return GSM8KSplits(
        gsm8k_train=train,
        gsm8k_test=dev,
        gsm8k_final_test=[],
        seed=settings.seed,
        source=settings.dataset_path or "given rows",
        fingerprint=split_fingerprint(train, dev),
        duplicates=0 if test_dataset is not None else len(rows) - len(train) - len(dev),
    )


def build_loggers(folder: Path, *, wandb_project: str | None, wandb_name: str | None) -> list[Logger]:
    """CSV always, TensorBoard where installed, Weights & Biases only where a key is set: nothing ever asks for one."""
    loggers: list[Logger] = [CSVLogger(str(folder), name="logs", version="")]
    try:
        from pytorch_lightning.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(str(folder), name="tensorboard", version=""))
    except ModuleNotFoundError:
        logger.info("tensorboard is not installed: losses go to logs/metrics.csv only")
    if wandb_project and os.environ.get("WANDB_API_KEY"):
        from pytorch_lightning.loggers import WandbLogger

        loggers.append(WandbLogger(project=wandb_project, name=wandb_name, save_dir=str(folder)))
    return loggers


def enable_checkpointing(model: SmolLMv3WithTRM) -> None:
    """Trade time for memory in the base: keep no activations, compute them again in the backward pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its replacement is not in every supported version
        model.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def build_trainer(settings: TrainSettings, folder: Path, precision: str) -> Trainer:
    """Lightning's trainer with our callbacks."""
    callbacks: list[Callback] = [
        NonFiniteGuard(),
        AverageWeights(limit=settings.ema_decay),
        CollapseWarning(),
        Speedometer(),
        LearningRateMonitor(logging_interval="step"),
        *checkpoint_callbacks(folder / "checkpoints", save_every_n_steps=settings.save_every_n_steps),
    ]
    if settings.patience is not None:
        callbacks.append(EarlyStopping(monitor="dev_loss", patience=settings.patience, mode="min"))
    if settings.progress:
        callbacks.append(TQDMProgressBar())
    interval = settings.val_check_interval
    return Trainer(
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=settings.strategy,
        precision=precision,
        max_epochs=settings.num_epochs,
        max_steps=settings.max_steps,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        gradient_clip_val=settings.gradient_clip,
        val_check_interval=interval if interval <= 1 else int(interval),
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        callbacks=callbacks,
        plugins=[WholeCheckpointIO()],
        logger=build_loggers(folder, wandb_project=settings.wandb_project, wandb_name=settings.wandb_name),
        default_root_dir=str(folder),
        use_distributed_sampler=False,
        enable_progress_bar=settings.progress,
        enable_model_summary=False,
    )


def checkpoint_to_resume(settings: TrainSettings, folder: Path) -> Path | None:
    """The checkpoint that `resume` asks for; a run begun with other settings is refused."""
    if settings.resume == "never":
        for stale in (folder / "checkpoints").glob("*.ckpt"):
            stale.unlink()
        return None
    refuse_other_settings(folder / "settings.json", asdict(settings), ignored=MAY_CHANGE)
    if settings.resume == "auto":
        return newest_good_checkpoint(folder / "checkpoints")
    if not Path(settings.resume).is_file():
        raise ValueError(f"resume={settings.resume!r}: no such file; choose 'auto', 'never' or a checkpoint file")
    return Path(settings.resume)


def load_average(module: SmolLMTRMLightningModule, checkpoint: Path) -> None:
    """Put a checkpoint's averaged weights into the model."""
    averages = torch.load(checkpoint, map_location="cpu", weights_only=True)["callbacks"]["AverageWeights"]["averages"]
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
        RuntimeError: out of memory, with the settings that help.
    """
    settings = settings_from(TrainSettings, config, "train_gsm8k")
    precision, dtype = pick_precision(settings.precision)
    folder = Path(settings.output_dir)
    checkpoint = checkpoint_to_resume(settings, folder)
    splits = gather_splits(settings, train_dataset, test_dataset)
    write_json(folder / "settings.json", asdict(settings))
    texts = [f"{row['question']}\n{strip_annotations(row['answer'])}" for row in splits.gsm8k_train[:4000]]
    model = SmolLMv3WithTRM.from_base(
        settings.model_name,
        settings=settings.model_settings(),
        lora=settings.lora_settings(),
        dtype=dtype,
        tiny_texts=texts,
        seed=settings.seed,
    )
    if settings.gradient_checkpointing:
        enable_checkpointing(model)
    module = SmolLMTRMLightningModule(
        model=model,
        optimizer_settings=settings.optimizer_settings(),
        supervise=settings.supervise,
        seed=settings.seed,
    )
    data = GSM8KDataModule(
        encoder=model.encoder,
        splits=splits,
        batch_size=settings.batch_size,
        eval_batch_size=settings.eval_batch_size,
        max_length=settings.max_length,
        max_samples=settings.max_samples,
        seed=settings.seed,
    )
    trainer = build_trainer(settings, folder, precision)
    started = time.perf_counter()
    try:
        module.train()
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint and str(checkpoint), weights_only=True)
    except torch.OutOfMemoryError as error:
        raise RuntimeError(OUT_OF_MEMORY) from error
    finish_run(trainer, module, settings, splits, seconds=time.perf_counter() - started)
    return trainer, module


def finish_run(
    trainer: Trainer,
    module: SmolLMTRMLightningModule,
    settings: TrainSettings,
    splits: GSM8KSplits,
    *,
    seconds: float,
) -> None:
    """Take the best averaged weights, save the model for use, write the run's figures."""
    folder = Path(settings.output_dir)
    best = trainer.checkpoint_callback.best_model_path
    if best:
        load_average(module, Path(best))
    module.eval()
    if not trainer.is_global_zero:
        return
    best_loss = trainer.checkpoint_callback.best_model_score
    figures = {
        "dev_loss": None if best_loss is None else require_finite("dev_loss", float(best_loss)),
        "optimizer_steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "seconds": round(seconds, 1),
        "train_rows": len(trainer.datamodule.train_set),
        "dropped_rows": trainer.datamodule.train_set.dropped,
        "dev_rows": len(trainer.datamodule.dev_set),
        "split": {"fingerprint": splits.fingerprint, "seed": splits.seed, "source": splits.source},
    }
    module.model.save_pretrained(folder / "model", training=figures)
    write_json(folder / "results.json", {**figures, "settings": asdict(settings), **run_record()})
