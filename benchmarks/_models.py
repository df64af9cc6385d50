"""What the speed benchmarks share: rows, bases of a stated size, timed training, arms that take turns."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smollm_trm.data.answers import strip_annotations
from smollm_trm.data.batching import IGNORED_LABEL
from smollm_trm.data.gsm8k import GSM8KSplits, load_gsm8k, split_fingerprint
from smollm_trm.data.word_problems import WordProblemSettings, generate_word_problems, write_word_problems
from smollm_trm.demo import DemoSize
from smollm_trm.models.loading import load_base
from smollm_trm.models.tiny import build_tiny_model, train_tiny_tokenizer
from smollm_trm.training.loggers import quiet_lightning
from smollm_trm.training.module import SmolLMTRMLightningModule
from smollm_trm.training.parts import build_data, build_trainer
from smollm_trm.training.settings import TrainSettings
from smollm_trm.training.train import train_gsm8k

CHECKOUT = Path(__file__).parents[1]
DEMO_BASE = CHECKOUT / "outputs" / "demo" / "base" / "model" / "base"
Rows = list[dict[str, str]]


def gsm8k_like_rows(count: int) -> tuple[Rows, str]:
    """Training rows of GSM8K where it lies on this machine, else long word problems; and which of the two."""
    folder = Path(os.environ.get("GSM8K_DIR", CHECKOUT.parent / "shared" / "data" / "gsm8k"))
    if (folder / "train.jsonl").is_file():
        return load_gsm8k(folder).gsm8k_train[:count], "GSM8K train"
    settings = WordProblemSettings(min_steps=4, max_steps=6)
    return generate_word_problems(count=count, seed=0, settings=settings), "word problems of 4-6 steps"


def sized_base(
    rows: Rows, *, vocabulary: int, hidden_size: int, n_layers: int, n_heads: int, intermediate_size: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM3's class with random weights, and a tokenizer trained on the rows."""
    texts = [f"{row['question']}\n{strip_annotations(row['answer'])}" for row in rows]
    tokenizer = train_tiny_tokenizer(texts, vocab_size=vocabulary)
    base = build_tiny_model(
        tokenizer, hidden_size=hidden_size, n_layers=n_layers, n_heads=n_heads, intermediate_size=intermediate_size
    )
    return base, tokenizer


def trained_base(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The demo's base, trained on word problems: from a folder, or trained anew as `make demo` does (two minutes)."""
    if (folder / "config.json").is_file():
        return load_base(str(folder))
    print(f"no base in {folder.name}/: training one as the demo does")
    size = DemoSize()
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        write_word_problems(data, train=size.train_problems, test=1, seed=0, settings=size.problems)
        _, module = train_gsm8k(
            data_dir=str(data), model_name="tiny", base_training="full", use_trm=False, learning_rate=4e-3,
            batch_size=size.batch_size, eval_batch_size=128, accumulate_grad_batches=1, num_epochs=1000,
            max_steps=size.base_steps, val_check_interval=size.base_steps, patience=None, seed=0,
            output_dir=str(Path(temporary) / "base"),
        )  # fmt: skip
    return module.model.causal_lm, module.model.tokenizer


class StepClock(Callback):
    """CPU seconds, wall seconds, rows and supervised tokens from the first training step to the last."""

    def __init__(self) -> None:
        self.rows = self.tokens = 0
        self.started = self.cpu = self.wall = None

    def on_train_batch_start(self, trainer: Any, module: Any, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Start with the first batch."""
        self.started = self.started or (time.process_time(), time.perf_counter())

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop after this batch, unless another comes."""
        self.rows += len(batch["labels"])
        self.tokens += int((batch["labels"] != IGNORED_LABEL).sum())
        self.cpu, self.wall = time.process_time() - self.started[0], time.perf_counter() - self.started[1]


def time_training(
    base: tuple[PreTrainedModel, PreTrainedTokenizerBase], rows: Rows, *, batch_size: int, **settings: Any
) -> StepClock:
    """One epoch over the rows as `train_gsm8k` makes it: loader, module, callbacks, optimizer, schedule, EMA.

    Args:
        base: the model, which is changed, and its tokenizer.
        rows: to train on.
        batch_size: rows per step.
        settings: fields of `TrainSettings`.
    """
    split = GSM8KSplits(
        rows, rows[:1], [], seed=0, source="benchmark", fingerprint=split_fingerprint(rows), duplicates=0
    )
    with tempfile.TemporaryDirectory() as folder, quiet_lightning():
        chosen = TrainSettings(
            batch_size=batch_size, accumulate_grad_batches=1, num_epochs=1, max_length=2048, progress=False,
            precision="32-true", output_dir=folder, **settings,
        )  # fmt: skip
        module = fresh_module(base, chosen)
        data = build_data(chosen, split, module)
        trainer = build_trainer(
            chosen, Path(folder), precision="32-true", n_batches=-(-len(rows) // batch_size), first_step=0
        )
        clock = StepClock()
        trainer.callbacks.append(clock)
        trainer.fit(module, datamodule=data)
    return clock
