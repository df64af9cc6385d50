"""GSM8K and its split: what is trained on, what may pick a checkpoint, what nothing touches before the end.

    question: Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.
              How many clips did Natalia sell altogether in April and May?
    answer:   Natalia sold 48/2 = <<48/2=24>>24 clips in May.
              Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.
              #### 72

The official training set (7,473 problems) is shuffled by a seed and cut into 5,978 to train on and 1,495 for
development; the 1,319 official test problems stay whole. No question stands in two parts: a training question that is
there twice, or in the official test too, is dropped and counted (in GSM8K as published: none).

Source: Cobbe et al. 2021, Training Verifiers to Solve Math Word Problems; `openai/gsm8k` on the Hub.
"""

import hashlib
import logging
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from smollm_trm.data.rows import check_row, normalize_question, read_jsonl, rows_on_the_hub
from smollm_trm.records import UserMistake

gsm8k_log = logging.getLogger("smollm_trm.data.gsm8k")

GSM8K_ON_THE_HUB = "openai/gsm8k"
GSM8K_USE_A_FOLDER = "give a folder with train.jsonl and test.jsonl by --data_dir or the variable GSM8K_DIR"


@dataclass(frozen=True)
class GSM8KSplits:
    """The three parts, and what a report must say about them."""

    gsm8k_train: list[dict[str, str]]  # 80% of the official training set
    gsm8k_test: list[dict[str, str]]  # the other 20%; it may pick a checkpoint, so every report of it says "dev"
    gsm8k_final_test: list[dict[str, str]]  # the official test set, for the final evaluation only
    seed: int  # of the shuffle
    source: str  # where the rows came from: a folder or the Hub name
    fingerprint: str  # SHA-256 of the parts, in hexadecimal: equal fingerprints, equal problems in equal order
    duplicates: int  # training rows dropped because their question stood elsewhere already

    @property
    def summary(self) -> dict[str, str | int]:
        return {"fingerprint": self.fingerprint, "seed": self.seed, "source": source_name(self.source)}


def source_name(source: str) -> str:
    """What results call a place of problems: the own name of a file or folder, without where it lies, or a Hub name."""
    here = Path(source).is_absolute() or Path(source).exists()
    return Path(os.path.abspath(source)).name if here else source


def load_gsm8k(data_dir: str | Path | None = None, *, seed: int = 42) -> GSM8KSplits:
    """Load GSM8K, or files of its format, and split it; a bad row is refused by file and line."""
    folder = data_dir or os.environ.get("GSM8K_DIR")
    official_train, official_test = (official_part(folder and Path(folder), part) for part in ("train", "test"))
    train, dev = split_gsm8k(official_train, seed=seed, held_out=official_test)
    source = str(folder) if folder else f"{GSM8K_ON_THE_HUB} (main)"
    if duplicates := len(official_train) - len(train) - len(dev):
        gsm8k_log.warning("%s: dropped %d training rows with a question seen before.", source, duplicates)
    parts = (train, dev, official_test)
    return GSM8KSplits(*parts, seed=seed, source=source, fingerprint=split_fingerprint(*parts), duplicates=duplicates)


def official_part(folder: Path | None, part: str) -> list[dict[str, str]]:
    """The checked rows of the official "train" or "test" part, from a folder or, without one, from the Hub."""
    if folder is None:
        places = rows_on_the_hub(GSM8K_ON_THE_HUB, config="main", split=part, instead=GSM8K_USE_A_FOLDER)
        return [check_row(row, where=where) for where, row in places]
    path = folder / f"{part}.jsonl"
    if not path.is_file():
        missing = f"{path.name} is missing" if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"{folder}: {missing}; {GSM8K_USE_A_FOLDER}.")
    return [check_row(row, where=f"{path}, line {line}") for line, row in read_jsonl(path)]


def split_gsm8k(
    rows: Sequence[Mapping[str, str]], *, seed: int = 42, held_out: Iterable[Mapping[str, str]] = ()
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Shuffle by seed and cut 80/20 into (train, dev); no question in both, or in `held_out`, the official test."""
    by_question: dict[str, dict[str, str]] = {}
    for row in rows:
        by_question.setdefault(normalize_question(row["question"]), dict(row))
    for row in held_out:
        by_question.pop(normalize_question(row["question"]), None)
    kept = list(by_question.values())
    n_train = int(0.8 * len(kept))
    if n_train == 0:
        raise UserMistake(f"{len(kept)} different problems are too few to split into train and dev.")
    random.Random(seed).shuffle(kept)
    return kept[:n_train], kept[n_train:]


def split_fingerprint(*parts: Sequence[Mapping[str, str]]) -> str:
    """SHA-256 over the parts' problems in their order: normalised question and answer of each."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"part of {len(part)}\n".encode())
        for row in part:
            digest.update(f"{normalize_question(row['question'])}\t{row['answer'].strip()}\n".encode())
    return digest.hexdigest()
