"""What a model wrote, judged: is the answer right, is the chain right, and where does it first go wrong?"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from smollm_trm.arithmetic.rules import END, THINK, THINK_CLOSED, column_steps, count_carries, read_sum
from smollm_trm.evaluation.statistics import wilson_interval

FEATURES = {
    "by_digits": lambda example: len(str(max(example.operands))),
    "by_operands": lambda example: len(example.operands),
    "by_carries": lambda example: count_carries(example.operands),
}


class Judgement(NamedTuple):
    """One completion judged."""

    answer_right: bool
    """The number after the chain is the sum, and `<end>` follows."""
    chain_right: bool | None
    """The chain is the right one, None where the problem has none."""
    place: str
    """Where it first goes wrong: "column 1" (units), ..., "answer"; empty where all is right."""
    kind: str
    """How: "form", "digits", "carry", "total", "missing", "extra", "number" or "no end"; empty where all is right."""


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
    right_steps = column_steps(operands)
    steps = thought.removeprefix(THINK).removesuffix(END).split(" ")
    for number, right in enumerate(right_steps, start=1):
        if number > len(steps) or not steps[number - 1]:
            return f"column {number}", "missing"
        if steps[number - 1] != right:
            return f"column {number}", judge_step(steps[number - 1], right, num_operands=len(operands))
    if len(steps) > len(right_steps):
        return f"column {len(right_steps) + 1}", "extra"
    return f"column {len(right_steps)}", "form" if closed else "no end"


def judge_step(step: str, right: str, *, num_operands: int) -> str:
    """Kind of the mistake in one step."""
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
