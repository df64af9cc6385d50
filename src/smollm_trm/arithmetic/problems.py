"""Which sums a data set holds: every problem once, in one of its orders.

3+5 and 5+3 are one problem: its operands as a set (with repetitions). A data set draws distinct problems,
writes each in one random order, and cuts the list into train, validation and test; so no problem stands in
two parts in any order, and there are only so many problems to ask for.

Short problems are rare among all (of the 171,700 sums of three numbers below 100, 220 have one digit only),
but a model must know them. So problems are drawn by kind, (number of operands, digits of the longest
operand), the same number from each kind; a kind that has fewer gives all it has, and the others share the
rest.
"""

import math
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np


@dataclass(frozen=True)
class ProblemKind:
    """Sums of `operands` numbers whose longest one has `digits` digits."""

    operands: int
    """How many numbers are added."""
    digits: int
    """Digits of the longest of them."""

    def count(self) -> int:
        """How many such problems there are, order not counted."""
        below = 0 if self.digits == 1 else _count_operand_sets(10 ** (self.digits - 1), self.operands)
        return _count_operand_sets(10**self.digits, self.operands) - below


def _count_operand_sets(numbers: int, operands: int) -> int:
    return math.comb(numbers + operands - 1, operands)


def problem_kinds(*, max_digits: int, min_operands: int, max_operands: int) -> list[ProblemKind]:
    """All kinds up to the given sizes, the smallest first."""
    return [
        ProblemKind(operands=operands, digits=digits)
        for operands in range(min_operands, max_operands + 1)
        for digits in range(1, max_digits + 1)
    ]


def share_among_kinds(num_examples: int, kinds: list[ProblemKind]) -> dict[ProblemKind, int]:
    """The same number from every kind, as far as it has so many; the rest is shared by the larger ones.

    Raises:
        ValueError: more problems are asked for than there are.
    """
    available = sum(kind.count() for kind in kinds)
    if num_examples > available:
        raise ValueError(
            f"num_examples is {num_examples:,}, but there are only {available:,} different problems of these "
            "sizes (order not counted): ask for fewer, or raise max_digits or max_operands"
        )
    shares: dict[ProblemKind, int] = {}
    left = num_examples
    by_size = sorted(kinds, key=ProblemKind.count)
    for position, kind in enumerate(by_size):
        shares[kind] = min(kind.count(), left // (len(by_size) - position))
        left -= shares[kind]
    return {kind: shares[kind] for kind in kinds}


def draw_problems(kind: ProblemKind, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` different problems of one kind, operands sorted: int64 [count, operands].

    A kind of which a large part is asked for is listed whole and shuffled; of a large one, random draws are
    made and repetitions thrown away.
    """
    if kind.count() <= 4 * count:
        numbers = range(10**kind.digits)
        listed = np.array(list(combinations_with_replacement(numbers, kind.operands)), dtype=np.int64)
        of_this_kind = listed[listed[:, -1] >= _smallest_longest(kind)]
        return rng.permutation(of_this_kind)[:count]
    found = np.empty((0, kind.operands), dtype=np.int64)
    while len(found) < count:
        drawn = np.sort(rng.integers(0, 10**kind.digits, size=(count * 5 // 4 + 16, kind.operands)), axis=1)
        found = _first_of_each(np.concatenate([found, drawn[drawn[:, -1] >= _smallest_longest(kind)]]))
    return found[:count]


def _smallest_longest(kind: ProblemKind) -> int:
    return 0 if kind.digits == 1 else 10 ** (kind.digits - 1)


def _first_of_each(rows: np.ndarray) -> np.ndarray:
    """The different rows, each where it first stands."""
    order = np.lexsort(rows.T)  # stable: among equal rows the first comes first
    in_order = rows[order]
    is_first = np.concatenate([[True], (in_order[1:] != in_order[:-1]).any(axis=1)])
    return rows[np.sort(order[is_first])]


def draw_data_set(
    *, num_examples: int, max_digits: int, min_operands: int, max_operands: int, seed: int
) -> list[list[int]]:
    """Different problems of all kinds in random order, each with its operands in random order.

    Raises:
        ValueError: more problems are asked for than there are.
    """
    kinds = problem_kinds(max_digits=max_digits, min_operands=min_operands, max_operands=max_operands)
    rng = np.random.default_rng(seed)
    problems: list[list[int]] = []
    for kind, share in share_among_kinds(num_examples, kinds).items():
        problems += rng.permuted(draw_problems(kind, share, rng), axis=1).tolist()
    return [problems[position] for position in rng.permutation(len(problems))]
