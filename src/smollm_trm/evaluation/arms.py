"""Evaluate several arms on the same problems, each also with its latents shuffled, and lay the result on disk."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from smollm_trm.evaluation.compare import SHUFFLED_SUFFIX, Comparison, compare_arms
from smollm_trm.evaluation.evaluate import evaluate_gsm8k
from smollm_trm.evaluation.plots import plot_comparison
from smollm_trm.records import UserMistake, run_record, write_json, write_text


def evaluate_arm(
    name: str, model: nn.Module, rows: Sequence[Mapping[str, str]], folder: Path, **options: Any
) -> dict[str, dict]:
    """One arm's results by name: as it is, and, where it has a latent span, with latents of other problems."""
    [stem] = arm_stems([name])
    results = {name: evaluate_gsm8k(model, rows, predictions_path=folder / f"{stem}.jsonl", **options)}
    if model.use_trm:
        options |= {"latents": "shuffled", "predictions_path": folder / f"{stem}_shuffled.jsonl"}
        results[name + SHUFFLED_SUFFIX] = evaluate_gsm8k(model, rows, **options)
    return results


def arm_stems(names: Sequence[str]) -> list[str]:
    """The names of some arms' files; a name that is no file's, or whose file is another arm's, is refused."""
    stems: dict[str, str] = {}
    for name in names:
        stem = name.replace(" ", "_").replace("+", "and").lower()
        if not re.fullmatch(r"\w[\w.,()=-]{0,55}", stem) or name.endswith(SHUFFLED_SUFFIX):
            raise UserMistake(f"the arm {name[:100]!r} names files: a letter first, then letters, digits, + - . _")
        for taken in (stem, f"{stem}_shuffled", stem.removesuffix("_shuffled")):
            if taken in stems:
                raise UserMistake(f"the arms {stems[taken]!r} and {name!r} would share a file: rename one")
        stems[stem] = name
    return list(stems)


def report_comparison(results: Mapping[str, dict], folder: Path, *, baseline: str, **record: Any) -> Comparison:
    """Compare arms, and write `comparison.json` (with what `record` holds), `comparison.md` and `comparison.png`."""
    comparison = compare_arms(results, baseline=baseline)
    plot_comparison(comparison, folder / "comparison.png")
    write_text(folder / "comparison.md", f"{comparison}\n")
    made_on = {name: [result.get("device"), result.get("precision")] for name, result in results.items()}
    figures = {"device_and_precision": made_on, "problems": results[baseline]["settings"]["problems"]}
    write_json(folder / "comparison.json", {**comparison.to_dict(), **figures, **record, **run_record()})
    return comparison
