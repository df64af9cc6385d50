"""The arithmetic decoder and its 16 tokens: an ordinary Hugging Face causal LM in the sizes of the user's document.

The document gives layers, width, heads and feed-forward width; a plain feed-forward of two matrices and no biases (as
in `Arcee`: Llama's block with ReLU squared) is the block those columns describe. Positions are rotary (RoPE): a column
is found by its distance from `+` and `=`, which is the same wherever a problem stands. The embedding table is shared
with the output head, which keeps the latents of a reasoner in one space.

A space is `<noop>` and is shown as a space. `<noop>` also pads batches: so padding is never told from text by its id,
only by the attention mask. There is no unknown token: the tokenizer itself refuses a text with any other character.
"""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import ArceeConfig, ArceeForCausalLM, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from smollm_trm.arithmetic.rules import END, NOOP, THINK, THINK_CLOSED, TOKEN_PATTERN
from smollm_trm.arithmetic.settings import ARITHMETIC_SIZES, DECODER_SHAPE
from smollm_trm.models.loading import no_progress_bars, own_random_state, part_of_base
from smollm_trm.records import UserMistake, check_choice, check_range

ARITHMETIC_TOKENS = (*"0123456789", "+", "=", END, THINK, THINK_CLOSED, NOOP)
VOCABULARY = {token: token_id for token_id, token in enumerate(ARITHMETIC_TOKENS)}


def build_arithmetic_tokenizer(*, max_length: int = 128) -> PreTrainedTokenizerFast:
    """A Hugging Face tokenizer of the 16 tokens, for a context of `max_length` tokens."""
    tokenizer = Tokenizer(WordLevel(VOCABULARY))
    tokenizer.normalizer = normalizers.Replace(" ", NOOP)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(NOOP, " "), decoders.Fuse()])
    options = {"model_max_length": max_length, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=NOOP, **options)


def arithmetic_config(model_size: str, *, max_length: int = 128) -> ArceeConfig:
    """The Hugging Face configuration of a size; `max_length` is the context in tokens."""
    check_choice(ARITHMETIC_SIZES, model_size=model_size)
    check_range(1, max_length=max_length)
    return ArceeConfig(
        **dict(zip(DECODER_SHAPE, ARITHMETIC_SIZES[model_size], strict=True)),
        vocab_size=len(ARITHMETIC_TOKENS),
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCABULARY[END],
        pad_token_id=VOCABULARY[NOOP],
    )


def build_arithmetic_model(model_size: str, *, max_length: int = 128, seed: int = 42) -> ArceeForCausalLM:
    """A fresh decoder with random weights fixed by the seed (the global random state is left alone)."""
    with own_random_state():
        torch.manual_seed(seed)
        return ArceeForCausalLM(arithmetic_config(model_size, max_length=max_length))


def save_arithmetic_model(model: ArceeForCausalLM, folder: Path) -> None:
    """Write `model.safetensors`, `config.json` and the tokenizer: a folder that `from_pretrained` loads."""
    with no_progress_bars():  # they would break the training's
        model.save_pretrained(folder)
    build_arithmetic_tokenizer(max_length=model.config.max_position_embeddings).save_pretrained(folder)


def load_arithmetic_model(checkpoint: Path, *, model_size: str | None = None) -> ArceeForCausalLM:
    """Load a trained decoder from its folder or the `model.safetensors` in it; `model_size` refuses other sizes."""
    folder = checkpoint.parent if checkpoint.suffix == ".safetensors" else checkpoint
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"there is no {folder / name}: train a model with "
                f"'smollm-trm arithmetic train --output-dir {folder}', or name the folder of one"
            )
    vocabulary = part_of_base(AutoTokenizer, str(folder)).get_vocab()
    options = {"dtype": torch.float32, "output_loading_info": True, "use_safetensors": True}
    with no_progress_bars():
        model, report = part_of_base(AutoModelForCausalLM, str(folder), **options)
    if report["missing_keys"] or report["mismatched_keys"] or vocabulary != VOCABULARY:
        raise UserMistake(f"{folder} is no whole arithmetic model: its tensors or its 16 tokens do not fit config.json")
    if model_size is not None:
        check_choice(ARITHMETIC_SIZES, model_size=model_size)
        shape = tuple(getattr(model.config, name, None) for name in DECODER_SHAPE)
        if shape != ARITHMETIC_SIZES[model_size]:
            found = next((size for size, known in ARITHMETIC_SIZES.items() if known == shape), shape)
            raise UserMistake(f"{folder} holds a model of size {found}, not {model_size}: leave --model-size out")
    return model.eval()
