"""From questions to texts: the prompt format, the context budget, and a model that starts to think again.

Everything here stands on `SmolLMv3WithTRM.generate`, which is Hugging Face's own.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from smollm_trm.data.batching import pad_left
from smollm_trm.data.prompts import THINK_OPEN, PromptEncoder, padding_token_id
from smollm_trm.models.reasoners import Thought

SINK_TOKENS = 4


def fit_to_context(
    question_ids: list[int], *, encoder: PromptEncoder, max_new_tokens: int, context_length: int
) -> list[int]:
    """Make room for latents and new tokens: the prompt's oldest tokens go, but the first 4 stay as sinks.

    A prompt that fits is never touched.

    Args:
        question_ids: ids up to and including `<think>`.
        encoder: gives the span and the frame around a question.
        max_new_tokens: tokens to be generated.
        context_length: the base's positions.

    Raises:
        ValueError: the question would be eaten whole.
    """
    needed = len(question_ids) + len(encoder.encode_span()) + max_new_tokens
    excess = needed - context_length
    if excess <= 0:
        return question_ids
    frame = len(encoder.encode_question(""))
    if len(question_ids) - excess <= SINK_TOKENS + frame:
        raise ValueError(
            f"the question needs {needed} tokens with {encoder.num_latents} latents and {max_new_tokens} new tokens, "
            f"the model has {context_length}: nothing of it would be left; lower max_new_tokens or num_latents"
        )
    return question_ids[:SINK_TOKENS] + question_ids[SINK_TOKENS + excess :]


def encode_prompts(
    encoder: PromptEncoder, questions: Sequence[str], *, max_new_tokens: int, context_length: int
) -> tuple[Tensor, Tensor]:
    """Prompts as a left-padded batch: ids and attention mask, `(B, L)`."""
    rows = [
        fit_to_context(
            encoder.encode_question(question),
            encoder=encoder,
            max_new_tokens=max_new_tokens,
            context_length=context_length,
        )
        + encoder.encode_span()
        for question in questions
    ]
    return pad_left(rows, padding_token_id(encoder.tokenizer))


def single_think_token(encoder: PromptEncoder) -> int | None:
    """Id of `<think>` where it is one token of the vocabulary (SmolLM3, Qwen3), else None."""
    ids = encoder.tokenizer(THINK_OPEN, add_special_tokens=False)["input_ids"]
    return ids[0] if len(ids) == 1 else None


def chosen_latents(thoughts: list[Thought], *, halting: bool) -> Tensor:
    """Latents `(B, M, D)` of the last supervision step.

    Args:
        thoughts: one per step.
        halting: take each row's first step at which its halting head says stop, if there is such a head.
    """
    if not halting or thoughts[0].halting_logit is None:
        return thoughts[-1].latents
    stop = torch.stack([thought.halting_logit for thought in thoughts], dim=1) > 0  # (B, S)
    stop[:, -1] = True
    chosen = stop.int().argmax(1)
    return torch.stack([thought.latents for thought in thoughts], 1)[torch.arange(len(chosen)), chosen]


def generate_filled(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, latents: Tensor | None, given: Mapping[str, Any]
) -> Tensor:
    """Hugging Face's `generate()` of the base with the latents in their slots; see `SmolLMv3WithTRM.generate`."""
    stops = {"pad_token_id": padding_token_id(model.tokenizer), "eos_token_id": model.tokenizer.eos_token_id}
    options = {"do_sample": False, **stops, **given}
    if not options["do_sample"]:  # a checkpoint's own sampling defaults would only bring warnings
        options = {"temperature": None, "top_p": None, "top_k": None} | options
    span = model.span_of(input_ids, attention_mask)
    embedding = model.causal_lm.get_input_embeddings()
    with nullcontext() if latents is None else span.filled(embedding, latents):
        output = model.base_model.generate(
            input_ids=input_ids.masked_fill(span.slots, model.stand_in_id),
            attention_mask=attention_mask,
            position_ids=span.positions(attention_mask),
            **options,
        )
    sequences = output if isinstance(output, Tensor) else output.sequences
    repeats = sequences.shape[0] // input_ids.shape[0]
    sequences[:, : input_ids.shape[1]] = input_ids.repeat_interleave(repeats, dim=0)
    return output


def think_again(
    model: nn.Module,
    row: list[int],
    latents: Tensor,
    *,
    think_id: int,
    max_new_tokens: int,
    n_steps: int | None,
    halting: bool,
    **generate_kwargs,
) -> list[int]:
    """Go on with a row for as long as it ends in a `<think>` of its own: append a span, fill it, generate.

    Args:
        model: a `SmolLMv3WithTRM`.
        row: unpadded ids: prompt with its span, and what was generated.
        latents: `(1, M, D)` of that span.
        think_id: the token that asks for another span; one of the stop tokens.
        max_new_tokens: tokens still to be generated; fewer where the context is full.
        n_steps: supervision steps; all when None.
        halting: see `chosen_latents`.
        generate_kwargs: for `generate()`, with the stop tokens.

    Returns:
        The row with what was added, spans included.
    """
    generate_kwargs.pop("min_new_tokens", None)
    span, context = model.encoder.encode_span(), model.config.max_position_embeddings
    while row[-1] == think_id and (room := min(max_new_tokens, context - len(row) - len(span))) > 0:
        ids = torch.tensor([row], device=model.device)
        states = model.read(ids, torch.ones_like(ids), earlier_latents=latents)
        thoughts = model.reasoner.think(states, torch.ones_like(ids, dtype=torch.bool), n_steps=n_steps)
        latents = torch.cat([latents, chosen_latents(thoughts, halting=halting)], dim=1)
        prompt = torch.tensor([row + span], device=model.device)
        output = model.generate(
            prompt, torch.ones_like(prompt), latents=latents, max_new_tokens=room, **generate_kwargs
        )
        row = output[0].tolist()
        max_new_tokens -= len(row) - prompt.shape[1]
    return row


@torch.no_grad()
def generate_texts(
    model: nn.Module,
    questions: Sequence[str],
    *,
    max_new_tokens: int,
    latents_from: Sequence[str] | None,
    rethink: bool | None,
    n_steps: int | None,
    halting: bool,
    **generate_kwargs,
) -> list[str]:
    """See `SmolLMv3WithTRM.generate_with_thinking`."""
    encoder, thinking = model.encoder, {"n_steps": n_steps, "halting": halting}
    budget = {"max_new_tokens": max_new_tokens, "context_length": model.config.max_position_embeddings}
    ids, mask = (part.to(model.device) for part in encode_prompts(encoder, questions, **budget))
    latents = None
    if model.reasoner is not None:
        donor_ids, donor_mask = (ids, mask) if latents_from is None else (
            part.to(model.device) for part in encode_prompts(encoder, latents_from, **budget)
        )  # fmt: skip
        latents = model.latents_for(donor_ids, donor_mask, **thinking)
    special = generate_kwargs.get("num_beams", 1) > 1 or generate_kwargs.get("streamer") is not None
    if rethink and special:
        raise ValueError("rethink=True works neither with beams nor with a streamer: leave num_beams and streamer out")
    think_id = None
    if rethink is not False and not special and generate_kwargs.get("num_return_sequences", 1) == 1 and model.use_trm:
        think_id = single_think_token(encoder)
    if think_id is not None:
        stops = generate_kwargs.get("eos_token_id", encoder.tokenizer.eos_token_id)
        stops = [stops] if isinstance(stops, int) else stops or []
        generate_kwargs["eos_token_id"] = [*stops, think_id]
    output = model.generate(ids, mask, latents=latents, max_new_tokens=max_new_tokens, **generate_kwargs)
    completions = output[:, ids.shape[1] :].tolist()
    for index, completion in enumerate(completions if think_id is not None else []):
        if think_id in completion:
            written = completion[: completion.index(think_id) + 1]
            row = ids[index][mask[index].bool()].tolist() + written
            left = {"max_new_tokens": max_new_tokens - len(written), "think_id": think_id}
            whole = think_again(model, row, latents[index : index + 1], **left, **thinking, **generate_kwargs)
            completions[index] = written + whole[len(row) :]
    return [
        encoder.tokenizer.decode([token for token in completion if token != model.slot_id], skip_special_tokens=True)
        for completion in completions
    ]
