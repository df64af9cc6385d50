"""What a reasoner may ask for: a prompt as the base sees it, each part computed only if asked.

Static latents and pause tokens ask for nothing and cost nothing. The TRM and the compressor ask for the hidden states
of some layers, a *read pass*. Coconut asks for a step of the base over a growing cache. Both carry gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from smollm_trm.models.residual import decoder_pass


def positions_of(mask: Tensor) -> Tensor:
    """Position ids `(B, L)` of left- or right-padded rows: real tokens count from 0, padding gets what is near."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def hidden_states_at(decoder: nn.Module, depths: Sequence[int], **inputs) -> list[Tensor]:
    """The hidden states that `output_hidden_states=True` has at these depths, without keeping the others in memory."""
    n_layers = decoder.config.num_hidden_layers
    if not depths or list(depths) != sorted(set(depths)) or depths[0] < 0 or depths[-1] > n_layers:
        raise ValueError(f"depths {list(depths)}: give rising numbers from 0 to {n_layers}")
    stacks = (module for module in decoder.modules() if isinstance(module, nn.ModuleList))
    layers = next(stack for stack in stacks if len(stack) == decoder.config.num_hidden_layers)
    states: list[Tensor] = []
    inner = [layers[k] for k in depths if k < len(layers)]
    hooks = [layer.register_forward_pre_hook(lambda _, given: states.append(given[0])) for layer in inner]
    try:
        last = decoder_pass(decoder, **inputs).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return [*states, last][: len(depths)]


class Prompt:
    """A batch of prompts up to and including `<think>`, their last tokens in the last column."""

    def __init__(self, *, decoder: nn.Module, embeddings: Tensor, mask: Tensor, n_slots: Tensor | None) -> None:
        self.decoder = decoder  # the base without its head
        self.embeddings = embeddings  # (B, L, D)
        self.mask = mask  # (B, L) of bool, True = real
        self.n_slots = n_slots  # (B,), slots that each row has behind the prompt; None where none is to be filled
        self.cache: Cache | None = None

    @property
    def checkpointing(self) -> bool:
        """Whether the base recomputes its activations, which allows no cache."""
        parts = self.decoder.modules()
        return self.decoder.training and any(getattr(part, "gradient_checkpointing", False) for part in parts)

    def hidden_states(self, depths: Sequence[int]) -> list[Tensor]:
        """The read pass: hidden states `(B, L, D)` of the base at these depths, see `hidden_states_at`; its keys and
        values stay in `cache`, so that the answering pass need not read the prompt again."""
        self.cache = None if self.checkpointing else DynamicCache(config=self.decoder.config)
        return hidden_states_at(
            self.decoder,
            depths,
            inputs_embeds=self.embeddings,
            attention_mask=self.mask.long(),
            position_ids=positions_of(self.mask),
            past_key_values=self.cache,
            use_cache=self.cache is not None,
        )

    def extend(
        self, embeddings: Tensor | None = None, past: Cache | Tensor | None = None
    ) -> tuple[Tensor, Cache | Tensor]:
        """One step of the base behind the prompt, with gradient, given what stands next, `(B, 1, D)`, and the past;
        without both it reads the prompt itself. Returns the final-norm hidden state `(B, 1, D)` of the last position,
        and the past: a cache, written in place, or, where gradient checkpointing allows none, all embeddings so far."""
        given = self.embeddings if embeddings is None else embeddings
        if self.checkpointing:
            given = given if past is None else torch.cat([past, given], dim=1)
            cache, begin, past = None, 0, given
        else:
            cache = past = DynamicCache(config=self.decoder.config) if past is None else past
            begin = cache.get_seq_length()
        extra = begin + given.shape[1] - self.mask.shape[1]
        mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), extra)], dim=1)
        output = decoder_pass(
            self.decoder,
            inputs_embeds=given,
            attention_mask=mask.long(),
            position_ids=positions_of(mask)[:, begin:],
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state[:, -1:], past
