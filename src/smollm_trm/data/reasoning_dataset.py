"""Own problems: a JSON list, JSONL, CSV, Parquet, the published iCoT text, a dataset on the Hub, or rows in memory.

    [
      {"question": "What is 2 + 2?", "answer": "4"},
      {"question": "Ann has 3 bags of 5 nuts. How many nuts?", "answer": "3*5 = 15 nuts.\\n#### 15"}
    ]

A solution ends in `#### number`, as in GSM8K, or in `#### words`. An answer that is nothing but a number, or one line
without any, becomes `#### answer`, behind the row's `steps` where it has a list of them (Coconut's published code).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from smollm_trm.data.rows import (
    check_row,
    read_csv,
    read_icot,
    read_json_list,
    read_jsonl,
    read_parquet,
    rows_on_the_hub,
)
from smollm_trm.records import UserMistake

OWN_DATA_READERS = {
    ".json": read_json_list, ".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet, ".txt": read_icot
}  # fmt: skip
_BARE_NUMBER = re.compile(r"[-+\u2212]?([$€£¥₹][-+]?)?(\d[\d,]*)?\.?\d+(/\d+)?\s?%?\.?")
_WORDS = re.compile(r"(?!(?i:nan|null)\Z)[^\d\n#]*[^\W\d_][^\d\n#]*")  # one line without a number


class ReasoningDataset(Dataset):
    """Rows `{"question", "answer"}` with every answer ending in `#### number` or `#### words`.

    A bad row (a column missing or empty, no final number, an `id` that was there before) is refused by file and line.
    """

    def __init__(
        self,
        source: str | Path | Sequence[Mapping],
        *,
        hub_config: str | None = None,
        hub_split: str = "train",
        question_column: str = "question",
        answer_column: str = "answer",
    ) -> None:
        self.source = str(source) if isinstance(source, str | Path) else "rows"
        if not isinstance(source, str | Path):
            places = ((f"rows, row {at}", row) for at, row in enumerate(source, start=1))
        elif (reader := OWN_DATA_READERS.get(Path(source).suffix.lower())) is not None:
            places = ((f"{source}, line {line}", row) for line, row in reader(Path(source)))
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", self.source) and not Path(source).exists():
            places = rows_on_the_hub(self.source, config=hub_config, split=hub_split, instead="name a local file")
        else:
            kinds = "a .json, .jsonl, .csv or .parquet file, iCoT .txt or a Hub name (owner/name)"
            raise UserMistake(f"{source}: expected {kinds}.")
        columns = {question_column: "question", answer_column: "answer"}
        self.rows = checked_own_rows((where, renamed_columns(row, columns)) for where, row in places)
        if not self.rows:
            raise UserMistake(f"{self.source}: there are no rows.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, str]:
        return self.rows[index]


def checked_own_rows(places: Iterable[tuple[str, Any]]) -> list[dict[str, str]]:
    rows = []
    place_of_id: dict[str, str] = {}
    for where, row in places:
        rows.append(check_row(row_with_final_mark(row), where=where, words=True))
        identity = row.get("id")
        if identity is not None and (first := place_of_id.setdefault(str(identity), where)) != where:
            raise UserMistake(f"{where}: the id {identity!r} is already that of {first}.")
    return rows


def renamed_columns(row: Any, columns: Mapping[str, str]) -> Any:
    """A row with other names for its columns; one that lacks a column stays as it is, for `check_row` to judge."""
    if not isinstance(row, Mapping) or not row.keys() >= columns.keys():
        return row
    return {**row, **{ours: row[theirs] for theirs, ours in columns.items()}}


def question_and_answer(row: Any) -> Any:
    """A row of chat `messages` with one question, or of `prompt` and `completion`, as question and answer."""
    if isinstance(row, Mapping) and isinstance(row.get("messages"), list):
        said = [(one.get("role"), one.get("content")) for one in row["messages"] if isinstance(one, Mapping)]
        if sorted(role for role, _ in said if role != "system") == ["assistant", "user"]:
            return {**row, "question": dict(said)["user"], "answer": dict(said)["assistant"]}
    if isinstance(row, Mapping) and row.keys() >= {"prompt", "completion"}:
        return {**row, "question": row["prompt"], "answer": row["completion"]}
    return row


def row_with_final_mark(row: Any) -> Any:
    """An answer `345`, "345" or "Paris" becomes "#### 345"; else it stays as it is, for `check_row` to judge."""
    row = question_and_answer(row)
    answer = row.get("answer") if isinstance(row, Mapping) else None
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if isinstance(answer, str):
        bare = _BARE_NUMBER.fullmatch(answer.strip()) or _WORDS.fullmatch(answer.strip())
        steps = row.get("steps") if isinstance(row.get("steps"), list) else []
        return {**row, "answer": "\n".join([*map(str, steps), f"#### {answer.strip()}"]) if bare else answer}
    return row


def create_sample_dataset() -> list[dict[str, str]]:
    """The ten problems of the guide, to try things out; far too few to learn from."""
    return [
        {"question": "What is 15 × 23?", "answer": "345"},
        {"question": "What is 144 ÷ 12?", "answer": "12"},
        {"question": "What is 25% of 80?", "answer": "20"},
        {"question": "What is 17 + 58?", "answer": "75"},
        {"question": "What is 203 - 78?", "answer": "125"},
        {"question": "If x + 7 = 15, what is x?", "answer": "8"},
        {"question": "What is the square of 13?", "answer": "169"},
        {"question": "A train goes 60 miles an hour for 3 hours. How many miles is that?", "answer": "180"},
        {"question": "Sarah has 24 apples and gives away a third. How many are left?", "answer": "16"},
        {"question": "What is the perimeter of a square with sides of 9?", "answer": "36"},
    ]
