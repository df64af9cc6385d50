"""What the latents read: for a question, how much of each latent's attention goes to each of its words."""

from typing import Any

import torch
from torch import Tensor

from smollm_trm.models.generation import encode_prompts
from smollm_trm.models.span import whole_spans


@torch.no_grad()
def attention_by_word(model: Any, question: str) -> tuple[list[str], Tensor] | None:
    """The words of a prompt and each latent's share for them, `(M, words)`; None for a reasoner that reads nothing.

    A word is a token and those behind it that do not begin with a space.
    """
    if not hasattr(model.reasoner, "attention"):
        return None
    context = model.config.max_position_embeddings
    ids, mask = encode_prompts(model.encoder, [question], max_new_tokens=1, context_length=context, device=model.device)
    prompt = model.model.prompt_before(ids, mask, whole_spans(ids, model.config.slot_token_id))
    shares = model.reasoner.attention(prompt)[0].float().cpu()  # (M, L)
    words: list[str] = []
    word_of = []
    for token in ids[0, : shares.shape[1]].tolist():
        text = model.tokenizer.decode([token])
        if not words or text[:1].isspace():
            words.append("")
        words[-1] += text.strip()
        word_of.append(len(words) - 1)
    by_word = torch.zeros(len(shares), len(words)).index_add_(1, torch.tensor(word_of), shares)
    return words, by_word
