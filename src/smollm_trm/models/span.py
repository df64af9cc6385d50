"""The latent span: M slots in the token stream whose embeddings a reasoner provides.

One class knows where the slots of a batch are, how they are filled and what is measured about them; nothing else in
the package asks which reasoner is in use.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def latent_variation(latents: Tensor) -> Tensor:
    """How much latents differ between problems: std over the batch divided by their root mean square, a scalar.

    0 means that every problem gets the same latents: whatever was trained, it is a soft prompt.

    Args:
        latents: `(B, M, D)`; the part that is the same for all problems may be included.
    """
    wide = latents.detach().float()
    return wide.std(0, correction=0).square().mean().sqrt() / wide.square().mean().sqrt().clamp_min(1e-12)


class LatentSpan:
    """Where the slots of a batch of prompts stand.

    Args:
        slots: `(B, L)`, True at a slot.
    """

    def __init__(self, slots: Tensor) -> None:
        self.slots = slots

    @classmethod
    def find(cls, input_ids: Tensor, attention_mask: Tensor, slot_id: int) -> "LatentSpan":
        """Slots are real tokens with the slot's id; padding never is one."""
        return cls((input_ids == slot_id) & attention_mask.bool())

    def columns(self) -> tuple[int, int]:
        """First slot column and the column after the last, for a batch whose spans stand in the same columns."""
        row = self.slots[0].nonzero().flatten()
        if row.numel() == 0:
            raise ValueError("no latent span in the prompt: write it with PromptEncoder, or set use_trm=False")
        start, end = int(row[0]), int(row[-1]) + 1
        if not bool(self.slots[:, start:end].all()) or int(self.slots.sum()) != self.slots.shape[0] * (end - start):
            raise ValueError("the latent spans of a batch must stand in the same columns: pad prompts on the left")
        return start, end

    def positions(self, attention_mask: Tensor) -> Tensor:
        """Position ids `(B, L)` that count real tokens but not slots: all slots share the position of `<think>`.

        The answer is then as far from the question as without latents, whatever M is. (With positions that count
        slots, 16 latents put a trained small base 0.8 nat per token off; so they cost 0.01.)
        """
        return ((attention_mask.bool() & ~self.slots).long().cumsum(-1) - 1).clamp_min(0)

    def fill(self, embeddings: Tensor, latents: Tensor) -> Tensor:
        """Embeddings `(B, L, D)` with latents `(B, M, D)` in the slots, in order; gradients flow to them."""
        return embeddings.masked_scatter(self.slots.unsqueeze(-1), latents.to(embeddings.dtype))

    @contextmanager
    def filled(self, embedding: nn.Module, latents: Tensor) -> Iterator[None]:
        """Fill the slots in every forward that starts at the prompt, for Hugging Face's `generate()`.

        Works with any cache and with none, since it acts where token ids become embeddings. Rows that `generate()`
        repeats (beams, several samples) get the latents of the row they come from.

        Args:
            embedding: the base's input embedding module.
            latents: `(B, M, D)`.
        """

        def fill_prompt(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            rows, length = inputs[0].shape
            prompt_length = self.slots.shape[1]
            if length < prompt_length:  # one more token on top of a cache
                return output
            repeats = rows // self.slots.shape[0]
            repeated = LatentSpan(self.slots.repeat_interleave(repeats, dim=0))
            prompt = repeated.fill(output[:, :prompt_length], latents.repeat_interleave(repeats, dim=0))
            return torch.cat([prompt, output[:, prompt_length:]], dim=1)

        handle = embedding.register_forward_hook(fill_prompt)
        try:
            yield
        finally:
            handle.remove()
