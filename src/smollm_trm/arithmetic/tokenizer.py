"""The 16 tokens as a Hugging Face tokenizer.

Digits, `+`, `=`, and the four marks `<end>`, `<think>`, `</think>`, `<noop>`. A space is `<noop>` and is
shown as a space. `<noop>` also pads batches: so padding is never told from text by its id, only by the
attention mask. A text with any other character is refused by the tokenizer itself (there is no unknown
token).
"""

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from smollm_trm.arithmetic.rules import END, NOOP, THINK, THINK_CLOSED

ARITHMETIC_TOKENS = (*"0123456789", "+", "=", END, THINK, THINK_CLOSED, NOOP)


def build_arithmetic_tokenizer(*, max_length: int = 128) -> PreTrainedTokenizerFast:
    """Make the tokenizer; `save_pretrained` and `AutoTokenizer.from_pretrained` work as for any other.

    Args:
        max_length: tokens of the context, kept as `model_max_length`.
    """
    vocabulary = {token: token_id for token_id, token in enumerate(ARITHMETIC_TOKENS)}
    tokenizer = Tokenizer(WordLevel(vocabulary))
    tokenizer.normalizer = normalizers.Replace(" ", NOOP)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("<[a-z/]+>|."), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(NOOP, " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=NOOP,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def show_tokens(tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> str:
    """Text of a row up to and including its first `<end>` (skipping special tokens would lose spaces)."""
    if tokenizer.eos_token_id in token_ids:
        token_ids = token_ids[: token_ids.index(tokenizer.eos_token_id) + 1]
    return tokenizer.decode(token_ids, skip_special_tokens=False)
