"""From questions to texts: the prompt format, the context budget, and a model that starts to think again.

Everything here stands on `SmolLMv3WithTRM.generate`, which is Hugging Face's own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smollm_trm.data.batching import pad_left
from smollm_trm.data.prompts import THINK_OPEN, PromptEncoder, padding_token_id

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


@torch.no_grad()
def think_again(
    model: nn.Module, row: list[int], latents: Tensor, *, max_new_tokens: int, **generate_kwargs
) -> list[int]:
    """Continue a row that ends in a `<think>` of the model's own: append a span, fill it, generate on.

    Args:
        model: a `SmolLMv3WithTRM`.
        row: unpadded ids: prompt, earlier spans, and what was generated, ending in `<think>`.
        latents: `(1, S * M, D)` of the spans so far.
        max_new_tokens: tokens still to be generated.
        generate_kwargs: for `generate()`, with the stop tokens.

    Returns:
        The whole row, at most `max_new_tokens` generated tokens longer; it may end in another `<think>`.
    """
    ids = torch.tensor([row], device=model.device)
    hidden_states = model.read(ids, torch.ones_like(ids), earlier_latents=latents)
    thought = model.reasoner.think(hidden_states, torch.ones_like(ids, dtype=torch.bool))[-1]
    latents = torch.cat([latents, thought.latents], dim=1)
    prompt = torch.tensor([row + model.encoder.encode_span()], device=model.device)
    generate_kwargs = {name: value for name, value in generate_kwargs.items() if name != "min_new_tokens"}
    generated = model.generate(
        prompt, torch.ones_like(prompt), latents=latents, max_new_tokens=max_new_tokens, **generate_kwargs
    )[0].tolist()
    spent = len(generated) - prompt.shape[1]
    if generated[-1] == single_think_token(model.encoder) and spent < max_new_tokens:
        return think_again(model, generated, latents, max_new_tokens=max_new_tokens - spent, **generate_kwargs)
    return generated


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
    encoder, context = model.encoder, model.config.max_position_embeddings
    budget = {"max_new_tokens": max_new_tokens, "context_length": context}
    ids, mask = (part.to(model.device) for part in encode_prompts(encoder, questions, **budget))
    latents = None
    if model.reasoner is not None:
        donor_ids, donor_mask = (ids, mask) if latents_from is None else (
            part.to(model.device) for part in encode_prompts(encoder, latents_from, **budget)
        )  # fmt: skip
        latents = model.latents_for(donor_ids, donor_mask, n_steps=n_steps, halting=halting)
    think_id = single_think_token(encoder) if model.reasoner is not None else None
    special = generate_kwargs.get("num_beams", 1) > 1 or generate_kwargs.get("streamer") is not None
    if rethink and special:
        raise ValueError("rethink=True works neither with beams nor with a streamer: leave num_beams and streamer out")
    repeats = generate_kwargs.get("num_return_sequences", 1)
    if rethink is False or special or repeats > 1 or think_id is None:
        think_id = None
    else:
        generate_kwargs["eos_token_id"] = [encoder.tokenizer.eos_token_id, think_id]
    output = model.generate(ids, mask, latents=latents, max_new_tokens=max_new_tokens, **generate_kwargs)
    completions = output[:, ids.shape[1] :].tolist()
    for index, completion in enumerate(completions if think_id is not None else []):
        if think_id in completion and completion.index(think_id) + 1 < max_new_tokens:
            length = completion.index(think_id) + 1
            row = ids[index][mask[index].bool()].tolist() + completion[:length]
            whole = think_again(
                model, row, latents[index : index + 1], max_new_tokens=max_new_tokens - length, **generate_kwargs
            )
            completions[index] = completion[:length] + whole[len(row) :]
    return [
        encoder.tokenizer.decode([token for token in completion if token != model.slot_id], skip_special_tokens=True)
        for completion in completions
    ]
