"""From questions to texts: the context budget, and a model that starts to think again.

Everything here stands on `SmolLMv3WithTRM.generate`, which is Hugging Face's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from smollm_trm.data.batching import pad_left
from smollm_trm.data.prompts import THINK_OPEN, PromptEncoder, padding_token_id
from smollm_trm.models.loading import as_list
from smollm_trm.models.reasoners.reasoner import Thought
from smollm_trm.records import UserMistake

SINK_TOKENS = 4


@dataclass(frozen=True)
class Completion:
    """What a model wrote behind one prompt."""

    text: str  # without special tokens
    n_tokens: int  # generated, the end of text included
    cut_off: bool  # all tokens were used and the text had not ended


def fit_to_context(prompt: list[int], *, frame: int, max_new_tokens: int, context_length: int) -> list[int]:
    """Make room for new tokens: the prompt's oldest tokens go, but the first 4 (attention sinks) stay."""
    excess = len(prompt) + max_new_tokens - context_length
    if excess <= 0:
        return prompt
    if len(prompt) - excess <= SINK_TOKENS + frame:
        raise UserMistake(
            f"the question needs {len(prompt) + max_new_tokens} tokens with its latents and {max_new_tokens} new "
            f"tokens, the model has {context_length}: nothing of it would be left; lower max_new_tokens or num_latents"
        )
    return prompt[:SINK_TOKENS] + prompt[SINK_TOKENS + excess :]


def encode_prompts(
    encoder: PromptEncoder, questions: Sequence[str], *, device: torch.device | str = "cpu", **budget: int
) -> tuple[Tensor, Tensor]:
    """Prompts within a budget (see `fit_to_context`) as a left-padded batch: ids and attention mask, `(B, L)`."""
    frame = len(encoder.encode_prompt(""))
    rows = [fit_to_context(encoder.encode_prompt(question), frame=frame, **budget) for question in questions]
    ids, mask = pad_left(rows, padding_token_id(encoder.tokenizer))
    return ids.to(device), mask.to(device)


def single_think_token(encoder: PromptEncoder) -> int | None:
    """Id of `<think>` where it opens a span and is one token of the vocabulary (SmolLM3, Qwen3), else None."""
    if not encoder.num_latents or encoder.prompt_format == "coconut":
        return None
    ids = encoder.tokenizer(THINK_OPEN, add_special_tokens=False)["input_ids"]
    return ids[0] if len(ids) == 1 else None


def chosen_latents(thoughts: list[Thought], *, halting: bool) -> Tensor:
    """Latents `(B, M, D)` of the last supervision step, or of the one where a row's halting head stops."""
    if not halting or thoughts[0].halting_logit is None:
        return thoughts[-1].latents
    stop = torch.stack([thought.halting_logit for thought in thoughts], dim=1) > 0  # (B, S)
    stop[:, -1] = True
    chosen = stop.int().argmax(1)
    return torch.stack([thought.latents for thought in thoughts], 1)[torch.arange(len(chosen)), chosen]


def think_again(
    model: PreTrainedModel,
    row: list[int],
    latents: Tensor,
    *,
    think_id: int,
    max_new_tokens: int,
    thinking: dict[str, Any],
    **generate_kwargs: Any,
) -> list[int]:
    """Go on with a row for as long as it ends in a `<think>` of its own: append a span, fill it, generate."""
    generate_kwargs.pop("min_new_tokens", None)
    whole_span = model.encoder.tokenizer(model.encoder.span_text, add_special_tokens=False)["input_ids"]
    span, context = whole_span[1:], model.config.max_position_embeddings
    while row[-1] == think_id and (room := min(max_new_tokens, context - len(row) - len(span))) > 0:
        ids = torch.tensor([row + span], device=model.device)
        slots = torch.zeros_like(ids, dtype=torch.bool)
        slots[:, len(row) : len(row) + model.encoder.num_latents] = True
        mask = torch.ones_like(ids)
        prompt = model.model.prompt_before(ids, mask, slots, earlier_latents=latents)
        thoughts = model.reasoner.think(prompt, n_steps=thinking["n_steps"])
        latents = torch.cat([latents, chosen_latents(thoughts, halting=thinking["halting"])], dim=1)
        given = {"attention_mask": mask, "latents": latents, "max_new_tokens": room}
        row = model.generate(ids, **given, **generate_kwargs)[0].tolist()
        max_new_tokens -= len(row) - ids.shape[1]
    return row


@torch.no_grad()
def generate_completions(
    model: PreTrainedModel,
    questions: Sequence[str],
    *,
    max_new_tokens: int,
    latents_from: Sequence[str] | None,
    rethink: bool | None,
    thinking: dict[str, Any],
    **generate_kwargs: Any,
) -> list[Completion]:
    """See `SmolLMv3WithTRM.generate_with_thinking`; `thinking` holds `n_steps` and `halting`."""
    encoder, budget = model.encoder, {"max_new_tokens": max_new_tokens, "device": model.device}
    budget["context_length"] = model.config.max_position_embeddings
    ids, mask = encode_prompts(encoder, questions, **budget)
    donors = (ids, mask) if latents_from is None else encode_prompts(encoder, latents_from, **budget)
    latents = model.latents_for(*donors, **thinking) if model.use_trm else None
    special = generate_kwargs.get("num_beams", 1) > 1 or generate_kwargs.get("streamer") is not None
    if rethink and special:
        raise UserMistake("rethink=True works neither with beams nor with a streamer: leave num_beams and streamer out")
    think_id = None
    if rethink is not False and not special and generate_kwargs.get("num_return_sequences", 1) == 1 and model.use_trm:
        think_id = single_think_token(encoder)
    ends = as_list(generate_kwargs.get("eos_token_id", model.generation_config.eos_token_id))
    if think_id is not None:
        generate_kwargs["eos_token_id"] = [*ends, think_id]
    given = {"latents": latents} if model.use_trm else {}
    output = model.generate(ids, attention_mask=mask, **given, max_new_tokens=max_new_tokens, **generate_kwargs)
    completions = [ended_at(row, [*ends, think_id]) for row in output[:, ids.shape[1] :].tolist()]
    for index, written in enumerate(completions if think_id is not None else []):
        if written and written[-1] == think_id:
            row = ids[index][mask[index].bool()].tolist() + written
            left = {"max_new_tokens": max_new_tokens - len(written), "think_id": think_id, "thinking": thinking}
            whole = think_again(model, row, latents[index : index + 1], **left, **generate_kwargs)
            completions[index] = written + whole[len(row) :]
    slot = model.config.slot_token_id if model.use_trm else None
    rows = [[token for token in row if token != slot] for row in completions]
    texts = encoder.tokenizer.batch_decode(rows, skip_special_tokens=True)
    cut = [not row or row[-1] not in ends for row in rows]
    span = len(encoder.tokenizer(encoder.span_text, add_special_tokens=False)["input_ids"]) - 1 if model.use_trm else 0
    written = [len(row) - span * (row.count(slot) // model.num_latents if span else 0) for row in completions]
    return [Completion(*parts) for parts in zip(texts, written, cut, strict=True)]


def ended_at(row: list[int], ends: Sequence[int | None]) -> list[int]:
    """What was generated up to and including the first of these tokens; padding behind it goes."""
    first = next((at for at, token in enumerate(row) if token in ends), len(row) - 1)
    return row[: first + 1]
