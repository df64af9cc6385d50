"""How many problems of GSM8K (or of any rows like it) a model solves.

Greedy and batched by default, on every problem given, with room for the longest gold solution. Prompts of
similar length share a batch, and results come back in the dataset's order. With `latents="shuffled"` every
problem is answered from another problem's latents: if the score stays the same, the latents are ignored.
"""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from smollm_trm.data.answers import strip_annotations
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
from smollm_trm.records import UserMistake

SPARE_TOKENS = 16  # beyond the longest gold completion, for a model that words it a little longer
VOTE_TEMPERATURE = 0.7


def evaluate_gsm8k(
    model: object,
    dataset: Sequence[Mapping[str, str]],
    max_samples: int | None = None,
    batch_size: int = 32,
    *,
    max_new_tokens: int | None = None,
    latents: str = "own",
    samples_per_problem: int = 1,
    seed: int = 0,
    predictions_path: str | Path | None = None,
    progress: bool = True,
    **generation_kwargs,
) -> dict:
    """Let a model answer problems, and grade it.

    Args:
        model: anything whose `generate_with_thinking(questions, return_details=True, ...)` gives a list of objects
            with `text`, `n_tokens` and `cut_off`.
        dataset: rows `{question, answer}`, the answer ending in `#### n` or nothing but a number.
        max_samples: answer only the first so many problems; all when None.
        batch_size: texts generated at once.
        max_new_tokens: limit of each text; when None, the longest gold completion and a little more.
        latents: "own", or "shuffled": each problem gets the latents of another, drawn by `seed`.
        samples_per_problem: texts per problem; above 1 they are sampled and the commonest answer counts.
        seed: of the sampling and of the shuffle.
        predictions_path: JSONL file that every prediction goes to; an unfinished one is continued.
        generation_kwargs: passed on to `generate()`; greedy unless `do_sample=True`.

    Returns:
        `accuracy`, `correct`, `total`, `interval` (95%), `strict_accuracy`, `examples` (the first 10),
        `tokens_per_second`, `seconds`, `cut_off` (texts that used all tokens without ending), `correct_by_problem`,
        `settings` (with the problems' fingerprint), `device`, `precision` and more; all of it JSON.

    Raises:
        UserMistake: no problems, an impossible setting, or another evaluation's file.
        ValueError: a row without a final number.
    """
    rows = _checked_rows(dataset, max_samples)
    _check_settings(model, batch_size, max_new_tokens, latents, samples_per_problem, generation_kwargs)
    options = {"do_sample": samples_per_problem > 1, **generation_kwargs}
    if samples_per_problem > 1:
        options.setdefault("temperature", VOTE_TEMPERATURE)
    options["max_new_tokens"] = max_new_tokens or longest_completion(model, rows) + SPARE_TOKENS
    donors = shuffled_donors(rows, seed) if latents == "shuffled" else None
    sampled = options["do_sample"]
    exact = device_and_precision(model)["precision"] in (None, "float32")
    settings = {
        "problems": split_fingerprint(rows),
        "total": len(rows),
        "model": model_fingerprint(model),
        "latents": latents,
        "num_latents": getattr(model, "num_latents", None),
        "samples_per_problem": samples_per_problem,
        "seed": seed if sampled or donors else None,
        "batch_size": batch_size if sampled or not exact else None,  # what greedy texts in fp32 do not depend on
        "generation": dict(sorted(options.items())),
    }
    file = PredictionFile(settings=settings, path=predictions_path)
    bar = tqdm(total=len(rows), initial=len(file.by_index), unit="problem", disable=not progress)
    with bar, _evaluating(model):
        for batch in _batches(rows, max(1, batch_size // samples_per_problem)):
            if all(index in file.by_index for index in batch):
                continue
            with torch.random.fork_rng(range(torch.cuda.device_count()), enabled=sampled):
                if sampled:
                    torch.manual_seed(seed + batch[0])
                file.add(_answer(model, rows, batch, donors, samples_per_problem, options))
            bar.update(len(file.by_index) - bar.n)
            right = sum(line["correct"] for line in file.by_index.values())
            bar.set_postfix_str(f"{100 * right / len(file.by_index):.1f}% right")
    return {**summarised_predictions(file.by_index.values(), file.settings, file.path), **device_and_precision(model)}


def longest_completion(model: object, rows: Sequence[Mapping[str, str]]) -> int:
    """Tokens of the longest gold completion, end of text included, in the form that the model is to write."""
    if (encoder := getattr(model, "encoder", None)) is not None:
        return max(len(encoder.encode_completion(row["answer"])) for row in rows)
    if (tokenizer := getattr(model, "tokenizer", None)) is None:
        raise UserMistake("max_new_tokens: give a number, since this model has no tokenizer to measure answers with")
    return max(len(tokenizer(strip_annotations(row["answer"]))["input_ids"]) for row in rows) + 1


def shuffled_donors(rows: Sequence[Mapping[str, str]], seed: int) -> list[int]:
    """For each problem another one that lends its latents; each lends once, none to an equal question.

    Raises:
        UserMistake: too few different questions.
    """
    draw = random.Random(seed)
    for _ in range(100):
        order = draw.sample(range(len(rows)), len(rows))  # one cycle through all, so no problem keeps its own
        donor_of = dict(zip(order, order[1:] + order[:1], strict=True))
        if all(rows[at]["question"] != rows[donor]["question"] for at, donor in donor_of.items()):
            return [donor_of[at] for at in range(len(rows))]
    raise UserMistake(f"cannot shuffle latents between {len(rows)} problems: too few different questions")


def _checked_rows(dataset: Sequence[Mapping[str, str]], max_samples: int | None) -> list[dict[str, str]]:
    if max_samples is not None and max_samples < 1:
        raise UserMistake(f"max_samples={max_samples}: give at least 1, or None for all problems")
    count = len(dataset) if max_samples is None else min(len(dataset), max_samples)
    if count == 0:
        raise UserMistake("the dataset has no problems to evaluate on")
    return [check_row(row_with_final_mark(dataset[at]), where=f"problem {at} of the dataset") for at in range(count)]


def _check_settings(
    model: object, batch_size: int, max_new_tokens: int | None, latents: str, samples_per_problem: int, options: dict
) -> None:
    counts = {"batch_size": batch_size, "samples_per_problem": samples_per_problem, "max_new_tokens": max_new_tokens}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserMistake(f"{name}={value}: give at least 1")
    if latents not in ("own", "shuffled"):
        raise UserMistake(f"latents={latents!r}: choose 'own' or 'shuffled'")
    if latents == "shuffled" and not getattr(model, "use_trm", True):
        raise UserMistake("latents='shuffled': this model has no latents; evaluate it with latents='own'")
    if samples_per_problem > 1 and options.get("do_sample") is False:
        raise UserMistake(f"samples_per_problem={samples_per_problem} needs sampling; leave do_sample=False out")
    if options.get("num_return_sequences", 1) != 1:
        raise UserMistake("num_return_sequences is not for evaluation; use samples_per_problem")


def _batches(rows: Sequence[Mapping[str, str]], size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first: if memory runs out, it does so at once."""
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["question"]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def _answer(
    model: object,
    rows: Sequence[Mapping[str, str]],
    batch: list[int],
    donors: list[int] | None,
    samples: int,
    options: dict,
) -> list[dict]:
    """Graded predictions of one batch of indices."""

    def repeated(indices: Sequence[int]) -> list[str]:
        return [rows[index]["question"] for index in indices for _ in range(samples)]

    lent = {} if donors is None else {"latents_from": repeated([donors[index] for index in batch])}
    start = time.perf_counter()
    try:
        completions = model.generate_with_thinking(repeated(batch), return_details=True, **lent, **options)
    except torch.OutOfMemoryError as error:
        advice = f"out of memory with {len(batch) * samples} texts at once: lower batch_size or max_new_tokens"
        raise torch.OutOfMemoryError(f"{advice}; predictions already on disk are kept") from error
    seconds = (time.perf_counter() - start) / len(batch)
    own = [completions[at : at + samples] for at in range(0, len(completions), samples)]
    return [graded_prediction(index, rows[index], its, seconds=seconds) for index, its in zip(batch, own, strict=True)]


@contextmanager
def _evaluating(model: object) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    if modes:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
