"""The four commands of the arithmetic model, as typed functions: `smollm-trm arithmetic generate | train |
...`.

Each returns the text to print.
"""

import time
from pathlib import Path

import torch

from smollm_trm.arithmetic.evaluation import evaluate_sums
from smollm_trm.arithmetic.files import SumSettings, make_parts, read_sum_file, write_parts
from smollm_trm.arithmetic.interactive import converse
from smollm_trm.arithmetic.model import load_arithmetic_model
from smollm_trm.arithmetic.report import format_evaluation, plot_evaluation
from smollm_trm.arithmetic.settings import apply_preset
from smollm_trm.arithmetic.training import train_sums
from smollm_trm.models.loading import default_device
from smollm_trm.records import remove_path, run_record, write_json, write_text


def generate_arithmetic(
    *,
    num_examples: int = 100_000,
    max_digits: int = 2,
    min_operands: int = 2,
    max_operands: int = 3,
    chain: bool = True,
    digit_order: str = "normal",
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    max_length: int = 128,
    seed: int = 42,
    output_dir: str = "data",
) -> str:
    """Generate sums: train.json, val.json and test.json, no problem in two of them in any order of its
    operands.

    Args:
        num_examples: different problems in all three parts together.
        max_digits: digits of the longest operand.
        min_operands: numbers to add, at least.
        max_operands: numbers to add, at most.
        chain: write the columns between think marks.
        digit_order: order of the answer's digits, "normal" or "reversed" (units first).
        val_fraction: share of the validation part.
        test_fraction: share of the test part.
        max_length: tokens of the longest example allowed (the model's context).
        seed: the same seed and settings give the same files.
        output_dir: the data folder.
    """
    settings = SumSettings(
        num_examples=num_examples,
        max_digits=max_digits,
        min_operands=min_operands,
        max_operands=max_operands,
        chain=chain,
        digit_order=digit_order,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        max_length=max_length,
        seed=seed,
    )
    started = time.perf_counter()
    parts = make_parts(settings)
    write_parts(parts, settings, Path(output_dir))
    seconds = time.perf_counter() - started
    counts = ", ".join(f"{part} {len(lines):,}" for part, lines in parts.items())
    return f"{output_dir}: {counts} ({num_examples / seconds:,.0f} examples/s)\nfor example {parts['train'][0]}"


def train_arithmetic(
    *,
    preset: str | None = None,
    model_size: str | None = None,
    max_length: int = 128,
    batch_size: int | None = None,
    eval_batch_size: int | None = None,
    optimizer: str | None = None,
    learning_rate: float | None = None,
    weight_decay: float = 0.01,
    num_epochs: int = 10,
    max_steps: int | None = None,
    warmup_steps: int | None = None,
    problem_weight: float | None = None,
    one_column_repeats: int | None = None,
    data_dir: str = "data",
    output_dir: str = "checkpoints",
    resume: str = "auto",
    num_workers: int | None = None,
    save_steps: int | None = None,
    eval_steps: int | None = None,
    eval_examples: int | None = None,
    logging_steps: int | None = None,
    fp16: bool = False,
    no_wandb: bool = False,
    seed: int = 42,
) -> str:
    """Train a decoder on sums; a run found in the output folder is gone on with.

    Args:
        preset: "fast" for two CPU cores: its values stand wherever an option is not given.
        model_size: "small" (2.1M parameters, the default), "medium" (12.6M), "large" (25.2M) or "tiny" (0.4M).
        max_length: tokens of the model's context.
        batch_size: examples of an optimizer step (default 32).
        eval_batch_size: examples of a batch in validation and test (default 64).
        optimizer: "adamw", or "muon" for the blocks' matrices with adamw for the rest (default adamw).
        learning_rate: peak of the schedule, warm-up and then cosine (default 1e-4).
        weight_decay: decoupled, as in AdamW.
        num_epochs: passes over the training part.
        max_steps: optimizer steps; -1 leaves it to num_epochs (default -1).
        warmup_steps: steps of the linear rise (default 500).
        problem_weight: weight of the problem's own tokens in the loss (default 1.0).
        one_column_repeats: how often an epoch shows a sum of one column, where the others have a chain (default 1).
        data_dir: folder of train.json, val.json and test.json.
        output_dir: where everything is written.
        resume: "auto" goes on with a run found there, "never" starts anew; or a checkpoint file.
        num_workers: processes that prepare batches; never more than there are cores (default 4).
        save_steps: steps between checkpoints (default 1000).
        eval_steps: steps between validations (default 1000).
        eval_examples: validation examples, the first of the part; -1 takes all (default -1).
        logging_steps: steps between lines of the log (default 100).
        fp16: mixed precision (GPU only).
        no_wandb: no Weights & Biases, even where there is a key.
        seed: fixes the first weights and the order of the batches.
    """
    options = dict(locals())
    given = {name: value for name, value in options.items() if name != "preset" and value is not None}
    return format_evaluation(train_sums(apply_preset(preset, given)))


def evaluate_arithmetic(
    *,
    checkpoint: str,
    model_size: str | None = None,
    data_path: str | None = None,
    data_dir: str = "data",
    batch_size: int = 64,
    max_length: int = 128,
    output_file: str | None = None,
    device: str = "auto",
) -> str:
    """Evaluate a checkpoint on test.json of the data folder, or on another file.

    Args:
        checkpoint: a folder of a trained model, or the model.safetensors in it.
        model_size: refuse a checkpoint of another size; by default the size it has.
        data_path: a data file (overrides data_dir).
        data_dir: folder with test.json.
        batch_size: examples of a batch.
        max_length: tokens of the longest example allowed.
        output_file: write the report as JSON, and beside it a picture (.png).
        device: "auto", "cpu" or "cuda".
    """
    for name, value in (("batch_size", batch_size), ("max_length", max_length)):
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be at least 1")
    if output_file:  # before anything is computed
        write_text(probe := Path(output_file).with_name(".writable"), "")
        remove_path(probe)
    data = read_sum_file(Path(data_path) if data_path else Path(data_dir) / "test.json")
    model, tokenizer = load_arithmetic_model(Path(checkpoint), model_size=model_size)
    model.to(pick_device(device))
    report = evaluate_sums(model, tokenizer, data, batch_size=batch_size, max_length=max_length, show_progress=True)
    text = format_evaluation(report)
    if output_file:
        picture = Path(output_file).with_suffix(".png")
        write_json(Path(output_file), {"checkpoint": checkpoint, **report, **run_record()})
        plot_evaluation(report, picture)
        text += f"\nwritten: {output_file}, {picture}"
    return text


def interactive_arithmetic(
    *,
    checkpoint: str,
    model_size: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.1,
    device: str = "auto",
) -> str:
    """Type sums and watch a trained model think; a pipe works too (one expression a line).

    Args:
        checkpoint: a folder of a trained model, or the model.safetensors in it.
        model_size: refuse a checkpoint of another size; by default the size it has.
        max_new_tokens: tokens to generate at most; by default as many as the context holds.
        temperature: of sampling; 0 takes the most likely token always.
        device: "auto", "cpu" or "cuda".
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, but must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}, but must not be negative")
    model, tokenizer = load_arithmetic_model(Path(checkpoint), model_size=model_size)
    converse(model.to(pick_device(device)), tokenizer, max_new_tokens=max_new_tokens, temperature=temperature)
    return ""


def pick_device(device: str) -> torch.device:
    """ "cpu", "cuda", or "auto": a GPU where there is one.

    Raises:
        ValueError: another name, or cuda where there is none.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}, but must be one of auto, cpu, cuda")
    if device == "cuda" and default_device().type == "cpu":
        raise ValueError("device is 'cuda', but there is no GPU: use --device auto or cpu")
    return default_device() if device == "auto" else torch.device(device)
