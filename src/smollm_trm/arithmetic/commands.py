"""The four commands `smollm-trm arithmetic generate | train | evaluate | interactive`: each returns what is printed."""

from pathlib import Path

import torch

from smollm_trm.arithmetic.data_set import make_parts, read_sum_file, write_parts
from smollm_trm.arithmetic.evaluation import evaluate_sums, format_evaluation, plot_evaluation
from smollm_trm.arithmetic.interactive import converse
from smollm_trm.arithmetic.model import load_arithmetic_model
from smollm_trm.arithmetic.settings import SumSettings, SumTrainingSettings
from smollm_trm.arithmetic.training import train_sums
from smollm_trm.models.loading import default_device
from smollm_trm.records import UserMistake, check_choice, check_range, remove_path, run_record, write_json, write_text


def generate_arithmetic(settings: SumSettings) -> str:
    """Write a data folder."""
    parts = make_parts(settings)
    write_parts(parts, settings)
    counts = ", ".join(f"{part} {len(lines):,}" for part, lines in parts.items())
    return f"{settings.output_dir}: {counts}\nfor example {parts['train'][0]}"


def train_arithmetic(settings: SumTrainingSettings) -> str:
    """Train a decoder and test it."""
    return format_evaluation(train_sums(settings))


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
    check_range(1, batch_size=batch_size, max_length=max_length)
    if output_file:  # before anything is computed
        if Path(output_file).is_dir() or Path(output_file).suffix == ".png":
            raise UserMistake(f"output_file={output_file!r}: name a JSON file; its picture gets the same name")
        write_text(probe := Path(output_file).with_name(".writable"), "")
        remove_path(probe)
    data = read_sum_file(Path(data_path) if data_path else Path(data_dir) / "test.json")
    model = load_arithmetic_model(Path(checkpoint), model_size=model_size).to(pick_device(device))
    report = evaluate_sums(model, data, batch_size=batch_size, max_length=max_length)
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
) -> None:
    """Type sums and watch a trained model think; a pipe works too (one expression a line).

    Args:
        checkpoint: a folder of a trained model, or the model.safetensors in it.
        model_size: refuse a checkpoint of another size; by default the size it has.
        max_new_tokens: tokens to generate at most; by default as many as the context holds.
        temperature: of sampling; 0 takes the most likely token always.
        device: "auto", "cpu" or "cuda".
    """
    check_range(1, max_new_tokens=max_new_tokens)
    check_range(0, temperature=temperature)
    model = load_arithmetic_model(Path(checkpoint), model_size=model_size).to(pick_device(device))
    converse(model, max_new_tokens=max_new_tokens, temperature=temperature)


def pick_device(device: str) -> torch.device:
    """ "cpu", "cuda", or "auto": a GPU where there is one."""
    check_choice(("auto", "cpu", "cuda"), device=device)
    if device == "cuda" and not torch.cuda.is_available():
        raise UserMistake("device='cuda': there is no GPU; use auto or cpu")
    return default_device() if device == "auto" else torch.device(device)
