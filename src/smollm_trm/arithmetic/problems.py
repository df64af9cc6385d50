"""Which sums a data set holds: every problem once, in one of its orders.

3+5 and 5+3 are one problem: its operands as a set (with repetitions). A data set draws distinct problems, writes each
in one random order, and cuts the list into train, validation and test; so no problem stands in two parts in any order.

Short problems are rare among all (of the 171,700 sums of three numbers below 100, 220 have one digit only), but a model
must know them. So problems are drawn by kind, (number of operands, digits of the longest operand), the same number from
each kind; a kind that has fewer gives all it has, and the others share the rest.
"""

import math
from itertools import combinations_with_replacement
from typing import NamedTuple

import numpy as np

from smollm_trm.arithmetic.settings import SumSettings
from smollm_trm.records import UserMistake


class ProblemKind(NamedTuple):
    """Sums of `operands` numbers whose longest one has `digits` digits."""

    operands: int
    digits: int

    @property
    def smallest_longest(self) -> int:
        """The smallest number that the longest operand can be."""
        return 0 if self.digits == 1 else 10 ** (self.digits - 1)

    @property
    def available(self) -> int:
        """How many such problems there are, order not counted."""
        up_to_so_long = math.comb(10**self.digits + self.operands - 1, self.operands)
        return up_to_so_long - math.comb(self.smallest_longest + self.operands - 1, self.operands)


def share_among_kinds(num_examples: int, kinds: list[ProblemKind]) -> dict[ProblemKind, int]:
    """The same number from every kind; a UserMistake where more problems are asked for than there are."""
    available = sum(kind.available for kind in kinds)
    if num_examples > available:
        raise UserMistake(
            f"num_examples is {num_examples:,}, but there are only {available:,} different problems of these "
            "sizes (order not counted): ask for fewer, or raise max_digits or max_operands"
        )
    shares, left = {}, num_examples
    for position, kind in enumerate(sorted(kinds, key=lambda kind: kind.available)):
        shares[kind] = min(kind.available, left // (len(kinds) - position))
        left -= shares[kind]
    return {kind: shares[kind] for kind in kinds}


def draw_problems(kind: ProblemKind, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` different problems of one kind, operands sorted: int64 [count, operands].

    A kind of which a large part is asked for is listed whole and shuffled; of a large one, random draws are
    made and repetitions thrown away.
    """
    if kind.available <= 4 * count:
        listed = np.array(list(combinations_with_replacement(range(10**kind.digits), kind.operands)))
        return rng.permutation(listed[listed[:, -1] >= kind.smallest_longest])[:count]
    found = np.empty((0, kind.operands), dtype=np.int64)
    while len(found) < count:
        drawn = np.sort(rng.integers(0, 10**kind.digits, size=(count * 5 // 4 + 16, kind.operands)), axis=1)
        found = np.concatenate([found, drawn[drawn[:, -1] >= kind.smallest_longest]])
        _, first_places = np.unique(found, axis=0, return_index=True)
        found = found[np.sort(first_places)]
    return found[:count]


def draw_data_set(settings: SumSettings) -> list[list[int]]:
    """Different problems of all kinds in random order, each with its operands in random order."""
    kinds = [
        ProblemKind(operands=operands, digits=digits)
        for operands in range(settings.min_operands, settings.max_operands + 1)
        for digits in range(1, settings.max_digits + 1)
    ]
    rng = np.random.default_rng(settings.seed)
    problems: list[list[int]] = []
    for kind, share in share_among_kinds(settings.num_examples, kinds).items():
        problems += rng.permuted(draw_problems(kind, share, rng), axis=1).tolist()
    return [problems[position] for position in rng.permutation(len(problems))]
