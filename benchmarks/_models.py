"""What the speed benchmarks share: rows, bases of a stated size, timed training, figures of several rounds."""

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback

from smollm_trm.data.answers import strip_annotations
from smollm_trm.data.batching import IGNORED_LABEL
from smollm_trm.data.gsm8k import GSM8KSplits, load_gsm8k, split_fingerprint
from smollm_trm.data.word_problems import generate_word_problems, write_word_problems
from smollm_trm.data.word_stories import WordProblemSettings
from smollm_trm.demo import DemoSize, demo_base_settings
from smollm_trm.finetune import train_gsm8k
from smollm_trm.models.loading import BaseAndTokenizer, no_progress_bars
from smollm_trm.models.tiny import build_tiny_model, train_tiny_tokenizer
from smollm_trm.training.loggers import quiet_lightning
from smollm_trm.training.parts import build_data, build_module, build_trainer, describe_run
from smollm_trm.training.run import Start
from smollm_trm.training.settings import TrainSettings

CHECKOUT = Path(__file__).parents[1]
DEMO_BASE = CHECKOUT / "outputs" / "demo" / "base" / "model"
Rows = list[dict[str, str]]


def gsm8k_like_rows(count: int) -> tuple[Rows, str]:
    """Training rows of GSM8K where it lies on this machine, else long word problems; and which of the two."""
    folder = Path(os.environ.get("GSM8K_DIR", CHECKOUT.parent / "shared" / "data" / "gsm8k"))
    if (folder / "train.jsonl").is_file():
        return load_gsm8k(folder).gsm8k_train[:count], "GSM8K train"
    settings = WordProblemSettings(min_steps=4, max_steps=6)
    return generate_word_problems(count=count, seed=0, settings=settings), "word problems of 4-6 steps"


def save_sized_base(folder: Path, rows: Rows, *, vocabulary: int, **shape: int) -> str:
    """Write a SmolLM3 with random weights, and a tokenizer trained on the rows; returns the folder.

    Args:
        folder: where to.
        rows: what the tokenizer is trained on.
        vocabulary: its size.
        shape: see `build_tiny_model`.
    """
    texts = [f"{row['question']}\n{strip_annotations(row['answer'])}" for row in rows]
    tokenizer = train_tiny_tokenizer(texts, vocab_size=vocabulary)
    with no_progress_bars():
        build_tiny_model(tokenizer, **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_demo_problems(folder: Path, size: DemoSize, *, seed: int) -> Path:
    """The demo's training and test problems; returns the folder with both files."""
    counts = {"train": size.train_problems, "test": size.test_problems}
    return write_word_problems(folder / "data", **counts, seed=seed, settings=size.problems)


def trained_base(folder: Path) -> str | BaseAndTokenizer:
    """The demo's base, trained on word problems: a folder, or trained anew as `make demo` does (two minutes)."""
    if (folder / "config.json").is_file():
        return str(folder)
    print("no trained base in that folder: training one as the demo does", flush=True)
    size = DemoSize()
    with tempfile.TemporaryDirectory() as temporary:
        write_demo_problems(Path(temporary), size, seed=0)
        _, module = train_gsm8k(**demo_base_settings(Path(temporary), size, seed=0))
    return module.model, module.model.tokenizer


def held_out_problems(count: int) -> Rows:
    """Word problems as the demo's, among which are neither its training nor its test problems."""
    size = DemoSize()
    total = size.train_problems + size.test_problems + count
    return generate_word_problems(count=total, seed=0, settings=size.problems)[-count:]


def trm_in_heads_of_32(width: int) -> dict[str, int]:
    """Fields of `TRMSettings` for a narrow TRM: attention is cheapest in few heads."""
    heads = max(1, width // 32)
    return {"dim": width, "n_heads": heads, "compression_heads": heads}


class StepClock(Callback):
    """CPU seconds, rows and supervised tokens from the first training step to the end of the last."""

    def __init__(self) -> None:
        self.rows = self.tokens = self.columns = 0
        self.started: float | None = None
        self.seconds = 0.0

    def on_train_batch_start(self, trainer: Any, module: Any, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Start with the first batch."""
        if self.started is None:
            self.started = time.process_time()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop after this batch, unless another comes."""
        self.rows += len(batch["labels"])
        self.tokens += int((batch["labels"] != IGNORED_LABEL).sum())
        self.columns += batch["labels"].numel()
        self.seconds = time.process_time() - self.started


def time_training(rows: Rows, **settings: Any) -> StepClock:
    """One epoch over the rows with all that `train_gsm8k` does: loader, callbacks, optimizer, schedule, EMA.

    Args:
        rows: to train on.
        settings: fields of `TrainSettings`.
    """
    fingerprint = split_fingerprint(rows)
    splits = GSM8KSplits(rows, rows[:1], [], seed=0, source="benchmark", fingerprint=fingerprint, duplicates=0)
    with tempfile.TemporaryDirectory() as folder, quiet_lightning():
        chosen = TrainSettings(
            accumulate_grad_batches=1, num_epochs=1, max_length=2048, progress=False, precision="32-true", seed=0,
            output_dir=folder, **settings,
        )  # fmt: skip
        module = build_module(chosen, splits, torch.float32)
        data = build_data(chosen, splits, module)
        n_batches = -(-len(data.train_set) // chosen.batch_size)
        trainer = build_trainer(chosen, describe_run(chosen), Start(), precision="32-true", n_batches=n_batches)
        clock = StepClock()
        trainer.callbacks.append(clock)
        trainer.fit(module, datamodule=data)
    return clock


def over_rounds(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest of several rounds."""
    return {"median": round(statistics.median(values), 3), "low": round(min(values), 3), "high": round(max(values), 3)}


def as_text(figure: dict[str, float], unit: str = "") -> str:
    """`over_rounds` for a table."""
    return f"{figure['median']:.2f}{unit} ({figure['low']:.2f}-{figure['high']:.2f})"
