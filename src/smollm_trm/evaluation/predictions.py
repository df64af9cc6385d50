"""Predictions on disk, so that a broken evaluation goes on where it stopped.

A JSONL file: first a line with the settings that produced it, then one line a problem; it is replaced whole after
every batch. The settings hold fingerprints of the problems and of the model: a file is only ever continued by the
evaluation that began it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smollm_trm.data.answers import answer_like, gold_answer
from smollm_trm.data.rows import read_jsonl, write_jsonl
from smollm_trm.evaluation.statistics import wilson_interval
from smollm_trm.models.generation import Completion
from smollm_trm.records import UserMistake, is_of_type

NUM_EXAMPLES = 10
PASSING_SETTINGS = ("notes", "base_model", "dtype", "architectures", "transformers_version", "_name_or_path")
_SAMPLED_FROM_FROZEN = 256  # values of each frozen tensor; adapters and reasoners are hashed whole


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 over a model's kind, its configuration, its trainable weights and a sample of the frozen ones."""
    digest = hashlib.sha256(type(model).__name__.encode())
    settings = {key: value for key, value in model.config.to_dict().items() if key not in PASSING_SETTINGS}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        values = tensor.detach().reshape(-1)
        values = values if tensor.requires_grad else values[:_SAMPLED_FROM_FROZEN]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if values.numel():
            digest.update(values.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def graded_prediction(
    index: int, row: Mapping[str, str], completions: Sequence[Completion], *, seconds: float, steps: Sequence[str] = ()
) -> dict:
    """One problem's line: its texts and grades; `steps` of the gold solution, where the model is to write them."""
    texts = [completion.text for completion in completions]
    made = {
        "index": index,
        "question": row["question"],
        "gold": gold_answer(row["answer"]),
        "texts": texts,
        "cot_match": writes_steps(texts[0], steps) if steps else None,
        "tokens": sum(completion.n_tokens for completion in completions),
        "seconds": round(seconds, 6),
        "cut_off": sum(completion.cut_off for completion in completions),
    }
    return {**made, **grades_of(made)}


def grades_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """What a line's texts are worth: the answer that most of them give, and whether it is right, twice."""
    gold = f"#### {line['gold']}"
    right, texts = answer_like(gold, gold), line["texts"]
    answer = _majority([answer_like(gold, text) for text in texts])
    strict = _majority([answer_like(gold, text, strict=True) for text in texts])
    return {"answer": answer, "correct": answer == right, "strict_correct": strict == right}


def writes_steps(text: str, steps: Sequence[str]) -> bool:
    """CoT match: whether a text writes these steps, a line each, and nothing else before its answer."""
    written = [line.strip() for line in text.split("#")[0].split("\n") if line.strip()]
    return written == [step.strip() for step in steps]


def _majority(answers: Sequence[str | None]) -> str | None:
    """The commonest answer, of equals the one that came first; None if no text has one."""
    votes = Counter(answer for answer in answers if answer is not None).most_common(1)
    return votes[0][0] if votes else None


class PredictionFile:
    """The predictions made so far with these settings, in memory and, if a path is given, on disk."""

    def __init__(self, *, settings: dict, path: str | Path | None, rows: Sequence[Mapping[str, str]]) -> None:
        self.settings = json.loads(json.dumps(settings, default=lambda value: type(value).__name__))
        self.path = None if path is None else Path(path)
        self.by_index: dict[int, dict] = {}
        if self.path is None or not self.path.is_file():
            self.add([])  # so that a file that cannot be written is known before the first answer
            return
        there, predictions = read_predictions(self.path)
        now = self.settings
        changed = [key for key in {**there, **now} if there.get(key) != now.get(key)]
        if changed:
            hashed = dict.fromkeys(("model", "problems"), ("others", "these"))  # their hashes tell a reader nothing
            both = {key: hashed.get(key, (repr(there.get(key)), repr(now.get(key)))) for key in changed}
            changes = ", ".join(f"{key}: {before} there, {after} now" for key, (before, after) in both.items())
            advice = "overwrite=True makes it anew, or name another file"
            raise UserMistake(f"{path} was made with other settings ({changes}); {advice}")
        self.by_index = {line["index"]: line for line in predictions}
        for index, line in self.by_index.items():
            if (line["question"], line["gold"]) != (rows[index]["question"], gold_answer(rows[index]["answer"])):
                raise UserMistake(f"{path}: the line of problem {index} is of another problem; name another file")

    def add(self, predictions: Sequence[dict]) -> None:
        """Keep these predictions, where there are none yet; on return they are on disk."""
        for line in predictions:
            self.by_index.setdefault(line["index"], line)
        if self.path is not None:
            write_jsonl(self.path, [{"settings": self.settings}, *self.by_index.values()])


def read_predictions(path: Path) -> tuple[dict, list[dict]]:
    """Settings and predictions of a file, graded again from their texts; a line that does not fit is refused."""
    lines = list(read_jsonl(path))
    settings = lines[0][1].get("settings") if isinstance(lines[0][1], dict) else None
    if not isinstance(settings, dict) or not isinstance(settings.get("total"), int):
        raise UserMistake(f"{path}, line {lines[0][0]}: not the settings of predictions; name another file")
    found: dict[int, dict] = {}
    kinds = {"index": int, "question": str, "gold": str, "texts": list[str], "tokens": int, "seconds": float}
    for number, line in lines[1:]:
        if not isinstance(line, dict) or not all(is_of_type(line.get(name), kind) for name, kind in kinds.items()):
            raise UserMistake(f"{path}, line {number}: not a line of predictions; delete it, and it is made again")
        index, fits = line["index"], line["texts"] and min(line["tokens"], line["seconds"]) >= 0
        if index in found or not 0 <= index < settings["total"] or not fits:
            what = "is there twice" if index in found else f"does not fit {settings['total']} problems"
            raise UserMistake(f"{path}, line {number}: problem {index} {what}; delete the line, and it is made again")
        found[index] = {**line, **grades_of(line)}
    return settings, list(found.values())


def load_predictions(path: str | Path) -> dict:
    """The result of a finished evaluation from its predictions file, as `evaluate_gsm8k` returned it."""
    settings, predictions = read_predictions(Path(path))
    if len(predictions) != settings["total"]:
        done = f"{len(predictions)} of {settings['total']}"
        raise UserMistake(f"{path} holds {done} predictions; finish its evaluation first")
    return summarised_predictions(predictions, settings)


def summarised_predictions(predictions: Iterable[dict], settings: dict) -> dict:
    """Scores of a finished evaluation; all values are JSON."""
    lines = sorted(predictions, key=lambda line: line["index"])
    names, total = ("correct", "strict_correct", "seconds", "tokens"), len(lines)
    correct, strict, seconds, tokens = (sum(line[name] for line in lines) for name in names)
    matches = [line["cot_match"] for line in lines if line.get("cot_match") is not None]
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
        "cot_match": sum(matches) / len(matches) if matches else None,
        "without_answer": sum(line["answer"] is None for line in lines),
        "cut_off": sum(line.get("cut_off", 0) for line in lines),
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if seconds else None,
        "examples": shown,
        "correct_by_problem": [line["correct"] for line in lines],
        "settings": settings,
    }
