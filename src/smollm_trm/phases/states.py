"""What a predicted state is worth: the same problems answered from text, from nothing, and from four kinds of state.

thinks in text        the base as it is, `<think>` ... `</think>`
predicted state       the assembled model as it is used
true state            the same model, given the state after the base has thought: the most that a prediction can reach
mean state            ... given the mean of such states: what the span is worth when it says nothing
other problem's state ... given another problem's true state: whether the model reads the state or the question
"""

from collections.abc import Mapping
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
from smollm_trm.records import UserMistake, picked


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


def compare_states(settings: CompareStatesSettings) -> tuple[Comparison, dict[str, Any]]:
    """Evaluate every arm on the same problems; the comparison, and how many thoughts were never closed."""
    rows, split = problems_of(dataset_path=None, **picked(settings, "part", "data_dir", "seed"))
    rows, folder = rows[: settings.max_samples], Path(settings.output_dir)
    how = picked(settings, "batch_size", "progress")
    config = read_config(saved_model_folder(settings.model))
    if config.reasoner != "sequence_trm":
        raise UserMistake(f"{settings.model}: its reasoner is {config.reasoner!r}, not 'sequence_trm'")
    base = load_thinker(settings.thinking, prompt_format=config.prompt_format, precision=settings.precision)
    shape = ("hidden_size", "num_hidden_layers")
    if picked(base.config, *shape) != picked(config, *shape):
        reason = f"its states are not those that {settings.model} reads; name the base of that model"
        raise UserMistake(f"thinking={settings.thinking!r}: {reason}")
    base.write_prompts(target="think", think=True)
    results = {"thinks in text": evaluate_gsm8k(base, rows, **how, max_new_tokens=settings.max_new_tokens)}
    states: dict[str, Tensor] = {}  # of thoughts that were closed
    for begin in range(0, len(rows), settings.batch_size):
        asked = [row["question"] for row in rows[begin:][: settings.batch_size]]
        thoughts = think_in_text(base, asked, max_new_tokens=settings.max_new_tokens)
        states |= {one: pair["hidden_post"] for one, pair in zip(asked, thoughts, strict=True) if pair is not None}
    del base
    for name, place in settings.models.items():
        arm = load_for_evaluation(place, precision=settings.precision)
        results |= evaluate_arm(name, arm, rows, folder, overwrite=True, **how)
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
