"""The arithmetic decoder: an ordinary Hugging Face causal LM in the sizes of the user's document.

The document gives layers, width, heads and feed-forward width; a plain feed-forward of two matrices and no
biases (as in `Arcee`: Llama's block with ReLU squared) is the block those columns describe. Its true
parameter counts are 2.1M, 12.6M and 25.2M, not the ~1M, ~5M and ~10M of the document.

Positions are rotary (RoPE): a column is found by its distance from `+` and `=`, which is the same wherever a
problem stands, and rotary positions say distances; left-padding then changes nothing either. The embedding
table is shared with the output head (16 rows: it saves nothing, but keeps the latents of a reasoner in one
space).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    ArceeConfig,
    ArceeForCausalLM,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from smollm_trm.arithmetic.tokenizer import ARITHMETIC_TOKENS, build_arithmetic_tokenizer
from smollm_trm.records import first_line


@dataclass(frozen=True)
class DecoderShape:
    """One row of the table of sizes."""

    layers: int
    """Number of blocks."""
    hidden_size: int
    """Width of the residual stream."""
    heads: int
    """Attention heads."""
    feed_forward: int
    """Width inside the feed-forward layer."""


ARITHMETIC_SIZES = {
    "tiny": DecoderShape(layers=2, hidden_size=128, heads=4, feed_forward=512),
    "small": DecoderShape(layers=4, hidden_size=256, heads=4, feed_forward=512),
    "medium": DecoderShape(layers=6, hidden_size=512, heads=8, feed_forward=1024),
    "large": DecoderShape(layers=8, hidden_size=512, heads=8, feed_forward=2048),
}


def arithmetic_config(model_size: str, *, max_length: int = 128) -> ArceeConfig:
    """The Hugging Face configuration of a size.

    Args:
        model_size: "tiny" (of the fast preset), "small", "medium" or "large".
        max_length: tokens of the context.

    Raises:
        ValueError: there is no such size.
    """
    if model_size not in ARITHMETIC_SIZES:
        raise ValueError(f"model_size is {model_size!r}, but must be one of {', '.join(ARITHMETIC_SIZES)}")
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}, but must be at least 1")
    shape = ARITHMETIC_SIZES[model_size]
    return ArceeConfig(
        vocab_size=len(ARITHMETIC_TOKENS),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=shape.feed_forward,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ARITHMETIC_TOKENS.index("<end>"),
        pad_token_id=ARITHMETIC_TOKENS.index("<noop>"),
    )


def build_arithmetic_model(model_size: str, *, max_length: int = 128, seed: int = 42) -> PreTrainedModel:
    """A fresh decoder with random weights fixed by the seed (the global random state is left alone)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ArceeForCausalLM(arithmetic_config(model_size, max_length=max_length))


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def save_arithmetic_model(model: PreTrainedModel, folder: Path) -> None:
    """Write `model.safetensors`, `config.json` and the tokenizer: a folder that `from_pretrained` loads."""
    with _no_progress_bars():
        model.save_pretrained(folder)
    build_arithmetic_tokenizer(max_length=model.config.max_position_embeddings).save_pretrained(folder)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """No bars for a file that is read or written in milliseconds: they would break the bar of the training."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def load_arithmetic_model(
    checkpoint: Path, *, model_size: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a trained decoder from its folder, or from the `model.safetensors` in it.

    Args:
        checkpoint: `checkpoints`, `checkpoints/model.safetensors`,
            `checkpoints/checkpoint-1000/model.safetensors`...
        model_size: refuse a checkpoint of another size; None takes the size the checkpoint has.

    Raises:
        FileNotFoundError: nothing there, or a part of the folder is missing.
        ValueError: the checkpoint is of another size or of another kind, or damaged.
    """
    folder = checkpoint.parent if checkpoint.suffix == ".safetensors" else checkpoint
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"there is no {folder / name}: train a model with "
                f"'smollm-trm arithmetic train --output-dir {folder}', or name the folder of one"
            )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        with _no_progress_bars():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # the many ways in which a foreign or damaged folder fails to load
        raise ValueError(f"{folder} cannot be loaded, it is damaged or of another kind ({first_line(error)})") from None
    if report["missing_keys"] or report["mismatched_keys"] or tokenizer.get_vocab().keys() != set(ARITHMETIC_TOKENS):
        raise ValueError(f"{folder} is no whole arithmetic model: its tensors or its 16 tokens do not fit config.json")
    if model_size is not None:
        refuse_another_size(model.config, model_size, folder)
    return model.eval(), tokenizer


def refuse_another_size(config: ArceeConfig, model_size: str, folder: Path) -> None:
    """Raise ValueError, with both shapes, where a checkpoint is not of the size asked for."""
    asked = arithmetic_config(model_size)
    shape_names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    found_shape = [getattr(config, name, None) for name in shape_names]
    if found_shape != [getattr(asked, name) for name in shape_names]:
        found = next((size for size in ARITHMETIC_SIZES if _shape_of(size) == found_shape), f"shape {found_shape}")
        raise ValueError(f"{folder} holds a model of size {found}, not {model_size}: leave --model-size out")


def _shape_of(model_size: str) -> list[int]:
    shape = ARITHMETIC_SIZES[model_size]
    return [shape.layers, shape.hidden_size, shape.heads, shape.feed_forward]
