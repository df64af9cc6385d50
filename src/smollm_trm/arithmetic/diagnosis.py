"""What a model wrote, judged: is the answer right, is the chain right, and where does it first go wrong?"""

from collections.abc import Sequence
from dataclasses import dataclass

from smollm_trm.arithmetic.rules import END, THINK, THINK_CLOSED, column_steps, read_sum

MISTAKE_KINDS = ("form", "digits", "carry", "total", "missing", "extra", "number", "no end")


@dataclass(frozen=True)
class Judgement:
    """One completion judged."""

    answer_right: bool
    """The number after the chain is the sum, and `<end>` follows."""
    chain_right: bool | None
    """The chain is the right one, None where the problem has none."""
    place: str
    """Where it first goes wrong: "column 1" (units), ..., "answer"; empty where all is right."""
    kind: str
    """How: one of MISTAKE_KINDS, empty where all is right."""


def judge_completion(gold: str, written: str, *, digit_order: str = "normal") -> Judgement:
    """Compare what was written with the example it should be.

    Args:
        gold: the example, as in the data.
        written: problem and completion, as the model gave it (up to `<end>` if it wrote one).
        digit_order: of the answer.
    """
    example = read_sum(gold)
    completion = written[gold.index("=") + 1 :]
    thought, closed, after = completion.rpartition(THINK_CLOSED)
    answer_right = after == f"{example.answer}{END}"
    if example.chain is None:
        place, kind = ("", "") if completion == f"{example.answer}{END}" else _judge_answer(completion)
        return Judgement(answer_right=place == "", chain_right=None, place=place, kind=kind)
    chain_right = closed != "" and thought == f"{THINK}{example.chain}"
    if chain_right:
        place, kind = ("", "") if answer_right else _judge_answer(after)
    else:
        place, kind = _first_wrong_step(example.operands, thought if closed else completion, closed=closed != "")
    return Judgement(answer_right=answer_right, chain_right=chain_right, place=place, kind=kind)


def _judge_answer(text: str) -> tuple[str, str]:
    if not text.endswith(END):
        return "answer", "no end"
    return "answer", "number" if text.removesuffix(END).isdigit() else "form"


def _first_wrong_step(operands: Sequence[int], thought: str, *, closed: bool) -> tuple[str, str]:
    """Place and kind of the first difference between the right chain and a wrong one."""
    right_steps = column_steps(operands)
    if not thought.startswith(THINK):
        return "column 1", "form"
    steps = thought.removeprefix(THINK).removesuffix(END).split(" ")
    for number, right in enumerate(right_steps, start=1):
        if number > len(steps) or not steps[number - 1]:
            return f"column {number}", "missing"
        if steps[number - 1] != right:
            return f"column {number}", _judge_step(steps[number - 1], right, num_operands=len(operands))
    if len(steps) > len(right_steps):
        return f"column {len(right_steps) + 1}", "extra"
    return f"column {len(right_steps)}", "form" if closed else "no end"


def _judge_step(step: str, right: str, *, num_operands: int) -> str:
    terms, equals, total = step.partition("=")
    right_terms, _, right_total = right.partition("=")
    written, wanted = terms.split("+"), right_terms.split("+")
    if not equals or not total.isdigit() or not all(term.isdigit() for term in written):
        return "form"
    if written[:num_operands] != wanted[:num_operands]:
        return "digits"
    return "carry" if written != wanted else "total"
