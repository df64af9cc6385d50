"""A model as one folder that needs no other: the adapter merged into the base, all of it in 16 bits."""

import copy
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from smollm_trm.models.adapters import adapter_layers, refuse_4bit
from smollm_trm.models.hub import model_card
from smollm_trm.models.pretrained import SavedBesideItsBase
from smollm_trm.models.storage import REASONER_PREFIX, weights_to_save
from smollm_trm.records import write_text


@torch.no_grad()
def export_merged(model: SavedBesideItsBase, folder: str | Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write base + adapter in `dtype`, and the reasoner, for `from_pretrained`; the model stays as it is."""
    refuse_4bit(model.model.language_model)
    config = copy.deepcopy(model.config)
    config.base_training, config.base_model = "full", ""
    decoder = model.model.language_model
    state = weights_to_save(model, base_model="")
    state = {name: one if name.startswith(REASONER_PREFIX) else one.to(dtype) for name, one in state.items()}
    for name, layer in adapter_layers(decoder).items():
        merged = layer.get_base_layer().weight.float() + layer.get_delta_weight("default").float()
        state[f"model.language_model.{name}.weight"] = merged.to(dtype)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict({name: tensor.contiguous().cpu() for name, tensor in state.items()}, str(folder))
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    model.tokenizer.save_pretrained(str(folder))
    write_text(folder / "README.md", model_card(config))
