"""Rows `{"question", "answer"}`: read, checked one by one, written whole or not at all.

GSM8K, the word problems and own data all pass through here, so that a bad row is named the same way
everywhere: file, line, reason. Every reader yields (line number, row) and stops at the first bad line.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from smollm_trm.data.answers import answer_in_words, extract_strict_answer
from smollm_trm.records import UserMistake, first_line, write_text

_WORD_OR_SIGN = re.compile(r"\w+|-(?=\s*\d)|[^\w\s.,;:!?'\"()\u2019\u201c\u201d-]")
_BEFORE_AN_ELEMENT = re.compile(r"[\s,]*")


def normalize_question(text: str) -> str:
    """What problems that count as the same have in common: lower case, single spaces, no punctuation but signs."""
    return " ".join(_WORD_OR_SIGN.findall(text.lower()))


def check_row(row: Any, *, where: str, words: bool = False) -> dict[str, str]:
    """Question and answer of a row as they came; one without is refused by `where`, its place ("a.jsonl, line 3").

    `words`: the final answer may be in words.
    """
    if not isinstance(row, Mapping):
        raise UserMistake(f"{where}: a row must be an object, found {type(row).__name__}.")
    for key in ("question", "answer"):
        if key not in row:
            found = f"found {', '.join(map(repr, row))[:200] or 'none'}"
            named = "a row needs 'question' and 'answer', or question_column and answer_column to name others"
            raise UserMistake(f"{where}: the key '{key}' is missing; {named}: {found}.")
        if not isinstance(row[key], str):
            raise UserMistake(f"{where}: '{key}' must be text, found {type(row[key]).__name__}.")
        if not row[key].strip():
            raise UserMistake(f"{where}: '{key}' is empty.")
        if any("\ud800" <= letter <= "\udfff" for letter in row[key]):
            raise UserMistake(f"{where}: '{key}' holds half a character (a lone surrogate), which is no text.")
    if extract_strict_answer(row["answer"]) is None and not (words and answer_in_words(row["answer"])):
        raise UserMistake(f"{where}: the answer does not end in '#### <number>'.")
    return {"question": row["question"], "answer": row["answer"]}


def read_text(path: Path) -> str:
    """The text of a UTF-8 file that is there and not empty (a byte order mark is dropped)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserMistake(f"{path}: not UTF-8 text (byte {error.start}: {error.reason}).") from None
    if not text.strip():
        raise UserMistake(f"{path}: the file is empty.")
    return text


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """One JSON value a line; blank lines are skipped."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserMistake(f"{path}, line {number}: not valid JSON ({first_line(error)}).") from None


def read_json_list(path: Path) -> Iterator[tuple[int, Any]]:
    """A JSON list, each element by the line on which it begins."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        raise UserMistake(f"{path}: expected a JSON list; a file with one object a line must be named .jsonl.")
    try:
        length = len(json.loads(text))
    except json.JSONDecodeError as error:
        raise UserMistake(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from None
    except (ValueError, RecursionError) as error:  # a number without end, lists in lists
        raise UserMistake(f"{path}: not valid JSON ({first_line(error)}).") from None
    line, counted, ended = 1, 0, text.index("[") + 1
    for _ in range(length):
        begins = _BEFORE_AN_ELEMENT.match(text, ended).end()
        line, counted = line + text.count("\n", counted, begins), begins
        row, ended = json.JSONDecoder().raw_decode(text, begins)
        yield line, row


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """A CSV file with a header; a quoted field may hold line breaks."""
    reader = csv.DictReader(read_text(path).splitlines(keepends=True), strict=True)
    begins = 2
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserMistake(f"{path}, line {begins}: the number of fields differs from the header's.")
            yield begins, row
            begins = reader.line_num + 1
    except csv.Error as error:
        raise UserMistake(f"{path}, line {begins}: not valid CSV ({error}).") from None


def read_icot(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The published iCoT text, `question||step step #### answer` a line; a step has no blanks."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            question, bars, solution = line.partition("||")
            steps, mark, final = solution.rpartition("####")
            if not bars or not mark:
                form = f"iCoT text, `question||step step #### answer`; line {number} is not"
                raise UserMistake(f"{path}: expected a .json, .jsonl, .csv or .parquet file, or {form}.")
            yield number, {"question": question.strip(), "answer": "\n".join([*steps.split(), f"#### {final.strip()}"])}


def read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    from pyarrow import parquet  # comes with datasets

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        yield from enumerate(parquet.read_table(path).to_pylist(), start=1)
    except (OSError, ValueError) as error:
        raise UserMistake(f"{path}: not a Parquet file ({first_line(error)}).") from None


def rows_on_the_hub(
    name: str, *, config: str | None, split: str, instead: str, **options: Any
) -> Iterator[tuple[str, Any]]:
    """(place, row) of one part of a dataset on the Hub or in its local cache; without either, `instead` is advised."""
    import datasets  # takes seconds to import, and local files do not need it

    try:
        part = datasets.load_dataset(name, config, split=split, **options)
    except Exception as error:  # the libraries below raise many kinds; to the user all mean the same
        raise FileNotFoundError(
            f"{name}: could not be loaded from the Hub ({first_line(error)}); without a network, {instead}."
        ) from error
    yield from ((f"{name} {split}, row {at}", row) for at, row in enumerate(part, start=1))


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSONL: a reader sees the old file or the whole new one, never a part."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
