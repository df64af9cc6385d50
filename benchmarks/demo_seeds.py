"""The demo on several seeds, and one test over all of their problems: does its claim stand on luck?

    python benchmarks/demo_seeds.py [--seeds 0 1 2] [--output_dir outputs/demo_seeds] [--record]

A seed that has run already is only read. Its seconds are those of the whole demo, from first problem to last plot,
on an otherwise idle machine if they are to mean anything; 0 where nothing had to be run.
"""

import json
import time
from pathlib import Path
from typing import Any

from _record import benchmark_options, print_table, record

from smollm_trm.demo import DemoSize, run_demo
from smollm_trm.evaluation.statistics import paired_difference

ARMS = {"LoRA": "lora", "LoRA + TRM": "lora_and_trm", "latents shuffled": "lora_and_trm_shuffled"}


def grades_in(folder: Path) -> dict[str, list[bool]]:
    """Every arm's grades, problem by problem, from the predictions of a demo."""
    grades = {}
    for arm, file in ARMS.items():
        lines = map(json.loads, (folder / "predictions" / f"{file}.jsonl").read_text(encoding="utf-8").splitlines())
        by_index = {line["index"]: line["correct"] for line in lines if "index" in line}
        grades[arm] = [by_index[index] for index in sorted(by_index)]
    return grades


def compared(grades: dict[str, list[bool]]) -> dict[str, Any]:
    """The TRM against LoRA, and against its own latents shuffled."""
    against = {arm: paired_difference(grades["LoRA + TRM"], grades[arm]) for arm in ("LoRA", "latents shuffled")}
    return {arm: {"difference": one.difference, "low": one.low, "high": one.high, "p": one.p_value}
            for arm, one in against.items()}  # fmt: skip


def main() -> None:
    """Run what has not run, then pool."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo_seeds"))
    options = parser.parse_args()
    seeds: dict[int, Any] = {}
    pooled: dict[str, list[bool]] = {arm: [] for arm in ARMS}
    for seed in options.seeds:
        folder, seconds = options.output_dir / str(seed), 0.0
        if not (folder / "comparison.json").is_file():
            started = time.perf_counter()
            run_demo(output_dir=str(folder), seed=seed)
            seconds = time.perf_counter() - started
        grades = grades_in(folder)
        for arm, graded in grades.items():
            pooled[arm] += graded
        shares = {arm: sum(graded) / len(graded) for arm, graded in grades.items()}
        seeds[seed] = {"accuracy": shares, "TRM against": compared(grades), "seconds": round(seconds)}
    table = [[seed, *(f"{100 * share:.1f}" for share in one["accuracy"].values()), one["seconds"]]
             for seed, one in seeds.items()]  # fmt: skip
    print_table(["seed", *ARMS, "seconds"], table)
    figures = {"size": {name: getattr(DemoSize(), name) for name in ("base_steps", "arm_steps", "test_problems")}}
    record("demo_seeds", {**figures, "seeds": seeds, "pooled": compared(pooled)}, keep=options.record)


if __name__ == "__main__":
    main()
