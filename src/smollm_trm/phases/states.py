"""What a predicted state is worth: the same problems answered from text, from nothing, and from four kinds of state.

thinks in text        the base as it is, `<think>` ... `</think>`
predicted state       the assembled model as it is used
true state            the same model, given the state after the base has thought: the most that a prediction can reach
mean state            ... given the mean of such states: what the span is worth when it says nothing
other problem's state ... given another problem's true state: whether the model reads the state or the question
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smollm_trm.evaluation.arms import evaluate_arm, report_comparison
from smollm_trm.evaluation.compare import Comparison
from smollm_trm.evaluation.evaluate import evaluate_gsm8k
from smollm_trm.evaluation.loading import load_for_evaluation, problems_of
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.storage import read_config, saved_model_folder
from smollm_trm.phases.datagen import load_thinker, think_in_text
from smollm_trm.phases.settings import CompareStatesSettings
from smollm_trm.records import UserMistake


@torch.no_grad()
def give_states(model: SmolLMv3WithTRM, states: Mapping[str, Tensor]) -> None:
    """Let an assembled model's span hold given states `(D,)`, by question; without one, the mean state."""
    reasoner = model.reasoner
    mean = reasoner.compressor.decompress(reasoner.trm.target_mean)
    by_prompt = {tuple(model.encoder.encode_prompt(question)): state.to(mean) for question, state in states.items()}

    def latents_for(input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        prompts = [tuple(row[real.bool()].tolist()) for row, real in zip(input_ids, attention_mask, strict=True)]
        return reasoner.latents_of_states(torch.stack([by_prompt.get(one, mean) for one in prompts]))

    model.latents_for = latents_for


def true_states(
    model: SmolLMv3WithTRM, questions: Sequence[str], *, batch_size: int, max_new_tokens: int
) -> dict[str, Tensor]:
    """The state after a base has thought about each question; of a thought never closed there is none."""
    found: dict[str, Tensor] = {}
    for begin in range(0, len(questions), batch_size):
        batch = list(questions[begin : begin + batch_size])
        for question, pair in zip(batch, think_in_text(model, batch, max_new_tokens=max_new_tokens), strict=True):
            if pair is not None:
                found[question] = pair["hidden_post"]
    return found


def compare_states(settings: CompareStatesSettings) -> tuple[Comparison, dict[str, Any]]:
    """Evaluate every arm on the same problems; the comparison, and how many thoughts were never closed."""
    data = {"part": settings.part, "data_dir": settings.data_dir, "dataset_path": None, "seed": settings.seed}
    rows, split = problems_of(**data)
    rows, folder = rows[: settings.max_samples], Path(settings.output_dir)
    how = {"batch_size": settings.batch_size, "progress": settings.progress}
    config = read_config(saved_model_folder(settings.model))
    if config.reasoner != "sequence_trm":
        raise UserMistake(f"{settings.model}: its reasoner is {config.reasoner!r}, not 'sequence_trm'")
    base = load_thinker(settings.thinking, prompt_format=config.prompt_format, precision=settings.precision)
    base.write_prompts(target="think", think=True)
    results = {"thinks in text": evaluate_gsm8k(base, rows, **how, max_new_tokens=settings.max_new_tokens)}
    states = true_states(base, [row["question"] for row in rows], batch_size=settings.batch_size,
                         max_new_tokens=settings.max_new_tokens)  # fmt: skip
    del base
    for name, place in settings.models.items():
        results |= evaluate_arm(
            name, load_for_evaluation(place, precision=settings.precision), rows, folder, overwrite=True, **how
        )
    model = load_for_evaluation(settings.model, precision=settings.precision)
    results |= evaluate_arm("predicted state", model, rows, folder, overwrite=True, **how)
    how["rethink"] = False  # a span that the model opened would hold no given state
    given = {"true state": (states, "own"), "mean state": ({}, "own"), "state of another problem": (states, "shuffled")}
    for name, (states_given, latents) in given.items():
        give_states(model, states_given)
        results[name] = evaluate_gsm8k(model, rows, latents=latents, seed=settings.seed, **how)
    record = {"part": settings.part, "split": split, "not_closed": len(rows) - len(states)}
    return report_comparison(results, folder, baseline="mean state", **record), record


def compare_states_command(settings: CompareStatesSettings) -> str:
    """The table of all arms."""
    comparison, record = compare_states(settings)
    left = f"{record['not_closed']} problems have no true state (never closed) and got the mean one"
    return f"{comparison}\n{left}\nplot in {Path(settings.output_dir) / 'comparison.png'}"
