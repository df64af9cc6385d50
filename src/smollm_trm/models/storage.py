"""A trained model on disk: adapter, reasoner, tokenizer and one JSON file; no pickle, no copy of the base.

adapter_config.json, adapter_model.safetensors    the LoRA adapter, as PEFT writes it
reasoner.safetensors                              the reasoner's weights and buffers
smollm_trm.json                                   how the parts go together
tokenizer files
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from smollm_trm.models.reasoners import Reasoner, TRMSettings
from smollm_trm.records import write_json

SETTINGS_FILE = "smollm_trm.json"
REASONER_FILE = "reasoner.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Everything needed to put a saved model together again."""

    base: str = "HuggingFaceTB/SmolLM3-3B"
    """Name or folder of the base; a folder relative to the saved model where the base was trained whole."""
    base_training: str = "lora"
    """"lora", "frozen" or "full"."""
    reasoner: str | None = "trm"
    """"trm", "compressor", "static" or None."""
    num_latents: int = 256
    """M."""
    trm: TRMSettings = field(default_factory=TRMSettings)
    """Settings of the reasoner."""
    read_with_adapter: bool = True
    """Whether the read pass uses the adapter."""
    target: str = "steps"
    """What the model was trained to write."""
    prompt_format: str = "plain"
    """How the prompt is written."""
    keep_annotations: bool = False
    """Whether calculator annotations stay in what the model is to write."""

    def __post_init__(self) -> None:
        for name in ("n_heads", "compression_heads", "dim"):
            if getattr(self.trm, name) is not None and getattr(self.trm, name) < 1:
                raise ValueError(f"trm_kwargs: {name}={getattr(self.trm, name)}: must be at least 1")


def write_settings(settings: ModelSettings, folder: Path, extra: dict[str, Any]) -> None:
    """Write `smollm_trm.json`."""
    write_json(folder / SETTINGS_FILE, {"format_version": FORMAT_VERSION, **asdict(settings), **extra})


def read_settings(folder: Path) -> ModelSettings:
    """Read `smollm_trm.json`.

    Raises:
        ValueError: one line: no such file, not JSON, or of another format.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: no {SETTINGS_FILE} there; give a folder that save_pretrained wrote")
    try:
        content = json.loads(path.read_text())
        if content.pop("format_version") != FORMAT_VERSION:
            raise ValueError("it has another format version")
        known = {name: content[name] for name in ModelSettings.__dataclass_fields__ if name in content}
        return ModelSettings(**{**known, "trm": TRMSettings(**known["trm"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a smollm-trm configuration ({error})") from error


def read_notes(folder: Path) -> dict[str, Any]:
    """What else stands in `smollm_trm.json`: what the model was trained on ("training") and its "evaluations"."""
    content = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    return {name: content[name] for name in content.keys() - {"format_version", *ModelSettings.__dataclass_fields__}}


def save_reasoner(reasoner: Reasoner, folder: Path) -> None:
    """Write the reasoner's weights and buffers."""
    save_file({name: tensor.contiguous() for name, tensor in reasoner.state_dict().items()}, folder / REASONER_FILE)


def load_reasoner(reasoner: Reasoner, folder: Path) -> None:
    """Put saved weights into a reasoner of the same build.

    Raises:
        ValueError: one line naming the first missing, extra or differently shaped tensor.
    """
    path = folder / REASONER_FILE
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); save or download the model again") from error
    wanted = reasoner.state_dict()
    for name, tensor in wanted.items():
        if name not in saved:
            raise ValueError(f"{path}: the tensor {name} is missing; it belongs to another configuration")
        if saved[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(saved[name].shape)}, the configuration asks for {tuple(tensor.shape)}"
            )
    if extra := sorted(saved.keys() - wanted.keys()):
        raise ValueError(f"{path}: unknown tensor {extra[0]}; it belongs to another configuration")
    reasoner.load_state_dict(saved)
