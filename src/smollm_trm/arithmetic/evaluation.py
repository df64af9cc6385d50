"""How well a model adds: greedy completions of held-out problems, judged one by one.

Exact match is decoded, not teacher-forced: the model writes chain and answer itself, in batches of equal
problem length (Hugging Face's `generate`). Token accuracy is teacher-forced, over the completion's tokens.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from smollm_trm.arithmetic.batches import SumBatches, encode_sums
from smollm_trm.arithmetic.diagnosis import Judgement, judge_completion
from smollm_trm.arithmetic.files import SumFile
from smollm_trm.arithmetic.rules import WrittenSum, count_carries, count_tokens, read_sum
from smollm_trm.arithmetic.tokenizer import show_tokens
from smollm_trm.data.batching import LengthGroupedBatches
from smollm_trm.evaluation.statistics import wilson_interval

EXAMPLES_SHOWN = 10
WRONG_ONES_KEPT = 100


@torch.inference_mode()
def complete_sums(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    show_progress: bool = False,
) -> list[str]:
    """Let the model complete problems greedily; returns problem and completion, up to `<end>`, in their
    order.

    Args:
        model: any Hugging Face causal LM, on its device.
        tokenizer: of the 16 tokens.
        problems: texts such as `"12+34="`.
        batch_size: problems decoded together.
        max_new_tokens: tokens after which a completion that has not ended is cut.
        show_progress: draw a bar.
    """
    by_length = sorted(range(len(problems)), key=lambda place: len(problems[place]))
    written = [""] * len(problems)
    starts = range(0, len(problems), batch_size)
    wait = 0.1 if sys.stderr.isatty() else 10.0  # seconds between lines
    for start in tqdm(starts, desc="decoding", unit="batch", mininterval=wait, disable=not show_progress):
        places = by_length[start : start + batch_size]
        batch = tokenizer(
            [problems[place] for place in places],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            return_token_type_ids=False,
        ).to(model.device)
        rows = model.generate(**batch, do_sample=False, max_new_tokens=max_new_tokens)
        completions = rows[:, batch["input_ids"].shape[1] :].tolist()
        for place, completion in zip(places, completions, strict=True):
            written[place] = problems[place] + show_tokens(tokenizer, completion)
    return written


@torch.inference_mode()
def token_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    lines: list[str],
    *,
    batch_size: int,
    max_length: int,
) -> float:
    """Share of the completions' tokens that are the model's first choice, given the right tokens before.

    Raises:
        ValueError: an example is longer than max_length.
    """
    sums = encode_sums(lines, tokenizer, max_length=max_length)
    batches = SumBatches(sums=sums, problem_weight=0.0)
    right, wanted = 0, 0
    for rows in LengthGroupedBatches(lengths=sums.lengths.tolist(), batch_size=batch_size):
        batch = {name: tensor.to(model.device) for name, tensor in batches[rows].items()}
        predicted = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].argmax(dim=-1)
        is_target = batch["is_completion"][:, 1:]
        right += int(((predicted == batch["input_ids"][:, 1:]) & is_target).sum())
        wanted += int(is_target.sum())
    return right / wanted


def evaluate_sums(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    data: SumFile,
    *,
    batch_size: int = 64,
    max_length: int = 128,
    show_progress: bool = False,
) -> dict:
    """Evaluate a model on a data file; everything a report needs, as plain JSON.

    Args:
        model: the decoder, on its device.
        tokenizer: of the 16 tokens.
        data: the examples.
        batch_size: examples of a batch.
        max_length: tokens of the longest example allowed, at most the model's context.
        show_progress: draw a bar.

    Raises:
        ValueError: an example is longer than max_length or the model's context.
    """
    was_training = model.training
    model.eval()
    max_length = min(max_length, model.config.max_position_embeddings)
    accuracy = token_accuracy(model, tokenizer, data.examples, batch_size=batch_size, max_length=max_length)
    problems = [line[: line.index("=") + 1] for line in data.examples]
    # a completion longer than the longest right one is wrong whatever follows
    longest = max(count_tokens(line) - len(problem) for line, problem in zip(data.examples, problems, strict=True))
    started = time.perf_counter()
    written = complete_sums(
        model, tokenizer, problems, batch_size=batch_size, max_new_tokens=longest, show_progress=show_progress
    )
    seconds = time.perf_counter() - started
    model.train(was_training)
    judged = [
        judge_completion(gold, text, digit_order=data.digit_order)
        for gold, text in zip(data.examples, written, strict=True)
    ]
    return {
        "data": {"path": str(data.path), "fingerprint": data.fingerprint},
        **summarise(judged),
        "token_accuracy": accuracy,
        "problems_per_second": round(len(problems) / seconds, 1),
        **_breakdowns([read_sum(line) for line in data.examples], judged),
        "mistakes": _confusion(judged),
        "examples": _shown(data.examples, written, judged, only_wrong=False)[:EXAMPLES_SHOWN],
        "wrong": _shown(data.examples, written, judged, only_wrong=True)[:WRONG_ONES_KEPT],
    }


def summarise(judged: Sequence[Judgement]) -> dict[str, float | int | list[float] | None]:
    """Counts and shares of some judged completions, exact match with its 95% interval."""
    right = sum(judgement.answer_right for judgement in judged)
    chains = [judgement.chain_right for judgement in judged if judgement.chain_right is not None]
    return {
        "num_examples": len(judged),
        "exact_match": right / len(judged),
        "exact_match_95": list(wilson_interval(right, len(judged))),
        "chain_accuracy": sum(chains) / len(chains) if chains else None,
        "right_answer_after_wrong_chain": sum(
            judgement.answer_right and judgement.chain_right is False for judgement in judged
        ),
    }


def _breakdowns(sums: list[WrittenSum], judged: list[Judgement]) -> dict[str, dict[str, dict]]:
    features: dict[str, Callable[[WrittenSum], int]] = {
        "by_digits": lambda written: len(str(max(written.operands))),
        "by_operands": lambda written: len(written.operands),
        "by_carries": lambda written: count_carries(written.operands),
    }
    tables = {}
    for name, feature in features.items():
        groups: dict[int, list[Judgement]] = {}
        for written, judgement in zip(sums, judged, strict=True):
            groups.setdefault(feature(written), []).append(judgement)
        tables[name] = {str(key): summarise(groups[key]) for key in sorted(groups)}
    return tables


def _confusion(judged: list[Judgement]) -> list[dict[str, str | int]]:
    """Where the wrong ones first go wrong, and how: the most frequent first."""
    counts = Counter((judgement.place, judgement.kind) for judgement in judged if judgement.place)
    return [{"place": place, "kind": kind, "count": count} for (place, kind), count in counts.most_common()]


def _shown(gold: list[str], written: list[str], judged: list[Judgement], *, only_wrong: bool) -> list[dict]:
    return [
        {"expected": right, "written": text, "answer_right": judgement.answer_right, "place": judgement.place}
        for right, text, judgement in zip(gold, written, judged, strict=True)
        if not only_wrong or judgement.place
    ]
