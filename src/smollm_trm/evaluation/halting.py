"""What the halting head knows: does it tell right answers from wrong ones, and how many steps would it save?"""

from collections.abc import Mapping, Sequence

import torch
from scipy.stats import mannwhitneyu
from torch import nn

from smollm_trm.models.generation import encode_prompts


@torch.no_grad()
def halting_probabilities(model: nn.Module, questions: Sequence[str], *, batch_size: int = 32) -> list[list[float]]:
    """The halting probability of every bare question after every supervision step; empty without a halting head."""
    found: list[list[float]] = []
    budget = {"max_new_tokens": 1, "context_length": model.config.max_position_embeddings}
    for at in range(0, len(questions), batch_size):
        ids, mask = encode_prompts(model.encoder, questions[at : at + batch_size], **budget)
        thoughts = model.think(ids.to(model.device), mask.to(model.device))
        if not thoughts or thoughts[0].halting_logit is None:
            return []
        logits = torch.stack([thought.halting_logit for thought in thoughts], dim=1)  # (B, S)
        found += logits.float().sigmoid().tolist()
    return found


def judge_halting(model: nn.Module, rows: Sequence[Mapping[str, str]], was_right: Sequence[bool]) -> dict | None:
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
