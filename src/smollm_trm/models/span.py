"""The latent span: slots in the token stream whose embeddings a reasoner provides."""

import torch
from torch import Tensor

from smollm_trm.records import UserMistake


def whole_spans(input_ids: Tensor, slot_id: int, *, needed: bool = True) -> Tensor:
    """Where the first run of slot tokens of each row stands, `(B, L)` of bool; later slot tokens are no slots. A span
    that is cut off by the row's end is refused, and where one is `needed`, a row without any."""
    slots = input_ids == slot_id
    begins = slots & ~torch.cat([torch.zeros_like(slots[:, :1]), slots[:, :-1]], dim=1)
    slots = slots & (begins.cumsum(1) == 1)
    if bool(slots[:, -1].any()) or (needed and not bool(slots.any(1).all())):
        raise UserMistake(
            "a prompt without a latent span: write it with model.encoder.encode_prompt, the tokenizer's "
            "apply_chat_template or generate_with_thinking (for no latents at all: use_trm=False)"
        )
    return slots


def fill_slots(embeddings: Tensor, slots: Tensor, latents: Tensor) -> Tensor:
    """Embeddings `(B, L, D)` with latents `(B, M, D)` in the slots, in order; gradients flow to them."""
    counts = slots.sum(1, keepdim=True)  # (B, 1)
    n_latents = latents.shape[1]
    if int(counts.max()) > n_latents:
        raise UserMistake(f"a prompt with {int(counts.max())} latent slots, but there are {n_latents} latents")
    taken = torch.arange(n_latents, device=counts.device) < counts  # (B, M)
    return embeddings.masked_scatter(slots.unsqueeze(-1), latents.to(embeddings.dtype)[taken])


def given_slots(input_ids: Tensor, slot_id: int, n_latents: int) -> Tensor:
    """The first `n_latents` slot tokens of each row, `(B, L)` of bool: where latents that are given belong."""
    slots = input_ids == slot_id
    return slots & (slots.cumsum(1) <= n_latents)
