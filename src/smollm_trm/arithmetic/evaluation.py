"""How well a model adds: greedy completions of held-out problems, judged one by one.

Is the answer right, is the chain right, and where does it first go wrong?

Exact match is decoded, not teacher-forced: the model writes chain and answer itself (Hugging Face's `generate`).
Token accuracy is teacher-forced, over the completion's tokens. The report is JSON, a page of text, and a picture.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from smollm_trm.arithmetic.data_set import SumFile
from smollm_trm.arithmetic.model import build_arithmetic_tokenizer
from smollm_trm.arithmetic.module import EncodedSums
from smollm_trm.arithmetic.rules import END, THINK, THINK_CLOSED, column_steps, count_carries, count_tokens, read_sum
from smollm_trm.bars import progress_bar
from smollm_trm.data.datamodule import ResumableLoader
from smollm_trm.evaluation.statistics import wilson_interval
from smollm_trm.records import write_whole

EXAMPLES_SHOWN = 10
WRONG_ONES_KEPT = 100
FEATURES = {
    "by_digits": lambda example: len(str(max(example.operands))),
    "by_operands": lambda example: len(example.operands),
    "by_carries": lambda example: count_carries(example.operands),
}


class Judgement(NamedTuple):
    """One completion judged."""

    answer_right: bool  # the number after the chain is the sum, and `<end>` follows
    chain_right: bool | None  # None where the problem has no chain
    place: str  # where it first goes wrong: "column 1" (units), ..., "answer"; empty where all is right
    kind: str  # how: "form", "digits", "carry", "total", "missing", "extra", "number" or "no end"; or empty


def judge_completion(gold: str, written: str) -> Judgement:
    """Compare problem and completion as a model wrote them, up to `<end>`, with the example of the data."""
    example = read_sum(gold)
    completion = written[gold.index("=") + 1 :]
    thought, closed, answer = completion.rpartition(THINK_CLOSED)
    chain_right = bool(closed) and thought == f"{THINK}{example.chain}"
    if example.chain is None:
        answer, chain_right = completion, None
    answer_right = answer == f"{example.answer}{END}"
    place, kind = "", ""
    if chain_right is False:
        place, kind = first_wrong_step(example.operands, thought if closed else completion, closed=bool(closed))
    elif not answer_right:
        of_digits = answer.removesuffix(END).isdigit()
        place, kind = "answer", ("number" if of_digits else "form") if answer.endswith(END) else "no end"
    return Judgement(answer_right, chain_right, place, kind)


def first_wrong_step(operands: Sequence[int], thought: str, *, closed: bool) -> tuple[str, str]:
    """Place and kind of the first difference between the right chain and a wrong one."""
    if not thought.startswith(THINK):
        return "column 1", "form"
    steps, right_steps = thought.removeprefix(THINK).removesuffix(END).split(" "), column_steps(operands)
    for column, (step, right) in enumerate(zip_longest(steps, right_steps), start=1):
        if step != right:
            return f"column {column}", judge_step(step, right, num_operands=len(operands))
    return f"column {len(right_steps)}", "form" if closed else "no end"


def judge_step(step: str | None, right: str | None, *, num_operands: int) -> str:
    """Kind of the mistake in one step, which may be one too many (no right one) or one too few."""
    if right is None:
        return "extra"
    if not step:
        return "missing"
    terms, equals, total = step.partition("=")
    written, wanted = terms.split("+"), right.partition("=")[0].split("+")
    if not equals or not all(number.isdigit() for number in (*written, total)):
        return "form"
    if written[:num_operands] != wanted[:num_operands]:
        return "digits"
    return "carry" if written != wanted else "total"


def summarise_judged(judged: Sequence[Judgement]) -> dict[str, Any]:
    """Counts and shares of some judged completions, exact match with its 95% interval."""
    right = sum(judgement.answer_right for judgement in judged)
    chains = [judgement.chain_right for judgement in judged if judgement.chain_right is not None]
    return {
        "num_examples": len(judged),
        "exact_match": right / len(judged),
        "exact_match_95": list(wilson_interval(right, len(judged))),
        "chain_accuracy": sum(chains) / len(chains) if chains else None,
        "right_answer_after_wrong_chain": sum(one.answer_right and one.chain_right is False for one in judged),
    }


def break_down(examples: Sequence[str], judged: Sequence[Judgement]) -> dict[str, dict[str, dict]]:
    """The same by digits, operands and carries of the problems: `{"by_digits": {"1": ..., "2": ...}, ...}`."""
    tables = {}
    for name, feature in FEATURES.items():
        groups = defaultdict(list)
        for example, judgement in zip(examples, judged, strict=True):
            groups[feature(read_sum(example))].append(judgement)
        tables[name] = {str(key): summarise_judged(groups[key]) for key in sorted(groups)}
    return tables


@torch.inference_mode()
def complete_sums(
    model: PreTrainedModel, problems: Sequence[str], *, batch_size: int, max_new_tokens: int, temperature: float = 0.0
) -> list[str]:
    """Problems such as `"12+34="`, in their order, with what a model writes behind them, up to `<end>`."""
    tokenizer = build_arithmetic_tokenizer()
    to_tensors = {"padding": True, "padding_side": "left", "return_tensors": "pt", "return_token_type_ids": False}
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    by_length = sorted(range(len(problems)), key=lambda place: len(problems[place]))
    written = [""] * len(problems)
    starts = range(0, len(problems), batch_size)
    for start in progress_bar(iterable=starts, desc="decoding", unit="batch", disable=len(starts) == 1):
        places = by_length[start : start + batch_size]
        batch = tokenizer([problems[place] for place in places], **to_tensors).to(model.device)
        rows = model.generate(**batch, max_new_tokens=max_new_tokens, **sampling)
        for place, text in zip(places, tokenizer.batch_decode(rows[:, batch["input_ids"].shape[1] :]), strict=True):
            completion, end, _ = text.partition(END)
            written[place] = problems[place] + completion + end
    return written


@torch.inference_mode()
def token_accuracy(model: PreTrainedModel, lines: list[str], *, batch_size: int, max_length: int) -> float:
    """Share of the completions' tokens that are the model's first choice, given the right tokens before."""
    right, wanted = 0, 0
    for batch in ResumableLoader(EncodedSums(lines, max_length=max_length), batch_size=batch_size):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        predicted = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].argmax(dim=-1)
        is_target = batch["is_completion"][:, 1:]
        right += int(((predicted == batch["input_ids"][:, 1:]) & is_target).sum())
        wanted += int(is_target.sum())
    return right / wanted


def evaluate_sums(model: PreTrainedModel, data: SumFile, *, batch_size: int = 64, max_length: int = 128) -> dict:
    """Evaluate a model, on its device, on a data file; everything a report needs, as plain JSON."""
    model.eval()
    max_length = min(max_length, model.config.max_position_embeddings)
    accuracy = token_accuracy(model, data.examples, batch_size=batch_size, max_length=max_length)
    problems = [line[: line.index("=") + 1] for line in data.examples]
    # a completion longer than the longest right one is wrong whatever follows
    longest = max(count_tokens(line) - len(problem) for line, problem in zip(data.examples, problems, strict=True))
    started = time.perf_counter()
    written = complete_sums(model, problems, batch_size=batch_size, max_new_tokens=longest)
    seconds = time.perf_counter() - started
    judged = [judge_completion(gold, text) for gold, text in zip(data.examples, written, strict=True)]
    first_mistakes = Counter((judgement.place, judgement.kind) for judgement in judged if judgement.place)
    shown = [
        {"expected": gold, "written": text, "answer_right": judgement.answer_right, "place": judgement.place}
        for gold, text, judgement in zip(data.examples, written, judged, strict=True)
    ]
    return {
        "data": {"path": str(data.path), "fingerprint": data.fingerprint},
        **summarise_judged(judged),
        "token_accuracy": accuracy,
        "problems_per_second": round(len(problems) / seconds, 1),
        **break_down(data.examples, judged),
        "mistakes": [{"place": place, "kind": kind, "count": n} for (place, kind), n in first_mistakes.most_common()],
        "examples": shown[:EXAMPLES_SHOWN],
        "wrong": [row for row in shown if row["place"]][:WRONG_ONES_KEPT],
    }


def format_evaluation(report: dict) -> str:
    """The report of `evaluate_sums` as text: scores, breakdowns, and where chains go wrong."""
    low, high = report["exact_match_95"]
    chain = report["chain_accuracy"]
    lines = [
        f"Exact Match Accuracy: {report['exact_match']:.2%}  (95% interval {low:.1%} to {high:.1%})",
        f"Token-Level Accuracy: {report['token_accuracy']:.2%}",
        f"Right Chains:         {'no chains in this data' if chain is None else f'{chain:.2%}'}",
        f"Number of Examples:   {report['num_examples']}  ({report['problems_per_second']:.0f} problems/s decoded)",
    ]
    for table in FEATURES:
        lines += ["", f"{table.removeprefix('by_'):>10}  examples  exact match   chain"]
        for key, row in report[table].items():
            chain = "" if row["chain_accuracy"] is None else f"{row['chain_accuracy']:.2%}"
            lines.append(f"{key:>10}  {row['num_examples']:>8}  {row['exact_match']:>11.2%} {chain:>7}")
    if report["mistakes"]:
        lines += ["", "first mistake        kind     count"]
        lines += [f"{row['place']:<20} {row['kind']:<8} {row['count']:>5}" for row in report["mistakes"]]
    if report["wrong"]:
        first = report["wrong"][0]
        lines += ["", f"for example {first['written']}", f"should be   {first['expected']}"]
    return "\n".join(lines)


def plot_evaluation(report: dict, path: Path) -> None:
    """Draw exact match by digits, operands and carries, and where completions first go wrong, as a PNG."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplot_mosaic([list(FEATURES), ["mistakes"] * len(FEATURES)])
    for table in FEATURES:
        rows = report[table]
        bars = panels[table].bar(list(rows), [100 * row["exact_match"] for row in rows.values()], color="tab:blue")
        panels[table].bar_label(bars, [f"n={row['num_examples']}" for row in rows.values()], fontsize=7)
        panels[table].set(xlabel=table.removeprefix("by_"), ylabel="exact match, %", ylim=(0, 108))
    counts = {f"{row['place']}, {row['kind']}": row["count"] for row in reversed(report["mistakes"])}
    panels["mistakes"].bar_label(panels["mistakes"].barh(list(counts), list(counts.values()), color="tab:red"))
    panels["mistakes"].set_title("where a completion first goes wrong" if counts else "no mistakes")
    figure.suptitle(f"{report['num_examples']} problems, exact match {report['exact_match']:.2%}")
    write_whole(path, lambda unfinished: figure.savefig(unfinished, format="png", dpi=110))
