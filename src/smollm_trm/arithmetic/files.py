"""The data folder: `train.json`, `val.json`, `test.json`, each with what made it.

    {"metadata": {"format": "smollm-trm arithmetic", "version": 1, "part": "train", "count": 80000,
                  "settings": {"num_examples": 100000, "max_digits": 2, ..., "seed": 42}},
     "examples": ["3+5=8<end>", "99+21=<think>9+1=10 9+2+1=12</think>120<end>", ...]}

A plain JSON list of such lines is read too (own test sets). Every line is checked against the rules on
reading, so a wrong answer or a chain of another style is found by file and place, not by a model that learns
nothing.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from smollm_trm.arithmetic.problems import draw_data_set
from smollm_trm.arithmetic.rules import DIGIT_ORDERS, longest_example, read_sum, write_sum
from smollm_trm.records import write_json

ARITHMETIC_FORMAT = "smollm-trm arithmetic"
ARITHMETIC_FORMAT_VERSION = 1
ARITHMETIC_PARTS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class SumSettings:
    """Which sums a data set holds and how they are written."""

    num_examples: int = 100_000
    """Different problems in all three parts together."""
    max_digits: int = 2
    """Digits of the longest operand."""
    min_operands: int = 2
    """Numbers to add, at least."""
    max_operands: int = 3
    """Numbers to add, at most."""
    chain: bool = True
    """Write the columns between think marks."""
    digit_order: str = "normal"
    """Order of the answer's digits: "normal", or "reversed" (units first)."""
    val_fraction: float = 0.1
    """Share of the validation part."""
    test_fraction: float = 0.1
    """Share of the test part."""
    max_length: int = 128
    """Tokens of the longest example allowed: the model's context."""
    seed: int = 42
    """The same seed and settings give the same files."""

    def __post_init__(self) -> None:
        for name, least in (("num_examples", 1), ("max_digits", 1), ("min_operands", 2), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {least}")
        if self.max_operands < self.min_operands:
            raise ValueError(f"max_operands is {self.max_operands}, but min_operands is {self.min_operands}")
        if self.digit_order not in DIGIT_ORDERS:
            raise ValueError(f"digit_order is {self.digit_order!r}, but must be one of {', '.join(DIGIT_ORDERS)}")
        for name in ("val_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 0 and below 1")
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction and test_fraction leave nothing to train on: make their sum less than 1")
        if self.max_digits > 18:
            raise ValueError(f"max_digits is {self.max_digits}, but 18 is the most supported")
        longest = longest_example(self.max_digits, self.max_operands, chain=self.chain)
        if longest > self.max_length:
            raise ValueError(
                f"max_digits {self.max_digits} with max_operands {self.max_operands} gives examples of up to "
                f"{longest} tokens, but the context holds {self.max_length}: lower one or raise max_length"
            )


@dataclass(frozen=True, kw_only=True)
class SumFile:
    """One part of a data set as it was read."""

    path: Path
    """Where it stands."""
    examples: list[str] = field(repr=False)
    """The written sums."""
    digit_order: str = "normal"
    """Order of the answers' digits."""
    fingerprint: str = ""
    """SHA-256 of the examples: equal data has equal fingerprints."""


def make_parts(settings: SumSettings) -> dict[str, list[str]]:
    """Draw the problems and write them down: the three parts, as text.

    Raises:
        ValueError: more problems are asked for than there are, or a part would be empty.
    """
    problems = draw_data_set(
        num_examples=settings.num_examples,
        max_digits=settings.max_digits,
        min_operands=settings.min_operands,
        max_operands=settings.max_operands,
        seed=settings.seed,
    )
    lines = [write_sum(operands, chain=settings.chain, digit_order=settings.digit_order) for operands in problems]
    num_val = round(settings.num_examples * settings.val_fraction)
    num_test = round(settings.num_examples * settings.test_fraction)
    parts = {"train": lines[num_val + num_test :], "val": lines[:num_val], "test": lines[num_val:][:num_test]}
    for part, share in (("train", 1), ("val", settings.val_fraction), ("test", settings.test_fraction)):
        if share and not parts[part]:
            raise ValueError(f"num_examples {settings.num_examples} leaves the {part} part empty: ask for more")
    return parts


def write_parts(parts: dict[str, list[str]], settings: SumSettings, folder: Path) -> None:
    """Write the three files, each whole or not at all."""
    for part, lines in parts.items():
        metadata = {
            "format": ARITHMETIC_FORMAT,
            "version": ARITHMETIC_FORMAT_VERSION,
            "part": part,
            "count": len(lines),
            "settings": asdict(settings),
        }
        write_json(folder / f"{part}.json", {"metadata": metadata, "examples": lines})


def read_sum_file(path: Path) -> SumFile:
    """Read one part and check every line of it against the rules.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON, not of this format, empty, or a line breaks the rules.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: make a data folder with 'smollm-trm arithmetic generate --output-dir {path.parent}'"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from None
    digit_order = "normal"
    if isinstance(content, dict) and "examples" in content:
        metadata = content.get("metadata", {})
        if metadata.get("format") != ARITHMETIC_FORMAT or metadata.get("version") != ARITHMETIC_FORMAT_VERSION:
            raise ValueError(
                f"{path} is not a data file of this program: its metadata does not say "
                f"{ARITHMETIC_FORMAT!r}, version {ARITHMETIC_FORMAT_VERSION}"
            )
        digit_order = metadata["settings"]["digit_order"]
        content = content["examples"]
    if not isinstance(content, list) or not all(isinstance(line, str) for line in content):
        raise ValueError(f"{path} is of another format: expected a list of sums such as '3+5=8<end>'")
    if not content:
        raise ValueError(f"{path} holds no examples")
    _check_lines(content, digit_order, path)
    fingerprint = hashlib.sha256("\n".join(content).encode()).hexdigest()
    return SumFile(path=path, examples=content, digit_order=digit_order, fingerprint=fingerprint)


def _check_lines(lines: list[str], digit_order: str, path: Path) -> None:
    for place, line in enumerate(lines, start=1):
        try:
            written = read_sum(line)
        except ValueError as error:
            raise ValueError(f"{path}, example {place}: {error}") from None
        right = write_sum(written.operands, chain=written.chain is not None, digit_order=digit_order)
        if line != right:
            raise ValueError(f"{path}, example {place}: {line!r} breaks the rules, right is {right!r}")


def operand_sets(lines: Iterable[str]) -> set[tuple[int, ...]]:
    """The problems of some examples with the order of their operands forgotten."""
    return {tuple(sorted(map(int, line.partition("=")[0].split("+")))) for line in lines}


def read_data_folder(folder: Path) -> dict[str, SumFile]:
    """Read train, val and test, and make sure that no problem stands in two of them.

    Raises:
        FileNotFoundError: a part is missing.
        ValueError: a part is broken, or a problem (or another order of it) stands in two parts.
    """
    files = {part: read_sum_file(folder / f"{part}.json") for part in ARITHMETIC_PARTS}
    if len({file.digit_order for file in files.values()}) > 1:
        raise ValueError(f"{folder}: the parts write their answers in different digit orders: make the data again")
    problems = {part: operand_sets(file.examples) for part, file in files.items()}
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        if shared := problems[first] & problems[second]:
            example = "+".join(map(str, min(shared)))
            raise ValueError(
                f"{folder}: {len(shared)} problems stand in both {first}.json and {second}.json (for example "
                f"{example}, in some order): make the data again so that the test says something"
            )
    return files
