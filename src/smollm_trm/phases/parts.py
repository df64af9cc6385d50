"""The parts that the phases leave: a folder each with `config.json`, `model.safetensors` and a card; no pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from smollm_trm.models.configuration import readable
from smollm_trm.models.dimension import DimensionCompressor
from smollm_trm.models.loading import is_local
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.storage import CONFIG_FILE, WEIGHTS_FILE, saved_model_folder
from smollm_trm.records import UserMistake, is_of_type, run_record, write_json, write_text, write_whole

PARTS = {"compressor": "phases compressor", "sequence_trm": "phases trm"}
"""What a part is called, and the command that makes it."""


def public_name(model: SmolLMv3WithTRM, model_name: str) -> str:
    """A base's name where others can find it; empty for a folder on this machine."""
    place = model.config.base_model or model_name
    return "" if is_local(place) else place


def part_card(config: Mapping[str, Any]) -> str:
    """The card of a part: what it is, on which base, what was measured."""
    kind, base = config["part"], config["base"] or "a base that is not on the Hub"
    header = {"library_name": "smollm-trm", "tags": ["latent-reasoning", kind]}
    header |= {"base_model": config["base"]} if config["base"] else {}
    measured = "\n".join(f"- {name}: {value}" for name, value in config["measured"].items())
    return (
        f"---\n{json.dumps(header, indent=2)}\n---\n\n# {kind} of hidden states, D' = {config['d_compressed']}\n\n"
        f"Made by `smollm-trm {PARTS[kind]}` for the final hidden states of {base} ({config['hidden_size']} wide, "
        f"fingerprint `{config['base_fingerprint']}`).\n\n## What was measured, on held-out data\n\n{measured}\n"
    )


def save_part(folder: Path, part: str, module: nn.Module, **config: Any) -> None:
    """Write a part whole, or leave what was there."""
    config = {"part": part, **config, **run_record()}
    tensors = {name: one.detach().cpu().contiguous() for name, one in module.state_dict().items()}

    def write(temporary: Path) -> None:
        temporary.mkdir()
        save_file(tensors, temporary / WEIGHTS_FILE)
        write_json(temporary / CONFIG_FILE, config)
        write_text(temporary / "README.md", part_card(config))

    write_whole(folder, write)


def part_folder(name: str | Path) -> Path | None:
    """The folder of a part on this machine: as given, or `model/` in a run's folder; None where it is none."""
    for folder in (Path(name), Path(name) / "model"):
        try:
            if json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("part") in PARTS:
                return folder
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            continue
    return None


def read_part(name: str, part: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a part, from a folder or the Hub."""
    folder = part_folder(name) or part_folder(saved_model_folder(name))
    if folder is None:
        raise UserMistake(f"{name}: no {part} there; make one with `smollm-trm {PARTS[part]}`")
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if config["part"] != part:
        raise UserMistake(f"{name}: this is a {config['part']}, not a {part}")
    kinds = {"base": str, "base_fingerprint": str, "hidden_size": int, "d_compressed": int}
    if not all(is_of_type(config.get(field), kind) for field, kind in kinds.items()):
        raise UserMistake(f"{name}: its {CONFIG_FILE} does not say its base and widths; make or copy it again")
    with readable(folder):
        return config, load_file(folder / WEIGHTS_FILE)


def fill(module: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        told = f"{name}: its {WEIGHTS_FILE} does not fit its {CONFIG_FILE}; make or copy it again"
        raise UserMistake(told) from error


def refuse_other_base(config: Mapping[str, Any], fingerprint: str, what: str, here: str) -> None:
    """Refuse a part, or pairs, made with another base than the one here."""
    if config["base_fingerprint"] != fingerprint:
        theirs = f"{config.get('base') or 'another base'}, {config['hidden_size']} wide"
        raise UserMistake(f"{what} was made with {theirs}: it does not fit {here}; make it again with this base")


def load_compressor(name: str, *, fingerprint: str, here: str) -> tuple[DimensionCompressor, dict[str, Any]]:
    """A compressor and its configuration; one of another base is refused."""
    config, tensors = read_part(name, "compressor")
    refuse_other_base(config, fingerprint, f"the compressor {name}", here)
    compressor = DimensionCompressor(hidden_size=config["hidden_size"], d_compressed=config["d_compressed"])
    fill(compressor, tensors, name)
    return compressor, config
