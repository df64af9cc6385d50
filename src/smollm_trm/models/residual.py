"""Half precision without overflow: the residual stream of an fp16 base is kept in fp32.

SmolLM3 and most recent bases were trained in bf16. Their residual stream grows beyond fp16's largest number (65,504),
and a GPU without bf16, such as a T4, has fp16 only. So the embeddings enter in fp32 and the blocks compute under
autocast: every matrix product is in fp16, every sum over blocks in fp32. What leaves the final norm is fp16 again.
"""

from typing import Any

import torch
from torch import Tensor, nn


def rotary_in_fp16(module: nn.Module, given: Any, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Tables of cosines and sines in fp16, or keys would be fp32 beside values in fp16, which no static cache takes."""
    return tuple(table.to(torch.float16) for table in tables)


def decoder_pass(decoder: nn.Module, *, inputs_embeds: Tensor, **inputs: Any) -> Any:
    """One pass of a base without its head: as it is, unless its weights are fp16 (GPT-2 was made for fp16)."""
    rotary = [module for name, module in decoder.named_modules() if name.endswith("rotary_emb")]
    if decoder.dtype != torch.float16 or not rotary:
        return decoder(inputs_embeds=inputs_embeds, **inputs)
    hooks = [module.register_forward_hook(rotary_in_fp16) for module in rotary]
    try:
        with torch.autocast(inputs_embeds.device.type, torch.float16):
            output = decoder(inputs_embeds=inputs_embeds.float(), **inputs)
    finally:
        for hook in hooks:
            hook.remove()
    output.last_hidden_state = output.last_hidden_state.to(torch.float16)
    return output
