"""Which sums a data set holds, and its folder.

Every problem stands there once, in one of its orders: 3+5 and 5+3 are one problem, its operands as a set (with
repetitions). A data set draws distinct problems and cuts the list in three; so none stands in two parts in any order.
Short problems are rare among all (of the 171,700 sums of three numbers below 100, 220 have one digit only), but a model
must know them. So problems are drawn by kind, the same number from each; a kind that has fewer gives all it has.

The folder holds `train.json`, `val.json` and `test.json`, each with what made it:

    {"metadata": {"format": "smollm-trm arithmetic", "version": 1, "part": "train", "count": 80000,
                  "settings": {"num_examples": 100000, "max_digits": 2, ..., "seed": 42}},
     "examples": ["3+5=8<end>", "99+21=<think>9+1=10 9+2+1=12</think>120<end>", ...]}

A plain JSON list of such lines is read too (own test sets). Every line is checked against the rules on reading.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import combinations, combinations_with_replacement
from pathlib import Path
from typing import NamedTuple

import numpy as np

from smollm_trm.arithmetic.rules import DIGIT_ORDERS, read_sum, write_sum
from smollm_trm.arithmetic.settings import SumSettings
from smollm_trm.records import UserMistake, first_line, write_json

SUM_FILE_FORMAT = {"format": "smollm-trm arithmetic", "version": 1}


class ProblemKind(NamedTuple):
    """Sums of `operands` numbers whose longest one has `digits` digits."""

    operands: int
    digits: int

    @property
    def smallest_longest(self) -> int:
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
    """`count` different problems of one kind, operands sorted: int64 [count, operands]."""
    if kind.available <= 4 * count:  # few are left out: list them all
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
        for operands in range(2, settings.max_operands + 1)
        for digits in range(1, settings.max_digits + 1)
    ]
    rng = np.random.default_rng(settings.seed)
    problems: list[list[int]] = []
    for kind, share in share_among_kinds(settings.num_examples, kinds).items():
        problems += rng.permuted(draw_problems(kind, share, rng), axis=1).tolist()
    return [problems[position] for position in rng.permutation(len(problems))]


@dataclass(frozen=True, kw_only=True)
class SumFile:
    """One part of a data set as it was read."""

    path: Path
    examples: list[str]
    digit_order: str = "normal"
    fingerprint: str = ""  # SHA-256 of the examples


def make_parts(settings: SumSettings) -> dict[str, list[str]]:
    """Draw the problems and write them down: 80% to train on, 10% to validate and to test on, as text."""
    problems = draw_data_set(settings)
    lines = [write_sum(operands, chain=settings.chain, digit_order=settings.digit_order) for operands in problems]
    tenth = round(settings.num_examples * 0.1)
    if not tenth:
        raise UserMistake(f"num_examples {settings.num_examples} leaves the val part empty: ask for more")
    return {"train": lines[2 * tenth :], "val": lines[:tenth], "test": lines[tenth : 2 * tenth]}


def write_parts(parts: dict[str, list[str]], settings: SumSettings) -> None:
    """Write the three files, each whole or not at all; the same bytes in whatever folder."""
    noted = asdict(settings)
    folder = Path(noted.pop("output_dir"))
    for part, lines in parts.items():
        metadata = {**SUM_FILE_FORMAT, "part": part, "count": len(lines), "settings": noted}
        write_json(folder / f"{part}.json", {"metadata": metadata, "examples": lines})


def read_sum_file(path: Path) -> SumFile:
    """Read one part; a UserMistake where it is not of the format or a line breaks the rules."""
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: make a data folder with 'smollm-trm arithmetic generate --output-dir {path.parent}'"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserMistake(f"{path} is not JSON ({first_line(error)})") from None
    digit_order = "normal"
    if isinstance(content, dict) and "examples" in content:
        try:
            metadata, content = content["metadata"], content["examples"]
            digit_order = metadata["settings"]["digit_order"]
            if digit_order not in DIGIT_ORDERS or not metadata.items() >= SUM_FILE_FORMAT.items():
                raise ValueError("of another program")
        except (KeyError, TypeError, AttributeError, ValueError):
            told = f"its metadata does not say {SUM_FILE_FORMAT} and the digit order: make the data again"
            raise UserMistake(f"{path} is not a data file of this program: {told}") from None
    if not isinstance(content, list) or not all(isinstance(line, str) for line in content):
        raise UserMistake(f"{path} is of another format: expected a list of sums such as '3+5=8<end>'")
    if not content:
        raise UserMistake(f"{path} holds no examples")
    for place, line in enumerate(content, start=1):
        try:
            written = read_sum(line)
        except UserMistake as error:
            raise UserMistake(f"{path}, example {place}: {error}") from None
        right = write_sum(written.operands, chain=written.chain is not None, digit_order=digit_order)
        if line != right:
            raise UserMistake(f"{path}, example {place}: {line!r} breaks the rules, right is {right!r}")
    fingerprint = hashlib.sha256("\n".join(content).encode()).hexdigest()
    return SumFile(path=path, examples=content, digit_order=digit_order, fingerprint=fingerprint)


def operand_sets(lines: Iterable[str]) -> set[tuple[int, ...]]:
    """The problems of some examples with the order of their operands forgotten."""
    return {tuple(sorted(map(int, line.partition("=")[0].split("+")))) for line in lines}


def read_data_folder(folder: Path) -> dict[str, SumFile]:
    """Read train, val and test; a UserMistake where a problem stands in two of them, in any order."""
    files = {part: read_sum_file(folder / f"{part}.json") for part in ("train", "val", "test")}
    if len({file.digit_order for file in files.values()}) > 1:
        raise UserMistake(f"{folder}: the parts write their answers in different digit orders: make the data again")
    problems = {part: operand_sets(file.examples) for part, file in files.items()}
    for first, second in combinations(files, 2):
        if shared := problems[first] & problems[second]:
            example = "+".join(map(str, min(shared)))
            raise UserMistake(
                f"{folder}: {len(shared)} problems stand in both {first}.json and {second}.json (for example "
                f"{example}, in some order): make the data again so that the test says something"
            )
    return files
