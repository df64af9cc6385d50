"""What a training run is made of: rows, model, loader, trainer, each from the settings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer

from smollm_trm.data.answers import strip_annotations
from smollm_trm.data.datamodule import GSM8KDataModule
from smollm_trm.data.gsm8k import GSM8KSplits, load_gsm8k, split_fingerprint, split_gsm8k
from smollm_trm.data.reasoning_dataset import ReasoningDataset
from smollm_trm.data.rows import normalize_question
from smollm_trm.models.blocks import refuse_too_large
from smollm_trm.models.loading import BaseAndTokenizer, base_config, default_dtype
from smollm_trm.models.reasoners.known import build_reasoner
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.storage import read_config, saved_model_folder
from smollm_trm.models.tiny import TINY_DEPTH, TINY_HIDDEN_SIZE
from smollm_trm.records import UserMistake, picked
from smollm_trm.training.module import SmolLMTRMLightningModule
from smollm_trm.training.run import Run, Start, build_run_trainer
from smollm_trm.training.settings import PRECISIONS, TrainSettings
from smollm_trm.training.stages import Stages
from smollm_trm.training.watch import CollapseWarning, SampleAnswers

Rows = Sequence[Mapping[str, str]]
FITTED_ON = 64
"""Training questions that a fresh reasoner's statistics are measured on."""

OUT_OF_MEMORY = (
    "set gradient_checkpointing=True, then lower batch_size (and raise accumulate_grad_batches), "
    "num_latents or max_length"
)
NOT_FINITE = (
    "lower learning_rate or trm_learning_rate, or train with precision='bf16-mixed' (slower on a GPU without bf16, "
    "such as a T4, but it fits; '32-true' needs twice the memory)"
)


def check_fits(settings: TrainSettings) -> None:
    """Refuse a reasoner that cannot be, by one line, before anything is loaded but the base's configuration."""
    num_latents = settings.most_latents
    if not num_latents:
        return
    size, depth = TINY_HIDDEN_SIZE, TINY_DEPTH
    if settings.load_model_path is not None:
        config = read_config(saved_model_folder(settings.load_model_path))
        size, depth = config.hidden_size, config.num_hidden_layers
    elif settings.model_name != "tiny":
        config = base_config(settings.model_name, trust_remote_code=settings.trust_remote_code)
        size, depth = config.hidden_size, config.num_hidden_layers
    shape = {"num_latents": num_latents, "hidden_size": size, "depth": depth}
    with torch.device("meta"):
        reasoner = build_reasoner(settings.reasoner, settings.trm_kwargs, **shape)
    refuse_too_large("training the reasoner", reasoner, copies=5)  # with its gradient, Adam's two and the average


def gather_splits(settings: TrainSettings, train_dataset: Rows | None, test_dataset: Rows | str | None) -> GSM8KSplits:
    """The parts to train and validate on: given rows (`test_dataset` is the dev part), an own file, or GSM8K."""
    if train_dataset is None and settings.dataset_path is None:
        if test_dataset is not None:
            raise UserMistake("test_dataset was given without train_dataset: give both, or neither for GSM8K")
        return load_gsm8k(settings.data_dir, seed=settings.split_seed)
    columns = picked(settings, "question_column", "answer_column")
    rows = list(ReasoningDataset(settings.dataset_path if train_dataset is None else train_dataset, **columns))
    test_dataset = settings.dev_path if test_dataset is None and train_dataset is None else test_dataset
    if test_dataset is None:
        train, dev = split_gsm8k(rows, seed=settings.split_seed)
    else:
        dev = list(ReasoningDataset(test_dataset, **columns))
        held_out = {normalize_question(row["question"]) for row in dev}
        train = [row for row in rows if normalize_question(row["question"]) not in held_out]
    if not train or not dev:
        raise UserMistake(f"{len(train)} rows to train on and {len(dev)} for dev: both need at least 1")
    return GSM8KSplits(
        gsm8k_train=train,
        gsm8k_test=dev,
        gsm8k_final_test=[],
        seed=settings.split_seed,
        source=settings.dataset_path or "given rows",
        fingerprint=split_fingerprint(train, dev),
        duplicates=len(rows) - len(train) - (len(dev) if test_dataset is None else 0),
    )


def pick_precision(precision: str) -> tuple[str, torch.dtype]:
    """Lightning's precision and the dtype of the base's weights, that of autocast; what is trained stays fp32."""
    dtypes = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    if precision == "auto":
        precision = next(name for name, dtype in dtypes.items() if dtype == default_dtype())
    precision = PRECISIONS.get(precision, precision)
    if precision == "16-mixed" and not torch.cuda.is_available():
        raise UserMistake("precision='16-mixed' needs a GPU, and there is none: choose 'auto', 'fp32' or 'bf16'")
    return precision, dtypes[precision]


def build_module(
    settings: TrainSettings,
    splits: GSM8KSplits,
    dtype: torch.dtype,
    *,
    base: BaseAndTokenizer | SmolLMv3WithTRM | None = None,
    module_class: type[SmolLMTRMLightningModule] = SmolLMTRMLightningModule,
    **options: Any,
) -> SmolLMTRMLightningModule:
    """The model with a fresh adapter and reasoner, on a base that is loaded, or loaded here; on an earlier model
    of ours it goes on with that one's reasoner. What is trained is fp32."""
    texts = [f"{row['question']}\n{strip_annotations(row['answer'])}" for row in splits.gsm8k_train[:4000]]
    dtype = torch.float32 if settings.wants_fp32_base else dtype
    if settings.load_model_path is not None:
        where = {"device": "cpu", "load_in_4bit": settings.load_in_4bit}
        base = SmolLMv3WithTRM.from_pretrained(settings.load_model_path, dtype=dtype, **where)
    goes_on = isinstance(base, SmolLMv3WithTRM) and base.config.reasoner == settings.model_config()["reasoner"]
    model = SmolLMv3WithTRM.from_base(
        settings.model_name if base is None else base,
        lora=settings.lora_settings(),
        dtype=dtype,
        tiny_texts=texts,
        seed=settings.seed,
        calibration=(),
        trust_remote_code=settings.trust_remote_code,
        load_in_4bit=settings.load_in_4bit and base is None,
        **settings.model_config(),
    )
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return module_class(
        model=model.train(),
        optimizer_settings=settings.optimizer_settings(),
        supervise=settings.supervise,
        seed=settings.seed,
        fitted_on=[] if goes_on else [row["question"] for row in splits.gsm8k_train[:FITTED_ON]],
        **options,
    )


def build_data(settings: TrainSettings, splits: GSM8KSplits, module: SmolLMTRMLightningModule) -> GSM8KDataModule:
    """The rows as the model's own encoder writes them, encoded."""
    names = ("batch_size", "eval_batch_size", "max_length", "max_samples", "max_dev_samples", "seed")
    options = picked(settings, *names, "curriculum")
    if settings.use_trm and settings.target == "answer":  # elsewhere the model writes its steps
        options["latents_per_step"] = settings.latents_per_step
        options["repeat_last"] = module.model.reasoner is not None and module.model.reasoner.repeats_last
    data = GSM8KDataModule(encoder=module.model.encoder, splits=splits, **options)
    data.setup("fit")
    return data


def pick_intervals(settings: TrainSettings, n_batches: int) -> dict[str, Any]:
    """When Lightning is to validate and to log, given the batches of an epoch per process. Validations fall on
    optimizer steps: what an unfinished accumulation holds is in no checkpoint."""
    interval, accumulate = settings.val_check_interval, settings.accumulate_grad_batches
    wanted = interval * n_batches if interval <= 1 else interval
    steps = -(-n_batches // accumulate)
    intervals: dict[str, Any] = {"log_every_n_steps": max(1, min(10, steps // 10))}
    if wanted >= n_batches:
        return {**intervals, "val_check_interval": 1.0, "check_val_every_n_epoch": round(wanted / n_batches)}
    return {**intervals, "val_check_interval": min(n_batches, max(1, int(wanted / accumulate)) * accumulate)}


def describe_run(settings: TrainSettings) -> Run:
    staged = settings.curriculum is not None and settings.curriculum.staged
    return Run(
        patience=None if staged else settings.patience,
        **picked(settings, "resume", "save_every_n_steps", "ema_decay", "seed", "progress"),
        folder=Path(settings.output_dir),
        wandb=(settings.wandb_project, settings.wandb_name),
        not_finite=NOT_FINITE,
        out_of_memory=OUT_OF_MEMORY,
    )


def build_trainer(settings: TrainSettings, run: Run, start: Start, *, precision: str, n_batches: int) -> Trainer:
    """Lightning's trainer for the settings, given the batches of an epoch."""
    own = picked(settings, "devices", "num_nodes", "strategy", "max_steps", "accumulate_grad_batches")
    steps = -(-n_batches // settings.accumulate_grad_batches)  # an epoch's; a raised max_steps needs more of them
    epochs = max(settings.num_epochs, -(-settings.max_steps // steps)) if start.raised_at else settings.num_epochs
    stages = []
    if settings.curriculum is not None:
        stages.append(Stages(reset_optimizer=settings.reset_optimizer))
        if settings.strategy == "auto" and settings.devices * settings.num_nodes > 1:
            own["strategy"] = "ddp_find_unused_parameters_true"  # in stage 0 nothing asks the reasoner
    return build_run_trainer(
        run,
        start,
        callbacks=[CollapseWarning(), SampleAnswers(settings.sample_answers), *stages],
        precision=precision,
        max_epochs=epochs,
        gradient_clip_val=settings.gradient_clip,
        **pick_intervals(settings, n_batches),
        **own,
    )
