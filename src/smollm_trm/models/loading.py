"""The base model: loaded by name or folder, and adapted by LoRA, trained whole, or frozen."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from smollm_trm.models.tiny import build_tiny_model, train_tiny_tokenizer
from smollm_trm.records import first_line

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
    target_modules: list[str] | None = None
    """Names of the linear layers to adapt; None takes the q, k, v and o projections."""

    def __post_init__(self) -> None:
        for name in ("r", "alpha"):
            if getattr(self, name) < 1:
                raise ValueError(f"lora {name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora dropout={self.dropout}: must be in [0, 1)")


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype() -> torch.dtype:
    """Of weights that are not trained: bf16 on GPUs of compute capability 8 and up, fp16 below, fp32 on a CPU.

    A T4 claims bf16 but only emulates it.
    """
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def device_and_precision(model: object) -> dict[str, str | None]:
    """Where a model computes and in what: `device` by name and `precision` of its first weights, None without any."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if first is None:
        return {"device": None, "precision": None}
    device = torch.cuda.get_device_name(first.device) if first.is_cuda else first.device.type
    return {"device": device, "precision": str(first.dtype).removeprefix("torch.")}


def part_of_base(kind: type, model_name: str, **options: Any) -> Any:
    """`kind.from_pretrained` of a base on the Hub or in a local folder; a refusal is one line."""
    looks_local = model_name.startswith((".", "/", "~")) or Path(model_name).exists()
    if looks_local and not (Path(model_name).expanduser() / "config.json").is_file():
        raise ValueError(f"model_name={model_name!r}: no config.json in that folder; give a folder with a saved model")
    try:
        return kind.from_pretrained(str(Path(model_name).expanduser()) if looks_local else model_name, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"could not load the base model {model_name!r}: {first_line(error)} "
            "(without a network, give model_name a local folder)"
        ) from error


def load_base(
    model_name: str, *, dtype: torch.dtype = torch.float32, tiny_texts: list[str] | None = None, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Hugging Face decoder and its tokenizer.

    Args:
        model_name: a name on the Hub, a local folder, or "tiny" for a small SmolLM3 with random weights.
        dtype: of the weights.
        tiny_texts: what the tokenizer of "tiny" is trained on.
        seed: of the weights of "tiny".

    Raises:
        ValueError: one line that says why the model could not be loaded and what to do.
    """
    if model_name == "tiny":
        if not tiny_texts:
            raise ValueError("model_name='tiny' makes its tokenizer from the training texts: pass a dataset")
        tokenizer = train_tiny_tokenizer(tiny_texts)
        return build_tiny_model(tokenizer, seed=seed).to(dtype), tokenizer
    tokenizer = part_of_base(AutoTokenizer, model_name)
    return part_of_base(AutoModelForCausalLM, model_name, dtype=dtype), tokenizer


def adapt_base(base: PreTrainedModel, *, training: str, lora: LoraSettings) -> nn.Module:
    """Prepare the base for training.

    Args:
        base: the Hugging Face model.
        training: "lora" puts a fresh adapter on it, "frozen" trains none of it, "full" trains all of it.
        lora: settings of the adapter.

    Returns:
        The base, wrapped by PEFT for "lora". Adapter weights are fp32 whatever the base is.
    """
    if training == "full":
        return base
    base.requires_grad_(False)
    if training == "frozen":
        return base
    if training != "lora":
        raise ValueError(f"base_training={training!r}: choose 'lora', 'frozen' or 'full'")
    is_gpt2 = base.config.model_type == "gpt2"
    targets = lora.target_modules or (GPT2_ATTENTION if is_gpt2 else list(ATTENTION_PROJECTIONS))
    settings = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=is_gpt2,
    )
    return get_peft_model(base, settings)
