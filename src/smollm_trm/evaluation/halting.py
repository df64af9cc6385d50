"""What a reasoner shows of itself: what its halting head knows, and which words its latents read."""

from collections.abc import Mapping, Sequence

import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from smollm_trm.models.generation import encode_prompts
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.span import whole_spans


@torch.no_grad()
def halting_probabilities(
    model: SmolLMv3WithTRM, questions: Sequence[str], *, batch_size: int = 32
) -> list[list[float]]:
    """The halting probability of every bare question after every supervision step; empty without a halting head."""
    found: list[list[float]] = []
    for at in range(0, len(questions), batch_size):
        thoughts = model.think(*_prompts(model, questions[at : at + batch_size]))
        if not thoughts or thoughts[0].halting_logit is None:
            return []
        logits = torch.stack([thought.halting_logit for thought in thoughts], dim=1)  # (B, S)
        found += logits.float().sigmoid().tolist()
    return found


def judge_halting(model: SmolLMv3WithTRM, rows: Sequence[Mapping[str, str]], was_right: Sequence[bool]) -> dict | None:
    """How the halting head did against the grades, and how many steps it would take; None without such a head."""
    probabilities = halting_probabilities(model, [row["question"] for row in rows[: len(was_right)]])
    if not probabilities:
        return None
    total = len(probabilities[0])
    stops = [next((at for at, chance in enumerate(steps, 1) if chance > 0.5), total) for steps in probabilities]
    mean = sum(stops) / len(stops)
    return {
        "auroc": area_under_roc([steps[-1] for steps in probabilities], was_right),
        "base_rate": sum(was_right) / len(was_right),
        "steps": total,
        "mean_steps": mean,
        "steps_saved": 1 - mean / total,
    }


def area_under_roc(probabilities: Sequence[float], was_right: Sequence[bool]) -> float | None:
    """Chance that a right answer has a higher probability than a wrong one, ties by half; None where all are alike."""
    grades = list(zip(probabilities, was_right, strict=True))
    right, wrong = ([chance for chance, grade in grades if bool(grade) is wanted] for wanted in (True, False))
    pairs = len(right) * len(wrong)
    return float(mannwhitneyu(right, wrong, method="asymptotic").statistic) / pairs if pairs else None


@torch.no_grad()
def attention_by_word(model: SmolLMv3WithTRM, question: str) -> tuple[list[str], Tensor] | None:
    """The words of a prompt and each latent's share for them, `(M, words)`; None for a reasoner that reads nothing.

    A word is a token and those behind it that do not begin with a space.
    """
    if not hasattr(model.reasoner, "attention"):
        return None
    ids, mask = _prompts(model, [question])
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


def _prompts(model: SmolLMv3WithTRM, questions: Sequence[str]) -> tuple[Tensor, Tensor]:
    context = model.config.max_position_embeddings
    return encode_prompts(model.encoder, questions, max_new_tokens=1, context_length=context, device=model.device)
