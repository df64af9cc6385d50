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

from smollm_trm.data.batching import pad_left
from smollm_trm.data.prompts import padding_token_id
from smollm_trm.evaluation.arms import evaluate_arm, report_comparison
from smollm_trm.evaluation.compare import Comparison
from smollm_trm.evaluation.evaluate import evaluate_gsm8k
from smollm_trm.evaluation.loading import load_for_evaluation, problems_of
from smollm_trm.models.generation import Completion
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.storage import read_config, saved_model_folder
from smollm_trm.phases.datagen import load_thinker, think_in_text
from smollm_trm.phases.settings import CompareStatesSettings
from smollm_trm.records import UserMistake


class GivenStates:
    """An assembled model whose span gets given states `(D,)`, by question; without one, the mean state.

    For `evaluate_gsm8k`: with `latents="shuffled"` a problem gets another one's state.
    """

    use_trm = True

    def __init__(self, model: SmolLMv3WithTRM, states: Mapping[str, Tensor]) -> None:
        self.model, self.states = model, states
        self.config, self.encoder, self.parameters = model.config, model.encoder, model.parameters

    def latents(self, questions: Sequence[str]) -> Tensor:
        """`(B, 1, D)`."""
        reasoner = self.model.reasoner
        mean = reasoner.compressor.decompress(reasoner.trm.target_mean)
        states = torch.stack([self.states.get(question, mean).to(mean) for question in questions])
        return reasoner.latents_of_states(states)

    @torch.no_grad()
    def generate_with_thinking(
        self,
        questions: Sequence[str],
        *,
        max_new_tokens: int,
        latents_from: Sequence[str] | None = None,
        **options: Any,
    ) -> list[Completion]:
        """See `SmolLMv3WithTRM.generate_with_thinking`."""
        model, tokenizer = self.model, self.model.tokenizer
        rows = [self.encoder.encode_prompt(question) for question in questions]
        ids, mask = (one.to(model.device) for one in pad_left(rows, padding_token_id(tokenizer)))
        latents = self.latents(questions if latents_from is None else latents_from)
        written = model.generate(
            ids, attention_mask=mask, latents=latents, max_new_tokens=max_new_tokens, do_sample=False
        )[:, ids.shape[1] :]
        ends = torch.tensor(model.generation_config.eos_token_id, device=model.device).reshape(-1)
        closed = torch.isin(written, ends).any(1).tolist()
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        return [Completion(text, len(row), not done) for text, row, done in zip(texts, written, closed, strict=True)]


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
    given = GivenStates(model, states)
    results["true state"] = evaluate_gsm8k(given, rows, **how)
    results["mean state"] = evaluate_gsm8k(GivenStates(model, {}), rows, **how)
    results["state of another problem"] = evaluate_gsm8k(given, rows, latents="shuffled", seed=settings.seed, **how)
    record = {"part": settings.part, "split": split, "not_closed": len(rows) - len(states)}
    return report_comparison(results, folder, baseline="mean state", **record), record


def compare_states_command(settings: CompareStatesSettings) -> str:
    """The table of all arms."""
    comparison, record = compare_states(settings)
    left = f"{record['not_closed']} problems have no true state (never closed) and got the mean one"
    return f"{comparison}\n{left}\nplot in {Path(settings.output_dir) / 'comparison.png'}"
