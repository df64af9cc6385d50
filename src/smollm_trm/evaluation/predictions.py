"""Predictions on disk, so that a broken evaluation goes on where it stopped.

A JSONL file: first a line with the settings that produced it, then one line a problem, written batch by
batch. The settings hold fingerprints of the problems and of the model: a file is only ever continued by the
evaluation that began it. A last line cut off by a crash is dropped and its problem is done again.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smollm_trm.data.answers import extract_answer, extract_strict_answer, gold_answer
from smollm_trm.evaluation.statistics import wilson_interval
from smollm_trm.records import UserMistake

NUM_EXAMPLES = 10
PASSING_SETTINGS = ("notes", "base_model", "dtype", "architectures", "transformers_version", "_name_or_path")
_SAMPLED_FROM_FROZEN = 256  # values of each frozen tensor; adapters and reasoners are hashed whole


def model_fingerprint(model: object) -> str:
    """SHA-256 over a model's trainable weights, a sample of the frozen ones, and its plain settings."""
    digest = hashlib.sha256(type(model).__name__.encode())
    if not isinstance(model, nn.Module):
        return digest.hexdigest()
    if (config := getattr(model, "config", None)) is not None:
        plain = {key: value for key, value in config.to_dict().items() if key not in PASSING_SETTINGS}
        digest.update(json.dumps(plain, sort_keys=True, default=str).encode())
    for name, module in model.named_modules():
        for key, value in sorted(vars(module).items()):
            passing = key.startswith("_") or key in ("training", "gradient_checkpointing", "name_or_path")
            if not passing and isinstance(value, (bool, int, float, str)):
                digest.update(f"{name}.{key}={value}\n".encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        values = tensor.detach().reshape(-1)
        values = values if tensor.requires_grad else values[:_SAMPLED_FROM_FROZEN]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if values.numel():
            digest.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def graded_prediction(index: int, row: Mapping[str, str], completions: Sequence[Any], *, seconds: float) -> dict:
    """One problem's line: its texts (several to vote), the answer that most of them give, and its grades.

    `completions` are objects with `text`, `n_tokens` and `cut_off`; `seconds` is the problem's share of its batch's.
    """
    texts, gold = [completion.text for completion in completions], gold_answer(row["answer"])
    answer = _majority([extract_answer(text) for text in texts])
    return {
        "index": index,
        "question": row["question"],
        "gold": gold,
        "texts": texts,
        "answer": answer,
        "correct": answer == gold,
        "strict_correct": _majority([extract_strict_answer(text) for text in texts]) == gold,
        "tokens": sum(completion.n_tokens for completion in completions),
        "seconds": round(seconds, 6),
        "cut_off": sum(completion.cut_off for completion in completions),
    }


def _majority(answers: Sequence[str | None]) -> str | None:
    """The commonest answer, of equals the one that came first; None if no text has one."""
    votes = Counter(answer for answer in answers if answer is not None).most_common(1)
    return votes[0][0] if votes else None


class PredictionFile:
    """The predictions made so far with these settings, in memory and, if a path is given, on disk.

    In the settings, an object that is no JSON value counts as its class's name.

    Raises:
        UserMistake: the file is no predictions file, is damaged, or was made with other settings.
        OSError: it cannot be written.
    """

    def __init__(self, *, settings: dict, path: str | Path | None = None) -> None:
        self.settings = json.loads(json.dumps(settings, default=lambda value: type(value).__name__))
        self.path = None if path is None else Path(path)
        self.by_index: dict[int, dict] = {}
        if self.path is None:
            return
        content = self.path.read_bytes() if self.path.is_file() else b""
        stored, predictions, whole = _parsed_predictions(content, self.path)
        if stored is None:
            self._write([{"settings": self.settings}], from_byte=0)
            return
        pairs = {key: (stored.get(key), self.settings.get(key)) for key in {**stored, **self.settings}}
        if changed := [f"{key}: {there!r} there, {now!r} now" for key, (there, now) in pairs.items() if there != now]:
            changes = ", ".join(changed)
            raise UserMistake(f"{path} was made with other settings ({changes}); delete it or name another file")
        self._write([], from_byte=whole)
        self.by_index = {line["index"]: line for line in predictions}

    def add(self, predictions: Sequence[dict]) -> None:
        """Keep these predictions; on return they are on disk."""
        new = [prediction for prediction in predictions if prediction["index"] not in self.by_index]
        if self.path is not None:
            self._write(new)
        self.by_index.update({prediction["index"]: prediction for prediction in new})

    def _write(self, lines: Sequence[dict], *, from_byte: int | None = None) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                if from_byte is not None:
                    file.truncate(from_byte)
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            advice = "free some disk space or choose another output folder; predictions already there are kept"
            raise OSError(f"could not write {self.path}: {error.strerror}; {advice}") from error


def load_predictions(path: str | Path) -> dict:
    """The result of a finished evaluation from its predictions file, as `evaluate_gsm8k` returned it.

    Raises:
        FileNotFoundError: no such file.
        UserMistake: no predictions file, damaged, or not finished.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such predictions file; evaluate the model first")
    settings, predictions, _ = _parsed_predictions(path.read_bytes(), path)
    done, total = len(predictions), settings["total"] if settings else "its"
    if done != total:
        raise UserMistake(f"{path} holds {done} of {total} predictions; finish its evaluation first")
    return summarised_predictions(predictions, settings, path)


def summarised_predictions(predictions: Iterable[dict], settings: dict, path: Path | None) -> dict:
    """Scores of a finished evaluation; all values are JSON."""
    lines = sorted(predictions, key=lambda line: line["index"])
    total, correct = len(lines), sum(line["correct"] for line in lines)
    strict = sum(line["strict_correct"] for line in lines)
    seconds, tokens = sum(line["seconds"] for line in lines), sum(line["tokens"] for line in lines)
    shown = [
        {"prediction": line["texts"][0], **{name: line[name] for name in ("question", "answer", "gold", "correct")}}
        for line in lines[:NUM_EXAMPLES]
    ]
    return {
        "accuracy": correct / total,
        "correct": correct,
        "total": total,
        "interval": list(wilson_interval(correct, total)),
        "strict_accuracy": strict / total,
        "strict_correct": strict,
        "without_answer": sum(line["answer"] is None for line in lines),
        "cut_off": sum(line.get("cut_off", 0) for line in lines),
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else None,
        "examples": shown,
        "correct_by_problem": [line["correct"] for line in lines],
        "settings": settings,
        "predictions_path": None if path is None else str(path),
    }


def _parsed_predictions(content: bytes, path: Path) -> tuple[dict | None, list[dict], int]:
    """Settings (None in a file that only began), predictions, and how many bytes are whole lines."""
    *lines, torn = content.split(b"\n")
    if not lines and not b'{"settings": '.startswith(torn[:13]):
        raise UserMistake(f"{path} is not a file of predictions; name another file")
    parsed: list[dict] = []
    for number, line in enumerate(lines, start=1):
        try:
            parsed.append(json.loads(line))
            parsed[-1]["settings" if number == 1 else "index"]
        except (ValueError, TypeError, LookupError):
            raise UserMistake(f"{path}, line {number}: not a line of predictions; name another file") from None
    return (parsed[0]["settings"], parsed[1:], len(content) - len(torn)) if parsed else (None, [], 0)
