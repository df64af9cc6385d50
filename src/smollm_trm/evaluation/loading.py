"""The model and the problems that a command names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from smollm_trm.data.gsm8k import load_gsm8k, source_name, split_fingerprint, split_gsm8k
from smollm_trm.data.reasoning_dataset import ReasoningDataset
from smollm_trm.models.configuration import LatentReasoningConfig
from smollm_trm.models.loading import default_device, default_dtype, is_local
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.storage import local_model_folder, read_config, saved_model_folder
from smollm_trm.records import UserMistake, check_choice, first_line

Problems = tuple[list[dict[str, str]], dict[str, Any]]
"""Rows to evaluate on, and what they are of: `source`, `seed` and `fingerprint` of the whole split."""


def saved_or_downloaded(model: str) -> Path | None:
    """The folder of a saved model here or on the Hub; None for a base. What the Hub does not tell of is refused."""
    if (folder := local_model_folder(model)) is not None:
        return folder
    if is_local(model) or model.count("/") != 1:
        return None
    try:
        found = PreTrainedConfig.get_config_dict(model)[0]
    except Exception as error:  # whatever the Hub's client and its transport raise, by version
        reason = f"no such folder, and the Hub did not answer ({first_line(error)})"
        raise UserMistake(f"{model}: {reason}, so it is not known what it was trained on; give a folder") from error
    return saved_model_folder(model) if found.get("model_type") == LatentReasoningConfig.model_type else None


def load_for_evaluation(
    model: str,
    *,
    target: str | None = None,
    prompt_format: str | None = None,
    precision: str = "auto",
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
) -> SmolLMv3WithTRM:
    """A saved model or a training run (a folder, or a name on the Hub), or an untuned base, without a think block."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    check_choice(("auto", *dtypes), precision=precision)
    loading = {"dtype": dtypes.get(precision) or default_dtype(), "load_in_4bit": load_in_4bit}
    asked = {"target": target, "prompt_format": prompt_format, "trust_remote_code": trust_remote_code or None}
    asked = {name: value for name, value in asked.items() if value is not None}
    if (saved := saved_or_downloaded(model)) is not None:
        for name, value in asked.items():
            reason = f"{model} is a saved model, asked as it was trained"
            raise UserMistake(f"{name}={value!r} is for an untuned base: {reason}")
        return SmolLMv3WithTRM.from_pretrained(saved, **loading)
    base = SmolLMv3WithTRM.from_base(model, base_training="frozen", reasoner=None, think=False, **loading, **asked)
    return base.to(default_device()).eval()


def worked_examples(count: int, data_dir: str | None, split: Mapping[str, Any]) -> list[dict[str, str]]:
    """So many problems of the training part of GSM8K, split like this, to show to an untuned base with solutions."""
    return load_gsm8k(data_dir, seed=split["seed"]).gsm8k_train[:count] if count else []


def problems_of(
    part: str, *, data_dir: str | None, dataset_path: str | None, seed: int, models: Sequence[str] = (), **columns: str
) -> Problems:
    """Problems to evaluate on, never a model's training problems; `seed` is of the split, where no model says it."""
    if part not in ("dev", "test"):
        raise UserMistake(f"part={part!r}: choose 'dev' or 'test'")
    saved = {model: folder for model in models if (folder := saved_or_downloaded(model)) is not None}
    noted = {model: read_config(folder).notes.get("training", {}).get("split") for model, folder in saved.items()}
    splits = {model: split for model, split in noted.items() if split is not None}
    for model, split in splits.items():
        kinds = {"seed": int, "fingerprint": str, "source": str}
        if not isinstance(split, Mapping) or not all(isinstance(split.get(name), kinds[name]) for name in kinds):
            raise UserMistake(f"{model}: its config.json does not say which split it was trained on; save it again")
    if dataset_path is not None:
        return own_problems(part, dataset_path, splits, **columns)
    loaded = load_gsm8k(data_dir, seed=min((split["seed"] for split in splits.values()), default=seed))
    if part == "test":
        return loaded.gsm8k_final_test, loaded.summary
    for model, split in splits.items():
        if split["fingerprint"] != loaded.fingerprint:
            raise UserMistake(
                f"{model} was trained on {split['source']} with split seed {split['seed']}: this dev part may hold its "
                "training problems; give the same data, or part='test'"
            )
    return loaded.gsm8k_test, loaded.summary


def own_problems(part: str, dataset_path: str, splits: Mapping[str, Mapping[str, Any]], **columns: str) -> Problems:
    """See `problems_of`: all rows of a file, or, wherever it lies, the dev part of one that a model was trained on."""
    rows, source = list(ReasoningDataset(dataset_path, **columns)), source_name(dataset_path)
    trained: dict[str, Problems] = {}
    for model, split in splits.items():
        try:
            train, dev = split_gsm8k(rows, seed=split["seed"])
        except UserMistake:  # too few to have been split
            train, dev = rows, []
        if split_fingerprint(train, dev) == split["fingerprint"]:
            trained[split["fingerprint"]] = dev, {**split, "source": source}
        elif split["source"] == source:
            raise UserMistake(
                f"{model} was trained on {source}, which holds other problems now and may hold its training problems; "
                "give another file, or rename it if it only has the same name"
            )
    if len(trained) > 1 or (trained and part == "test"):
        raise UserMistake(f"{dataset_path} was trained on: evaluate its dev part, or give a file of test problems")
    whole = {"source": source, "seed": None, "fingerprint": split_fingerprint(rows)}
    return next(iter(trained.values()), (rows, whole))
