"""The parts of a model: made fresh on a base, saved, and put together again."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smollm_trm.data.prompts import THINK_CLOSE
from smollm_trm.hub import UPLOADED
from smollm_trm.models.loading import LoraSettings, adapt_base, default_device, default_dtype, load_base
from smollm_trm.models.reasoners import Reasoner, build_reasoner
from smollm_trm.models.storage import (
    ModelSettings,
    load_reasoner,
    read_notes,
    read_settings,
    save_reasoner,
    write_settings,
)
from smollm_trm.models.tiny import build_tiny_model
from smollm_trm.records import first_line

SAVED_BASE = "base"
"""Folder in a saved model for a base that is nowhere else."""
BaseAndTokenizer = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class ModelParts(NamedTuple):
    """What a `SmolLMv3WithTRM` is made of."""

    base_model: nn.Module
    """The Hugging Face model, wrapped by PEFT where it has an adapter."""
    tokenizer: PreTrainedTokenizerBase
    """Of the base."""
    reasoner: Reasoner | None
    """What fills the span; None for the baseline."""
    settings: ModelSettings
    """How they belong together."""
    notes: dict[str, Any] | None = None
    """What is known of its training and evaluations."""


def reasoner_for(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: ModelSettings) -> Reasoner | None:
    """The reasoner that the settings ask for, sized by the base's configuration and scaled to its embeddings."""
    if settings.reasoner is None:
        return None
    table = base.get_input_embeddings().weight.detach()
    closing = tokenizer(THINK_CLOSE, add_special_tokens=False)["input_ids"]
    n_read = min(settings.trm.n_read_layers, base.config.num_hidden_layers)
    return build_reasoner(
        settings.reasoner,
        num_latents=settings.num_latents,
        hidden_size=base.config.hidden_size,
        settings=replace(settings.trm, n_read_layers=n_read),
        anchor=table[closing[-1]],
        table_rms=table[:4096].float().square().mean().sqrt().item(),
    ).to(table.device)


def fresh_parts(
    model_name: str | BaseAndTokenizer,
    *,
    settings: ModelSettings,
    lora: LoraSettings,
    dtype: torch.dtype,
    tiny_texts: list[str] | None,
    seed: int,
) -> ModelParts:
    """A base with a fresh adapter and a fresh reasoner; see `SmolLMv3WithTRM.from_base`."""
    if isinstance(model_name, str):
        base, tokenizer = load_base(model_name, dtype=dtype, tiny_texts=tiny_texts, seed=seed)
        name = model_name
    else:
        base, tokenizer = model_name
        name = base.config.name_or_path or (settings.base if settings.base != ModelSettings.base else "")
    local = name not in ("", "tiny") and Path(name).exists()
    settings = replace(settings, base=str(Path(name).resolve()) if local else name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reasoner = reasoner_for(base, tokenizer, settings)
        base_model = adapt_base(base, training=settings.base_training, lora=lora)
    return ModelParts(base_model, tokenizer, reasoner, settings)


def local_folder(name: str | Path) -> Path:
    """A saved model's folder: as given, or downloaded where it is a name on the Hub.

    Raises:
        ValueError: neither a folder nor a name that the Hub knows; one line.
    """
    looks_like_a_hub_name = str(name).count("/") == 1 and not str(name).startswith((".", "/", "~"))
    if Path(name).exists() or not looks_like_a_hub_name:
        return Path(name)
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(UPLOADED)))
    except Exception as error:  # whatever the Hub's client and its transport raise, by version
        raise ValueError(f"{name}: no such folder, and the Hub did not give it: {first_line(error)}") from error


def saved_parts(
    name: str | Path,
    *,
    model_name: str | BaseAndTokenizer | None,
    dtype: torch.dtype | str,
    device: torch.device | str | None,
) -> ModelParts:
    """The parts of a saved model; see `SmolLMv3WithTRM.from_pretrained`."""
    folder = local_folder(name)
    settings, notes = read_settings(folder), read_notes(folder)
    beside = settings.base_training == "full" or settings.base == "tiny"
    model_name = model_name or (str(folder / SAVED_BASE) if beside else settings.base)
    if not model_name:
        raise ValueError(f"{folder} was trained on a base without a name: give it as model_name=(model, tokenizer)")
    if isinstance(model_name, str):
        dtype = default_dtype() if dtype == "auto" else dtype
        base, tokenizer = load_base(model_name, dtype=dtype)
        base = base.to(default_device() if device == "auto" else device)
    else:
        base, tokenizer = model_name
    reasoner = reasoner_for(base, tokenizer, settings)
    if reasoner is not None:
        load_reasoner(reasoner, folder)
    if settings.base_training != "lora":
        return ModelParts(base, tokenizer, reasoner, settings, notes)
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"{folder}: adapter_model.safetensors is missing; save or download the model again")
    base.requires_grad_(False)
    try:
        adapted = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"{folder}: the adapter does not fit this base: {first_line(error)}") from error
    return ModelParts(adapted, tokenizer, reasoner, settings, notes)


def merged_parts(parts: ModelParts) -> ModelParts:
    """The parts with the adapter in the base's weights; see `SmolLMv3WithTRM.merge_and_unload`."""
    if parts.settings.base_training != "lora":
        return parts
    if parts.reasoner is not None and not parts.settings.read_with_adapter:
        raise ValueError("read_with_adapter=False: the base that reads has no adapter, so it cannot be merged")
    merged = parts.base_model.merge_and_unload()
    return parts._replace(base_model=merged, settings=replace(parts.settings, base_training="full"))


def save_tiny_base(parts: ModelParts, folder: Path) -> None:
    """Write the base of "tiny", which is nowhere else, as it was before the adapter came on it."""
    plain = build_tiny_model(parts.tokenizer, seed=0)
    wrapped = parts.base_model.get_base_model() if parts.settings.base_training == "lora" else parts.base_model
    weights = {name.replace(".base_layer", ""): value for name, value in wrapped.state_dict().items()}
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    plain.save_pretrained(str(folder))
    parts.tokenizer.save_pretrained(str(folder))


def save_parts(parts: ModelParts, folder: Path) -> None:
    """Write the parts; see `SmolLMv3WithTRM.save_pretrained`."""
    settings = parts.settings
    folder.mkdir(parents=True, exist_ok=True)
    if settings.base_training == "lora":
        parts.base_model.save_pretrained(str(folder))
    if settings.base_training == "full":
        parts.base_model.save_pretrained(str(folder / SAVED_BASE))
        parts.tokenizer.save_pretrained(str(folder / SAVED_BASE))
    elif settings.base == "tiny":
        save_tiny_base(parts, folder / SAVED_BASE)
    if parts.reasoner is not None:
        save_reasoner(parts.reasoner, folder)
    parts.tokenizer.save_pretrained(str(folder))
    write_settings(settings, folder, parts.notes or {})
