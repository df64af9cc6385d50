"""How many problems of GSM8K (or of any rows like it) a model solves.

Greedy and batched by default, on every problem given, with room for the longest gold solution. Prompts of
similar length share a batch, and results come back in the dataset's order. With `latents="shuffled"` every
problem is answered from another problem's latents: if the score stays the same, the latents are ignored.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smollm_trm.bars import KeepMoving, progress_bar
from smollm_trm.data.gsm8k import split_fingerprint
from smollm_trm.data.reasoning_dataset import row_with_final_mark
from smollm_trm.data.rows import check_row
from smollm_trm.evaluation.predictions import (
    PredictionFile,
    graded_prediction,
    model_fingerprint,
    summarised_predictions,
)
from smollm_trm.models.loading import device_and_precision
from smollm_trm.records import UserMistake, remove_path

SPARE_TOKENS = 16  # beyond the longest gold completion, for a model that words it a little longer
VOTE_TEMPERATURE = 0.7


@torch.no_grad()
def evaluate_gsm8k(
    model: Any,
    dataset: Sequence[Mapping[str, str]],
    max_samples: int | None = None,
    batch_size: int = 32,
    *,
    max_new_tokens: int | None = None,
    latents: str = "own",
    samples_per_problem: int = 1,
    seed: int = 0,
    predictions_path: str | Path | None = None,
    overwrite: bool = False,
    worked_examples: Sequence[Mapping[str, str]] = (),
    progress: bool = True,
    **generation_kwargs: Any,
) -> dict:
    """Let a model answer problems, and grade it.

    Args:
        overwrite: make predictions anew, whatever is at `predictions_path`.
        worked_examples: problems shown with their solutions before each question, to an untuned base.

    Returns:
        `accuracy`, `correct`, `total`, `interval` (95%), `strict_accuracy`, `cot_match`, `examples` (the first 10),
        `tokens_per_second`, `seconds`, `cut_off` (texts that used all tokens without ending), `correct_by_problem`,
        `settings` (with the problems' fingerprint), `device`, `precision` and more; all of it JSON.
    """
    counts = {"max_samples": max_samples, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
    _check_settings(model, {**counts, "samples_per_problem": samples_per_problem}, latents, generation_kwargs)
    rows = [row_with_final_mark(row) for row in islice(dataset, max_samples)]
    rows = [check_row(row, where=f"problem {at} of the dataset", words=True) for at, row in enumerate(rows)]
    if not rows:
        raise UserMistake("the dataset has no problems to evaluate on")
    options = {"do_sample": samples_per_problem > 1, **generation_kwargs}
    if samples_per_problem > 1:
        options.setdefault("temperature", VOTE_TEMPERATURE)
    options["max_new_tokens"] = max_new_tokens or longest_completion(model, rows) + SPARE_TOKENS
    before = shown_first(model, worked_examples)
    asked_by_chat = not model.config.think and model.config.prompt_format == "chat"
    donors = shuffled_donors(rows, seed) if latents == "shuffled" else None
    sampled, precision = options["do_sample"], device_and_precision(model)["precision"]
    settings = {
        "problems": split_fingerprint(rows),
        "total": len(rows),
        "model": model_fingerprint(model),
        "latents": latents,
        "num_latents": model.num_latents,
        "samples_per_problem": samples_per_problem,
        "seed": seed if sampled or donors else None,
        "batch_size": None if precision == "float32" and not sampled else batch_size,  # changes no text then
        "generation": dict(sorted(options.items())),
        **({"shots": len(worked_examples), "examples": split_fingerprint(worked_examples)} if before else {}),
        **({"prompt_format": "chat"} if asked_by_chat else {}),
    }
    if overwrite and predictions_path is not None:
        remove_path(Path(predictions_path))
    file = PredictionFile(settings=settings, path=predictions_path, rows=rows)
    bar = progress_bar(total=len(rows), initial=len(file.by_index), unit="problem", disable=not progress)
    moving = KeepMoving(bar, at_most=options["max_new_tokens"])
    written = {**options, "stopping_criteria": [moving]}
    with bar, _evaluating(model):
        for batch in _batches(rows, max(1, batch_size // samples_per_problem)):
            if all(index in file.by_index for index in batch):
                continue
            with torch.random.fork_rng(range(torch.cuda.device_count()), enabled=sampled):
                if sampled:
                    torch.manual_seed(seed + batch[0])
                file.add(_answer(model, rows, batch, donors, samples_per_problem, written, before))
            right = sum(line["correct"] for line in file.by_index.values())
            moving.show_score(f"{100 * right / len(file.by_index):.1f}% right")
            bar.update(len(file.by_index) - bar.n)
    return {**summarised_predictions(file.by_index.values(), file.settings), **device_and_precision(model)}


def shown_first(model: Any, worked_examples: Sequence[Mapping[str, str]]) -> str:
    """Worked examples as they stand before a question, to an untuned base; nothing without any."""
    if worked_examples and model.config.think:
        raise UserMistake("worked examples are for an untuned base: this model is asked as it was trained")
    shown = [(row["question"], model.encoder.completion_text(row["answer"])) for row in worked_examples]
    return "".join(f"{question}\nAnswer:{solution}\n\nQuestion: " for question, solution in shown)


def longest_completion(model: Any, rows: Sequence[Mapping[str, str]]) -> int:
    """Tokens of the longest gold completion, end of text included, in the form that the model is to write."""
    return max(len(model.encoder.encode_completion(row["answer"])) for row in rows)


def shuffled_donors(rows: Sequence[Mapping[str, str]], seed: int) -> list[int]:
    """For each problem another one that lends its latents; each lends once, none to an equal question."""
    draw = random.Random(seed)
    for _ in range(100):
        order = draw.sample(range(len(rows)), len(rows))  # one cycle through all, so no problem keeps its own
        donor_of = dict(zip(order, order[1:] + order[:1], strict=True))
        if all(rows[at]["question"] != rows[donor]["question"] for at, donor in donor_of.items()):
            return [donor_of[at] for at in range(len(rows))]
    raise UserMistake(f"cannot shuffle latents between {len(rows)} problems: too few different questions")


def _check_settings(model: Any, counts: Mapping[str, int | None], latents: str, options: Mapping[str, Any]) -> None:
    if not callable(getattr(model, "generate_with_thinking", None)):
        told = f"evaluate_gsm8k({type(model).__name__}, ...): it cannot be asked"
        raise UserMistake(f"{told}; give SmolLMv3WithTRM.from_pretrained(folder), or the `.model` of a trained module")
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserMistake(f"{name}={value}: give at least 1")
    if latents not in ("own", "shuffled"):
        raise UserMistake(f"latents={latents!r}: choose 'own' or 'shuffled'")
    if latents == "shuffled" and not model.use_trm:
        raise UserMistake("latents='shuffled': this model has no latents; evaluate it with latents='own'")
    if (samples := counts["samples_per_problem"]) > 1 and options.get("do_sample") is False:
        raise UserMistake(f"samples_per_problem={samples} needs sampling; leave do_sample=False out")
    if options.get("num_return_sequences", 1) != 1:
        raise UserMistake("num_return_sequences is not for evaluation; use samples_per_problem")


def _batches(rows: Sequence[Mapping[str, str]], size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first: if memory runs out, it does so at once."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["question"]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _answer(
    model: Any,
    rows: Sequence[Mapping[str, str]],
    batch: list[int],
    donors: list[int] | None,
    n: int,
    options: dict,
    before: str,
) -> list[dict]:
    """Graded predictions of one batch of indices, from n texts for each."""
    asked = [at for at in batch for _ in range(n)]
    lent = {} if donors is None else {"latents_from": [rows[donors[at]]["question"] for at in asked]}
    questions, start = [before + rows[at]["question"] for at in asked], time.perf_counter()
    try:
        completions = model.generate_with_thinking(questions, return_details=True, **lent, **options)
    except torch.OutOfMemoryError as error:
        advice = f"out of memory with {len(asked)} texts at once: lower batch_size or max_new_tokens"
        raise torch.OutOfMemoryError(f"{advice}; predictions already on disk are kept") from error
    seconds = (time.perf_counter() - start) / len(batch)
    graded = []
    for at, index in enumerate(batch):
        own, steps = completions[at * n :][:n], model.encoder.written_steps(rows[index]["answer"])
        graded.append(graded_prediction(index, rows[index], own, seconds=seconds, steps=steps))
    return graded


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
