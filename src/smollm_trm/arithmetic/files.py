"""The data folder: `train.json`, `val.json`, `test.json`, each with what made it.

    {"metadata": {"format": "smollm-trm arithmetic", "version": 1, "part": "train", "count": 80000,
                  "settings": {"num_examples": 100000, "max_digits": 2, ..., "seed": 42}},
     "examples": ["3+5=8<end>", "99+21=<think>9+1=10 9+2+1=12</think>120<end>", ...]}

A plain JSON list of such lines is read too (own test sets). Every line is checked against the rules on reading, so a
wrong answer or a chain of another style is found by file and place, not by a model that learns nothing.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

from smollm_trm.arithmetic.problems import draw_data_set
from smollm_trm.arithmetic.rules import DIGIT_ORDERS, read_sum, write_sum
from smollm_trm.arithmetic.settings import SumSettings, check_choice
from smollm_trm.records import UserMistake, first_line, write_json

SUM_FILE_FORMAT = {"format": "smollm-trm arithmetic", "version": 1}


@dataclass(frozen=True, kw_only=True)
class SumFile:
    """One part of a data set as it was read."""

    path: Path
    examples: list[str]
    digit_order: str = "normal"
    fingerprint: str = ""
    """SHA-256 of the examples: equal data has equal fingerprints."""


def make_parts(settings: SumSettings) -> dict[str, list[str]]:
    """Draw the problems and write them down: the three parts, as text; a UserMistake where one would be empty."""
    problems = draw_data_set(settings)
    lines = [write_sum(operands, chain=settings.chain, digit_order=settings.digit_order) for operands in problems]
    num_val = round(settings.num_examples * settings.val_fraction)
    num_test = round(settings.num_examples * settings.test_fraction)
    parts = {"train": lines[num_val + num_test :], "val": lines[:num_val], "test": lines[num_val:][:num_test]}
    for part, share in (("train", 1), ("val", settings.val_fraction), ("test", settings.test_fraction)):
        if share and not parts[part]:
            raise UserMistake(f"num_examples {settings.num_examples} leaves the {part} part empty: ask for more")
    return parts


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
        metadata = content.get("metadata", {})
        if not isinstance(metadata, dict) or any(
            metadata.get(name) != value for name, value in SUM_FILE_FORMAT.items()
        ):
            raise UserMistake(
                f"{path} is not a data file of this program: its metadata does not say "
                f"{SUM_FILE_FORMAT['format']!r}, version {SUM_FILE_FORMAT['version']}"
            )
        try:
            digit_order = metadata["settings"]["digit_order"]
            check_choice("digit_order", digit_order, DIGIT_ORDERS)
        except (KeyError, TypeError, UserMistake) as error:
            raise UserMistake(f"{path}: its metadata does not say the digit order: make the data again") from error
        content = content["examples"]
    if not isinstance(content, list) or not all(isinstance(line, str) for line in content):
        raise UserMistake(f"{path} is of another format: expected a list of sums such as '3+5=8<end>'")
    if not content:
        raise UserMistake(f"{path} holds no examples")
    check_lines(content, digit_order, path)
    fingerprint = hashlib.sha256("\n".join(content).encode()).hexdigest()
    return SumFile(path=path, examples=content, digit_order=digit_order, fingerprint=fingerprint)


def check_lines(lines: list[str], digit_order: str, path: Path) -> None:
    """Refuse a line that breaks the rules, by its place."""
    for place, line in enumerate(lines, start=1):
        try:
            written = read_sum(line)
        except UserMistake as error:
            raise UserMistake(f"{path}, example {place}: {error}") from None
        right = write_sum(written.operands, chain=written.chain is not None, digit_order=digit_order)
        if line != right:
            raise UserMistake(f"{path}, example {place}: {line!r} breaks the rules, right is {right!r}")


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
