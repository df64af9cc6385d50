"""GSM8K and its split: what is trained on, what may pick a checkpoint, what nothing touches before the end.

    question: Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.
              How many clips did Natalia sell altogether in April and May?
    answer:   Natalia sold 48/2 = <<48/2=24>>24 clips in May.
              Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.
              #### 72

The official training set (7,473 problems) is shuffled by a seed and cut into 5,978 to train on and 1,495 for
development; the 1,319 official test problems stay whole. No question stands in two parts: a training question
that is there twice, or in the official test too, is dropped and counted (in GSM8K as published: none).

Source: Cobbe et al. 2021, Training Verifiers to Solve Math Word Problems; `openai/gsm8k` on the Hub.
"""

import hashlib
import logging
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from smollm_trm.data.rows import check_row, normalize_question, read_jsonl
from smollm_trm.records import first_line

gsm8k_log = logging.getLogger("smollm_trm.data.gsm8k")

GSM8K_ON_THE_HUB = "openai/gsm8k"
GSM8K_USE_A_FOLDER = "give a folder with train.jsonl and test.jsonl by --data_dir or the variable GSM8K_DIR"


@dataclass(frozen=True)
class GSM8KSplits:
    """The three parts, and what a report must say about them."""

    gsm8k_train: list[dict[str, str]]
    """80% of the official training set."""
    gsm8k_test: list[dict[str, str]]
    """The other 20%. It may pick a checkpoint, so every report of it says "dev"."""
    gsm8k_final_test: list[dict[str, str]]
    """The official test set, for the final evaluation only."""
    seed: int
    """Seed of the shuffle."""
    source: str
    """Where the rows came from: a folder or the Hub name."""
    fingerprint: str
    """SHA-256 of the parts, in hexadecimal: equal fingerprints, equal problems in equal order."""
    duplicates: int
    """Training rows dropped because their question stood elsewhere already."""

    @property
    def summary(self) -> dict[str, str | int]:
        """What every run and every result says about its split."""
        return {"fingerprint": self.fingerprint, "seed": self.seed, "source": source_name(self.source)}


def source_name(source: str) -> str:
    """What results call the place that problems came from: a file's or folder's own name, or a name on the Hub.

    Where it lies is nobody else's business, and may hold a user's name.
    """
    local = os.path.isabs(source) or Path(source).exists()
    return Path(os.path.abspath(source)).name if local else source


def load_gsm8k(data_dir: str | Path | None = None, *, seed: int = 42) -> GSM8KSplits:
    """Load GSM8K, or files of its format, and split it.

    Args:
        data_dir: folder with `train.jsonl` and `test.jsonl`; without it the environment variable GSM8K_DIR,
            and without that the Hub.
        seed: of the shuffle before the 80/20 cut.

    Raises:
        FileNotFoundError: the folder or a file is missing, or the Hub cannot be reached.
        ValueError: a file is empty, or a row is bad (named by file and line).
    """
    folder = data_dir or os.environ.get("GSM8K_DIR")
    if folder:
        source = str(folder)
        official_train, official_test = read_gsm8k_folder(Path(folder))
    else:
        source = f"{GSM8K_ON_THE_HUB} (main)"
        official_train, official_test = download_gsm8k()
    train, dev = split_gsm8k(official_train, seed=seed, held_out=official_test)
    duplicates = len(official_train) - len(train) - len(dev)
    if duplicates:
        gsm8k_log.warning("%s: dropped %d training rows with a question seen before.", source, duplicates)
    return GSM8KSplits(
        gsm8k_train=train,
        gsm8k_test=dev,
        gsm8k_final_test=official_test,
        seed=seed,
        source=source,
        fingerprint=split_fingerprint(train, dev, official_test),
        duplicates=duplicates,
    )


def read_gsm8k_folder(folder: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The rows of `train.jsonl` and `test.jsonl`, each checked."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; {GSM8K_USE_A_FOLDER}.")
    parts = []
    for name in ("train.jsonl", "test.jsonl"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: {name} is missing; {GSM8K_USE_A_FOLDER}.")
        path = folder / name
        parts.append([check_row(row, where=f"{path}, line {line}") for line, row in read_jsonl(path)])
    return parts[0], parts[1]


def download_gsm8k() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The rows of the official train and test parts from the Hub (or its local cache), each checked."""
    import datasets  # takes seconds to import, and a local folder does not need it

    try:
        official = datasets.load_dataset(GSM8K_ON_THE_HUB, "main")
    except Exception as error:  # the libraries below raise many kinds; to the user all mean the same
        raise FileNotFoundError(
            f"GSM8K could not be loaded from the Hub ({first_line(error)}); without a network, {GSM8K_USE_A_FOLDER}."
        ) from error
    train, test = (
        [check_row(row, where=f"{GSM8K_ON_THE_HUB} {part}, row {at}") for at, row in enumerate(rows, start=1)]
        for part, rows in (("train", official["train"]), ("test", official["test"]))
    )
    return train, test


def split_gsm8k(
    rows: Sequence[Mapping[str, str]],
    *,
    seed: int = 42,
    train_fraction: float = 0.8,
    held_out: Iterable[Mapping[str, str]] = (),
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Shuffle by seed and cut into (train, dev), with no question in two parts.

    Args:
        rows: the problems to split.
        seed: of the shuffle.
        train_fraction: `int(train_fraction * n)` rows go to the first part.
        held_out: problems of another part (the official test); their questions are left out here.

    Raises:
        ValueError: a fraction outside (0, 1), or so few rows that a part would be empty.
    """
    if not 0.0 < train_fraction < 1.0:
        raise ValueError(f"train_fraction {train_fraction}: must lie between 0 and 1.")
    seen = {normalize_question(row["question"]) for row in held_out}
    kept = []
    for row in rows:
        question = normalize_question(row["question"])
        if question not in seen:
            seen.add(question)
            kept.append(dict(row))
    n_train = int(train_fraction * len(kept))
    if not 0 < n_train < len(kept):
        raise ValueError(f"{len(kept)} different problems are too few for train_fraction {train_fraction}.")
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
