"""The tiny twin: SmolLM3's own class at a size that trains from scratch on a laptop's CPU in minutes.

Same classes, same code path, same special tokens as SmolLM3-3B, with an own small tokenizer: byte-level, so that any
text can be encoded, and with every digit a token of its own, so that sums can be learned.
"""

from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|im_start|>",
    "<|im_end|>",
)
TINY_HIDDEN_SIZE = 128
TINY_DEPTH = 2
WORD_PATTERN = r" ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s"


def train_tiny_tokenizer(texts: Iterable[str], *, vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with SmolLM3's special tokens, trained on these texts."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",  # as SmolLM3's own tokenizer says
        clean_up_tokenization_spaces=False,
    )
    fast.add_tokens(["<think>", "</think>"])  # one token each, and not "special": as in SmolLM3
    return fast


def build_tiny_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = TINY_HIDDEN_SIZE,
    n_layers: int = TINY_DEPTH,
    n_heads: int = 4,
    intermediate_size: int = 384,
    seed: int = 0,
) -> SmolLM3ForCausalLM:
    """SmolLM3 with random weights at a small size."""
    config = SmolLM3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=max(1, n_heads // 2),
        max_position_embeddings=2048,
        pad_token_id=tokenizer.convert_tokens_to_ids("<|finetune_right_pad_id|>"),
        bos_token_id=tokenizer.convert_tokens_to_ids("<|begin_of_text|>"),
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
        use_cache=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmolLM3ForCausalLM(config)
