"""How a sum is written down: the one place where the carry rules stand.

    3+5=8<end>                                                       one column: nothing to chain
    658+189=<think>8+9=17 5+8+1=14 6+1+1=8</think>847<end>           one step a column, units first
    99+21=<think>9+1=10 9+2+1=12</think>120<end>                     the last total opens the answer
    12+345=<think>2+5=7 1+4=5 0+3=3</think>357<end>                  a short operand counts as 0
    58+67+96=<think>8+7+6=21 5+6+9+2=22</think>221<end>              three operands: a carry may be 2

A step adds the operands' digits in their order, then the carry if it is not 0, and gives the column's whole total: its
last digit belongs to the answer, the rest is carried. A space between steps is one `<noop>` token.

The user's document shows two chains; the one of `658+189` is the rule here. The other (`99+21=110`) is wrong.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from smollm_trm.records import UserMistake

END, THINK, THINK_CLOSED, NOOP = "<end>", "<think>", "</think>", "<noop>"
DIGIT_ORDERS = ("normal", "reversed")
TOKEN_PATTERN = "<[a-z/]+>|."
WRITTEN_SUM = r"(\d+(?:\+\d+)+)=(?:<think>([^<]*)</think>)?(\d+)<end>"  # operands, chain, answer


class WrittenSum(NamedTuple):
    """One example, read back from its text."""

    operands: tuple[int, ...]  # in the order in which they stand
    chain: str | None  # what stands between the think marks, None where there are none
    answer: str  # its digits as written (reversed where the data says so)


@lru_cache(maxsize=1 << 16)
def column_step(digits: tuple[int, ...], carry: int) -> tuple[str, int]:
    """One step of the chain and what it carries on: `(9, 2), 1` gives `"9+2+1=12", 1`."""
    terms = (*digits, carry) if carry else digits
    total = sum(terms)
    return f"{'+'.join(map(str, terms))}={total}", total // 10


def column_steps(operands: Sequence[int]) -> list[str]:
    """The chain of a sum, one step a column, units first: `[99, 21]` gives `["9+1=10", "9+2+1=12"]`."""
    steps: list[str] = []
    carry, remaining = 0, operands
    while not steps or any(remaining):
        step, carry = column_step(tuple([number % 10 for number in remaining]), carry)
        steps.append(step)
        remaining = [number // 10 for number in remaining]
    return steps


def count_carries(operands: Sequence[int]) -> int:
    """How many columns of the sum carry, the last one included: `[99, 21]` has 2."""
    return sum(int(step.partition("=")[2]) > 9 for step in column_steps(operands))


def write_answer(operands: Sequence[int], *, digit_order: str = "normal") -> str:
    """The answer's digits; `digit_order="reversed"` writes the units first (15 + 6 gives `"12"`)."""
    digits = str(sum(operands))
    return digits[::-1] if digit_order == "reversed" else digits


def write_sum(operands: Sequence[int], *, chain: bool = True, digit_order: str = "normal") -> str:
    """The whole example as the model learns it: `[12, 34]` gives `"12+34=<think>2+4=6 1+3=4</think>46<end>"`."""
    steps = column_steps(operands) if chain else []
    thought = f"{THINK}{' '.join(steps)}{THINK_CLOSED}" if len(steps) > 1 else ""
    return f"{'+'.join(map(str, operands))}={thought}{write_answer(operands, digit_order=digit_order)}{END}"


def read_sum(text: str) -> WrittenSum:
    """Take an example apart; a UserMistake where it has another form."""
    match = re.fullmatch(WRITTEN_SUM, text)
    if match is None:
        right_form = "'3+5=8<end>' or '12+34=<think>2+4=6 1+3=4</think>46<end>'"
        raise UserMistake(f"{text!r} is not a sum of the form {right_form}")
    operands, chain, answer = match.groups()
    return WrittenSum(tuple(map(int, operands.split("+"))), chain, answer)


def count_tokens(text: str) -> int:
    """How many tokens a text of this language has (a mark such as `<think>` is one, a space is one)."""
    return len(re.findall(TOKEN_PATTERN, text))


def longest_example(max_digits: int, max_operands: int, *, chain: bool = True) -> int:
    """Tokens of the longest example there can be: nines only, since they carry the most."""
    return count_tokens(write_sum([10**max_digits - 1] * max_operands, chain=chain))
