"""The base model: by a name on the Hub, from a folder or a GGUF file, or the tiny twin made on the spot."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from smollm_trm.data.prompts import add_markers
from smollm_trm.models.configuration import refuse_unsupported
from smollm_trm.models.tiny import build_tiny_model, train_tiny_tokenizer
from smollm_trm.records import UserMistake, first_line

ANCHOR_TEXT = "..."
"""The token whose embedding a fresh latent is near: of those tried on a real base, one of the least disturbing."""


@contextmanager
def no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def own_random_state() -> Any:
    """A context that leaves torch's global random state, on every device, as it was."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()))


BaseAndTokenizer = tuple[PreTrainedModel, PreTrainedTokenizerBase]


class LoadedBase(NamedTuple):
    """A base taken apart; its head shares the embedding table where the base ties them."""

    decoder: PreTrainedModel  # without its head
    head: nn.Linear  # to the vocabulary
    tokenizer: PreTrainedTokenizerBase
    name: str  # Hub name or folder to load it from again; empty where there is none
    ends: list[int]  # tokens that end a text, as its generation configuration says


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device | str | None = None) -> torch.dtype:
    """Of weights that are not trained: bf16 on GPUs of compute capability 8 and up, fp16 below, fp32 on a CPU.

    A T4 claims bf16 but only emulates it.
    """
    if torch.device(device or default_device()).type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def device_and_precision(model: object) -> dict[str, str | None]:
    """Where a model computes and in what: `device` by name and `precision` of its first weights, None without any."""
    first = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if first is None:
        return {"device": None, "precision": None}
    device = torch.cuda.get_device_name(first.device) if first.is_cuda else first.device.type
    return {"device": device, "precision": str(first.dtype).removeprefix("torch.")}


def is_local(model_name: str) -> bool:
    """Whether a base's name means a place on this machine."""
    path_like = model_name.startswith((".", "/", "~")) or model_name.endswith(".gguf") or model_name.count("/") > 1
    return path_like or Path(model_name).expanduser().exists()


def part_of_base(kind: type, model_name: str, **options: Any) -> Any:
    """`kind.from_pretrained` of a base on the Hub, in a folder or in a GGUF file; no pickle, its code only if asked."""
    place = Path(model_name).expanduser()
    if place.suffix == ".gguf":
        if not place.is_file():
            raise UserMistake(f"model_name={model_name!r}: no such file")
        model_name, options = str(place.parent), {**options, "gguf_file": place.name}
    elif is_local(model_name):
        if not (place / "config.json").is_file():
            reason = "no config.json in that folder; give a folder with a saved model"
            raise UserMistake(f"model_name={model_name!r}: {reason}")
        model_name = str(place)
    try:
        return kind.from_pretrained(model_name, **{"trust_remote_code": False, **options})
    except Exception as error:  # whatever a damaged file or the Hub's client makes it raise
        what = {"AutoConfig": "configuration", "AutoTokenizer": "tokenizer"}.get(kind.__name__, "weights")
        raise UserMistake(f"could not load the {what} of {str(place)!r}: {reason_not_loaded(error, place)}") from error


def reason_not_loaded(error: Exception, place: Path) -> str:
    reason = first_line(error)
    if "custom code" in reason:
        return "it brings code of its own, which is not run"
    if "safetensors" in reason and not isinstance(error, SafetensorError):
        convert = "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder), where you trust them"
        return f"no model.safetensors there, and pickled weights are not read; convert them once: {convert}"
    if isinstance(error, ImportError):
        return f"{reason} (a GGUF file needs `pip install gguf`)"
    files = " (a damaged file? copy or download the folder again)"
    return reason + (files if place.exists() else " (without a network, give model_name a local folder)")


def base_config(model_name: str, **options: Any) -> Any:
    config = part_of_base(AutoConfig, model_name, **options).get_text_config()
    refuse_unsupported(config.model_type)
    return config


def without_quantization(causal_lm: PreTrainedModel) -> PreTrainedModel:
    """An ordinary model with the weights that came from a GGUF file, which transformers refuses to save."""
    config = causal_lm.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(causal_lm)(config)
    plain.load_state_dict(causal_lm.state_dict(), assign=True)
    for name, buffer in causal_lm.named_buffers():  # rotary frequencies are in no state dict
        owner, _, last = name.rpartition(".")
        setattr(plain.get_submodule(owner), last, buffer)
    plain.tie_weights()
    plain.generation_config = causal_lm.generation_config
    return plain


def as_list(ends: int | list[int] | None) -> list[int]:
    """The tokens that end a text, which a generation configuration has in three forms."""
    return [ends] if isinstance(ends, int) else list(ends or [])


def take_apart(causal_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> LoadedBase:
    """A Hugging Face causal LM as decoder, head and tokenizer. One of ours without a reasoner is a base as well."""
    refuse_unsupported(causal_lm.config.get_text_config().model_type)
    if getattr(causal_lm.config, "reasoner", None) is not None:
        raise UserMistake(f"model_name={name!r} has a reasoner already: give the base that it was trained from")
    if tokenizer.eos_token_id is None:
        raise UserMistake(f"{name}: its tokenizer names no end of text; is tokenizer_config.json there, and whole?")
    backbone = causal_lm.base_model
    decoder, ends = getattr(backbone, "language_model", backbone), as_list(causal_lm.generation_config.eos_token_id)
    return LoadedBase(decoder, causal_lm.get_output_embeddings(), tokenizer, name, ends)


def load_base(
    model_name: str | BaseAndTokenizer,
    *,
    dtype: torch.dtype = torch.float32,
    tiny_texts: list[str] | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
) -> LoadedBase:
    """A Hugging Face decoder, its head and its tokenizer.

    Args:
        model_name: a name on the Hub, a local folder, a GGUF file, "tiny": a small SmolLM3 with random weights, or
            a model and its tokenizer, which are taken as they are.
        tiny_texts, seed: of "tiny": what its tokenizer is trained on, and of its weights.
        trust_remote_code: run code that the base brings, where its user said so.
        load_in_4bit: keep its linear layers in 4 bits (NF4, QLoRA's), which compute in `dtype`.
    """
    if load_in_4bit and (not isinstance(model_name, str) or model_name == "tiny" or model_name.endswith(".gguf")):
        raise UserMistake("load_in_4bit=True is for a base on the Hub or in a folder")
    if load_in_4bit and find_spec("bitsandbytes") is None:
        raise UserMistake("load_in_4bit=True needs bitsandbytes: pip install 'smollm-trm[quantized]'")
    if not isinstance(model_name, str):
        given = model_name[0].config  # one of ours knows where its base lies
        return take_apart(*model_name, getattr(given, "base_model", "") or given.name_or_path)
    if model_name == "tiny":
        if not tiny_texts:
            raise UserMistake("model_name='tiny' makes its tokenizer from the training texts: pass a dataset")
        tokenizer = train_tiny_tokenizer(tiny_texts)
        return take_apart(build_tiny_model(tokenizer, seed=seed).to(dtype), tokenizer, "")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    base_config(model_name, **options)
    tokenizer = part_of_base(AutoTokenizer, model_name, **options)
    if load_in_4bit:
        four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        options["quantization_config"] = BitsAndBytesConfig(**four_bits, bnb_4bit_compute_dtype=dtype)
    if model_name.endswith(".gguf"):
        causal_lm = without_quantization(part_of_base(AutoModelForCausalLM, model_name, dtype=dtype, **options))
    else:
        causal_lm = part_of_base(AutoModelForCausalLM, model_name, dtype=dtype, use_safetensors=True, **options)
    if load_in_4bit:
        causal_lm.base_model.is_loaded_in_4bit = True  # for PEFT, which sees no more than the decoder
        for module in causal_lm.modules():  # on a CPU an evaluation would repack them for a kernel without gradients
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        del causal_lm.config.quantization_config  # a saved model says how its base is loaded by nothing but its name
    return take_apart(causal_lm, tokenizer, model_name)


def anchor_embedding(base: LoadedBase) -> Tensor:
    """The embedding `(D,)` that fresh latents are near: of `ANCHOR_TEXT`, or the mean where a vocabulary refuses it."""
    table = base.decoder.get_input_embeddings().weight.detach()
    try:
        return table[base.tokenizer(ANCHOR_TEXT, add_special_tokens=False)["input_ids"][-1]]
    except Exception:  # what a tokenizer without an unknown token raises
        return table.mean(0)


def with_rows(base: LoadedBase, n_rows: int) -> LoadedBase:
    """A base whose embedding table has at least so many rows; new ones are the mean of the old."""
    if base.head.out_features >= n_rows:
        return base
    decoder, old = base.decoder, base.head.weight
    tied = old is decoder.get_input_embeddings().weight
    table = decoder.resize_token_embeddings(n_rows, mean_resizing=False)
    head = nn.Linear(old.shape[1], n_rows, bias=False, device=old.device, dtype=old.dtype)
    with torch.no_grad():
        table.weight[len(old) :] = table.weight[: len(old)].mean(0)
        head.weight.copy_(torch.cat([old, old.mean(0, keepdim=True).expand(n_rows - len(old), -1)]))
    if tied:
        head.weight = table.weight
    return base._replace(head=head)


def with_markers(base: LoadedBase) -> LoadedBase:
    """A base that knows Coconut's three tokens; new ones begin as `<<`, which opens a step."""
    known = base.tokenizer.get_vocab()
    base = base._replace(tokenizer=copy.deepcopy(base.tokenizer))
    new = [token for token in add_markers(base.tokenizer) if base.tokenizer.convert_ids_to_tokens(token) not in known]
    base = with_rows(base, len(base.tokenizer))
    opens = base.tokenizer("<<", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        for table in (base.decoder.get_input_embeddings().weight, base.head.weight):
            table[new] = table[opens].clone()
    return base
