"""Rows `{"question", "answer"}` on disk: read, checked one by one, written whole or not at all.

GSM8K, the word problems and own data all pass through here, so that a bad row is named the same way
everywhere: file, line, reason. Every reader yields (line number, row) and stops at the first bad line.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from smollm_trm.data.answers import extract_strict_answer
from smollm_trm.records import write_text

_WORD_OR_SIGN = re.compile(r"\w+|-(?=\s*\d)|[^\w\s.,;:!?'\"()\u2019\u201c\u201d-]")

_BLANKS = re.compile(r"\s*")


def normalize_question(text: str) -> str:
    """The text by which two problems count as the same: lower case, single spaces, no punctuation.

    Mathematical signs stay, a minus where a digit follows: `3 + 5` and `3 - 5` are two problems.
    """
    return " ".join(_WORD_OR_SIGN.findall(text.lower()))


def check_row(row: Any, *, where: str) -> dict[str, str]:
    """Refuse a row without a question or without a `#### number` answer.

    Args:
        row: what stands at this place.
        where: the place, for the message ("train.jsonl, line 3").

    Returns:
        question and answer as they came, nothing else.

    Raises:
        ValueError: no object; a key missing, not text or empty; an answer without `#### number`.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: a row must be an object, found {type(row).__name__}.")
    for key in ("question", "answer"):
        if key not in row:
            raise ValueError(f"{where}: the key '{key}' is missing; a row needs 'question' and 'answer'.")
        if not isinstance(row[key], str):
            raise ValueError(f"{where}: '{key}' must be text, found {type(row[key]).__name__}.")
        if not row[key].strip():
            raise ValueError(f"{where}: '{key}' is empty.")
    if extract_strict_answer(row["answer"]) is None:
        raise ValueError(f"{where}: the answer does not end in '#### <number>'.")
    return {"question": row["question"], "answer": row["answer"]}


def read_text(path: Path) -> str:
    """The text of a UTF-8 file (a byte order mark is dropped).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, or nothing but blanks in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason}).") from None
    if not text.strip():
        raise ValueError(f"{path}: the file is empty.")
    return text


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """One JSON value a line; blank lines are skipped."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error.msg}).") from None


def read_json_list(path: Path) -> Iterator[tuple[int, Any]]:
    """A JSON list, element by element, so that each is known by the line on which it begins."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        raise ValueError(f"{path}: expected a JSON list; a file with one object a line must be named .jsonl.")

    def after_blanks(at: int) -> int:
        return _BLANKS.match(text, at).end()

    def fault(at: int, reason: str) -> ValueError:
        return ValueError(f"{path}, line {text.count(chr(10), 0, at) + 1}: not valid JSON ({reason}).")

    at = after_blanks(text.index("[") + 1)
    more = text[at : at + 1] != "]"
    while more:
        begins = at
        try:
            row, at = json.JSONDecoder().raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise fault(error.pos, error.msg) from None
        yield text.count("\n", 0, begins) + 1, row
        at = after_blanks(at)
        more = text[at : at + 1] == ","
        if more:
            at = after_blanks(at + 1)
        elif text[at : at + 1] != "]":
            raise fault(at, "expected ',' or ']' after a row")
    if after_blanks(at + 1) < len(text):
        raise fault(after_blanks(at + 1), "something follows the list")


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """A CSV file with a header; a quoted field may hold line breaks."""
    reader = csv.DictReader(read_text(path).splitlines(keepends=True), strict=True)
    begins = 2
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{path}, line {begins}: the number of fields differs from the header's.")
            yield begins, row
            begins = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {begins}: not valid CSV ({error}).") from None


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSONL: a reader sees the old file or the whole new one, never a part."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(path, text)
