"""From grades to figures: accuracy with its interval, by steps needed, paired tests; of one seed or several."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from _arms import percent, test_cells

from smollm_trm.evaluation.statistics import paired_difference, wilson_interval

AGAINST = ("TRM", "LoRA")
"""Arms that all others are compared with."""


def judged(
    by_seed: Mapping[int, Mapping[str, Mapping[str, Any]]], needed: Mapping[int, Sequence[int]]
) -> dict[str, Any]:
    """Figures of every arm that all seeds have, over the problems of all of them.

    Args:
        by_seed: seed -> arm -> what `train_and_ask` returned.
        needed: seed -> the steps that each held-out problem needs.
    """
    seeds = list(by_seed)
    steps = [number for seed in seeds for number in needed[seed]]
    arms = [arm for arm in by_seed[seeds[0]] if all(arm in found for found in by_seed.values())]
    runs = {arm: [by_seed[seed][arm] for seed in seeds] for arm in arms}
    grades = {arm: grades_of(runs[arm]) for arm in arms}
    own = {arm: kinds["own"] for arm, kinds in grades.items()}
    return {arm: figures_of_arm(arm, runs[arm], grades[arm], own, steps) for arm in arms}


def grades_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[bool]]:
    """Every kind of grades that all runs have, one run behind the other."""
    kinds = [kind for kind in runs[0]["grades"] if all(kind in run["grades"] for run in runs)]
    return {kind: [one == "1" for run in runs for one in run["grades"][kind]] for kind in kinds}


def share(grades: Sequence[bool]) -> dict[str, Any]:
    """Accuracy with Wilson's 95% interval."""
    right, total = sum(grades), len(grades)
    return {"accuracy": right / total, "interval": list(wilson_interval(right, total)), "total": total}


def figures_of_arm(
    arm: str,
    runs: Sequence[Mapping[str, Any]],
    grades: Mapping[str, list[bool]],
    own: Mapping[str, list[bool]],
    steps: Sequence[int],
) -> dict[str, Any]:
    """See `judged`."""
    per_run = len(steps) // len(runs)
    figures: dict[str, Any] = {
        **share(grades["own"]),
        "by_seed": [share(grades["own"][at : at + per_run])["accuracy"] for at in range(0, len(steps), per_run)],
        "by_steps_needed": {
            str(number): share([one for one, its in zip(grades["own"], steps, strict=True) if its == number])
            for number in sorted(set(steps))
        },
        "against": {
            other: asdict(paired_difference(grades["own"], own[other]))
            for other in AGAINST
            if other in own and other != arm
        },
    }
    for name in ("optimizer_steps", "cpu_seconds", "dev_loss", "latent_variation"):
        if name in runs[0]:
            figures[name] = [run[name] for run in runs]
    if "shuffled" in grades:
        effect = paired_difference(grades["shuffled"], grades["own"])
        figures["shuffled"] = {**share(grades["shuffled"]), "effect": asdict(effect)}
    asked = {kind.removesuffix(" steps"): share(grades[kind]) for kind in grades if kind.endswith(" steps")}
    if asked and "halting" in runs[0]:
        asked[str(runs[0]["halting"]["steps"])] = share(grades["own"])
        figures["by_supervision_steps"] = {number: asked[number] for number in sorted(asked, key=int)}
    if "halting" in grades:
        heads = [run["halting"] for run in runs]
        figures["halting"] = {name: [head[name] for head in heads] for name in heads[0]}
        effect = paired_difference(grades["halting"], grades["own"])
        figures["halting"] |= {**share(grades["halting"]), "effect": asdict(effect)}
    return figures


def arm_table(arms: Mapping[str, Mapping[str, Any]], title: str = "arm") -> tuple[list[str], list[list[object]]]:
    """Head and rows: accuracy, range over seeds, shuffled latents, and the difference from each of `AGAINST`."""
    head = [title, "right", "95%", "over seeds", "shuffled", "p", "variation", "CPU-s"]
    for other in AGAINST:
        head += [f"against {other}", "95%", "p"]
    rows = []
    for name, arm in arms.items():
        low, high = arm["interval"]
        shuffled, variation = arm.get("shuffled"), arm.get("latent_variation")
        row: list[object] = [name, percent(arm["accuracy"]), f"{percent(low)}-{percent(high)}"]
        row += [f"{percent(min(arm['by_seed']))}-{percent(max(arm['by_seed']))}"]
        row += [percent(shuffled["accuracy"]), f"{shuffled['effect']['p_value']:.2g}"] if shuffled else ["", ""]
        row += [f"{min(variation):.2f}-{max(variation):.2f}" if variation else ""]
        counted = [seconds for seconds in arm["cpu_seconds"] if seconds]
        row += [round(sum(counted) / len(counted)) if counted else ""]
        for other in AGAINST:
            row += test_cells(arm["against"].get(other))
        rows.append(row)
    return head, rows
