"""The five datasets that a model is asked to think about, with the Hub's names and fields."""

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from smollm_trm.data.rows import normalize_question, read_jsonl, rows_on_the_hub
from smollm_trm.records import UserMistake


class ProblemSource(NamedTuple):
    """Where a dataset lies on the Hub, and what its fields are called."""

    name: str
    config: str | None
    split: str
    problem: str  # field of the problem's text
    answer: str | None = None  # field of the answer; None where programs are asked for
    file: str | None = None  # of the repository, where it would otherwise be loaded by code, which `datasets` refuses


PROBLEM_SOURCES = {
    "gsm8k": ProblemSource("openai/gsm8k", "main", "train", "question", "answer"),
    "aime": ProblemSource("gneubig/aime-1983-2024", None, "train", "Question", "Answer"),
    "humaneval": ProblemSource("openai/openai_humaneval", None, "test", "prompt"),
    "mbpp": ProblemSource("google-research-datasets/mbpp", "full", "train", "text"),
    "apps": ProblemSource("codeparrot/apps", None, "train", "question", file="train.jsonl"),
}


def rows_of(dataset: str, data_dir: str | None) -> Iterator[tuple[str, Any]]:
    """(place, row) of a dataset, from `<dataset>.jsonl` of a folder (gsm8k: or its train.jsonl), or from the Hub."""
    source = PROBLEM_SOURCES[dataset]
    if data_dir is not None:
        path, instead = Path(data_dir) / f"{dataset}.jsonl", Path(data_dir) / "train.jsonl"
        path = instead if dataset == "gsm8k" and not path.is_file() and instead.is_file() else path
        return ((f"{path}, line {number}", row) for number, row in read_jsonl(path))
    options = {"split": source.split, "instead": f"give a folder with {dataset}.jsonl by --data_dir"}
    if source.file is None:
        return rows_on_the_hub(source.name, config=source.config, **options)
    return rows_on_the_hub("json", config=None, data_files=f"hf://datasets/{source.name}/{source.file}", **options)


def problems_in(dataset: str, data_dir: str | None) -> Iterator[dict[str, str]]:
    """Problems `{dataset, problem, answer}`; the answer as GSM8K writes it, `#### n` at its end, or empty."""
    source = PROBLEM_SOURCES[dataset]
    for where, row in rows_of(dataset, data_dir):
        for name in filter(None, (source.problem, source.answer)):
            if not isinstance(row, dict) or name not in row:
                raise UserMistake(f"{where}: the key {name!r} is missing; {dataset} has it")
        answer = "" if source.answer is None else str(row[source.answer]).strip()
        if answer and "####" not in answer:
            answer = f"#### {answer}"
        if problem := str(row[source.problem]).strip():
            yield {"dataset": dataset, "problem": problem, "answer": answer}


def mixed_problems(datasets: list[str], data_dir: str | None, num_samples: int) -> list[dict[str, str]]:
    """The first problems of a mix, one of each dataset in turn; the same question never twice."""
    found: dict[str, dict[str, str]] = {}
    for turn in zip_longest(*(problems_in(name, data_dir) for name in dict.fromkeys(datasets))):
        for one in filter(None, turn):
            found.setdefault(normalize_question(one["problem"]), one)
            if len(found) == num_samples:
                return list(found.values())
    return list(found.values())
