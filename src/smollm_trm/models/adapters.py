"""LoRA on the base: injected by PEFT into the decoder in place, saved as PEFT saves it, in a folder of its own."""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from smollm_trm.models.configuration import readable, refuse_other_tensors
from smollm_trm.records import UserMistake, check_range, first_line, picked

ADAPTER_FOLDER = "adapter"
"""Not the model's own folder: transformers takes a folder with an adapter_config.json for an adapter and no more."""
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
GPT2_ATTENTION = r".*\.attn\.(c_attn|c_proj)"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """The LoRA adapter on the base's attention projections."""

    r: int = 16
    """Rank of each update."""
    alpha: int = 32
    """The update is scaled by alpha / r."""
    dropout: float = 0.1
    """Dropout probability on an update's input."""
    target_modules: list[str] | str | None = None
    """Names of the linear layers to adapt, or "all-linear"; None takes the q, k, v and o projections."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r), which keeps high ranks stable (rsLoRA)."""
    use_dora: bool = False
    """Train each column's length apart from its direction (DoRA): better at low ranks, slower."""

    def __post_init__(self) -> None:
        check_range(1, **{"lora r": self.r, "lora alpha": self.alpha})
        if not 0 <= self.dropout < 1:
            raise UserMistake(f"lora dropout={self.dropout}: must be in [0, 1)")
        if self.target_modules == [] or (isinstance(self.target_modules, str) and self.target_modules != "all-linear"):
            advice = "name layers in a list, or 'all-linear'; base_training='frozen' for no LoRA"
            raise UserMistake(f"lora target_modules={self.target_modules!r}: {advice}")

    def to_peft(self, model_type: str) -> LoraConfig:
        is_gpt2 = model_type == "gpt2"
        return LoraConfig(
            task_type=TaskType.FEATURE_EXTRACTION,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules or (GPT2_ATTENTION if is_gpt2 else list(ATTENTION_PROJECTIONS)),
            fan_in_fan_out=is_gpt2,
            **picked(self, "r", "use_rslora", "use_dora"),
        )


def adapter_layers(decoder: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in decoder.named_modules() if isinstance(module, LoraLayer)}


def add_adapter(decoder: PreTrainedModel, config: PeftConfig) -> None:
    """Inject a fresh adapter; its weights are fp32 whatever the base is, the base is frozen."""
    if adapter_layers(decoder):
        raise UserMistake("this base has an adapter already: load it anew, or call merge_and_unload() first")
    decoder.requires_grad_(False)
    try:
        decoder.add_adapter(config)
    except ValueError as error:
        raise UserMistake(f"lora target_modules={config.target_modules!r}: {first_line(error)}") from error
    for name, parameter in decoder.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()


def refuse_4bit(decoder: PreTrainedModel) -> None:
    if getattr(decoder, "is_loaded_in_4bit", False):
        raise UserMistake("the base is in 4 bits: save the adapter, load it again without load_in_4bit, then merge")


def take_off_adapter(decoder: PreTrainedModel, *, merge: bool = False) -> bool:
    """Take the adapter off, its updates added into the base's weights (`merge`) or lost; False where there was none."""
    layers = adapter_layers(decoder)
    if merge:
        refuse_4bit(decoder)
    for name, layer in layers.items():
        if merge:
            layer.merge(safe_merge=True)
        parent, _, last = name.rpartition(".")
        setattr(decoder.get_submodule(parent), last, layer.get_base_layer())
    if layers:
        decoder._hf_peft_config_loaded = False
        del decoder.peft_config
    return bool(layers)


def adapter_weights(decoder: PreTrainedModel) -> dict[str, Tensor]:
    return get_peft_model_state_dict(decoder, adapter_name="default", save_embedding_layers=False)


def save_adapter(decoder: PreTrainedModel, folder: Path, *, base_model: str) -> None:
    """Write adapter_config.json, with the base's name on the Hub if it has one, and adapter_model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    config = decoder.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = base_model or None, False
    config.save_pretrained(str(folder))
    weights = {f"{ADAPTER_PREFIX}{name}": one.contiguous() for name, one in adapter_weights(decoder).items()}
    save_file(weights, folder / ADAPTER_FILE)


def load_adapter(decoder: PreTrainedModel, folder: Path) -> None:
    with readable(f"{folder}: the adapter"):
        weights = load_file(folder / ADAPTER_FILE)
        config = PeftConfig.from_pretrained(str(folder))
        add_adapter(decoder, config)
    named = {name.removeprefix(ADAPTER_PREFIX): weight for name, weight in weights.items()}
    expected = adapter_weights(decoder)
    refuse_other_tensors(f"{folder}: the adapter does not fit this base", named, expected)
    with torch.no_grad():
        set_peft_model_state_dict(decoder, named, adapter_name="default")
