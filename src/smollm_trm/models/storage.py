"""A saved model's folder: found, read, checked. What transformers does itself is left to it."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn

from smollm_trm.models.configuration import LatentReasoningConfig, readable, refuse_other_tensors
from smollm_trm.records import UserMistake, first_line

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
SHARED_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model", "README.md")
REASONER_PREFIX = "model.reasoner."


def is_saved_model(folder: Path) -> bool:
    """Whether a folder holds a model of ours (readable or not)."""
    try:
        found = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        return found.get("model_type") == LatentReasoningConfig.model_type
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def local_model_folder(name: str | Path) -> Path | None:
    """The folder of a saved model on this machine: as given, or `model/` in a training run's folder."""
    return next((folder for folder in (Path(name), Path(name) / "model") if is_saved_model(folder)), None)


def saved_model_folder(name: str | Path, revision: str | None = None) -> Path:
    """`local_model_folder`, or one downloaded from the Hub."""
    if (folder := local_model_folder(name)) is not None:
        return folder
    looks_like_a_hub_name = str(name).count("/") == 1 and not str(name).startswith((".", "/", "~"))
    if Path(name).exists() or not looks_like_a_hub_name:
        return Path(name)
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=list(SHARED_FILES)))
    except Exception as error:  # whatever the Hub's client and its transport raise, by version
        raise UserMistake(f"{name}: no such folder, and the Hub did not give it: {first_line(error)}") from error


def read_config(folder: Path) -> LatentReasoningConfig:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise UserMistake(f"{folder}: no {CONFIG_FILE} there; give a folder that save_pretrained wrote")
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("model_type", None) != LatentReasoningConfig.model_type:
            raise ValueError("its model_type is another")
        values.pop("auto_map", None)
        config = LatentReasoningConfig(**values)
        for name in ("training", "evaluations"):
            if not isinstance(config.notes.get(name, {}), dict):
                raise ValueError(f"its notes' {name} is no object")
        return config
    except Exception as error:  # transformers checks the base's part, with errors of its own
        reason = " ".join(str(error).split()) if type(error).__name__.startswith("Strict") else first_line(error)
        raise UserMistake(f"{path}: not a configuration of this program ({reason})") from error


def weights_to_save(model: nn.Module, base_model: str) -> dict[str, Tensor]:
    """What `model.safetensors` holds: the reasoner, and the base only where it is nowhere else, no `base_model`."""
    state = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items()}
    if base_model:
        return {name: value for name, value in state.items() if name.startswith(REASONER_PREFIX)}
    tied = model.config.tie_word_embeddings
    return {name: v for name, v in state.items() if ".lora_" not in name and not (tied and name.startswith("lm_head."))}


def read_weights(folder: Path, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not wanted and not path.is_file():
        return {}
    with readable(path):
        saved = load_file(path)
    refuse_other_tensors(f"{path} belongs to another configuration", saved, wanted)
    return saved
