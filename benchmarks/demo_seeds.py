"""The demo on several seeds, and one test over all of their problems: does its claim stand on luck?

    python benchmarks/demo_seeds.py [--seeds 0 1 2] [--longer 1] [--learning_rate 3e-3] [--record]

Beside the demo's arms LoRA alone is trained for as many seconds as the TRM and LoRA + TRM took together. A seed that
has run already is only read. Its seconds are those of the whole demo, from first problem to last plot, on an otherwise
idle machine if they are to mean anything; 0 where nothing had to be run. `--longer 4` gives every arm four times the
steps, on four times the problems: who is ahead when the first minutes are over? `--learning_rate` is then that of LoRA
for as long, which wants less the longer it trains.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from _record import benchmark_options, print_table, record

from smollm_trm.data.gsm8k import load_gsm8k
from smollm_trm.demo import (
    DEMO_ARMS,
    DemoSize,
    demo_arm_settings,
    length_of,
    processes,
    run_demo,
    run_name,
    train_and_evaluate_arm,
)
from smollm_trm.evaluation.statistics import paired_difference

AS_LONG = "LoRA, as long"
SHUFFLED = "latents shuffled"
ARMS = {"LoRA": "lora", AS_LONG: "lora,_as_long", "LoRA + TRM": "lora_and_trm", SHUFFLED: "lora_and_trm_shuffled"}


def train_as_long(folder: Path, size: DemoSize, *, seed: int, learning_rate: float) -> None:
    """LoRA alone from a finished demo's base, for as long as its LoRA + TRM took; grades beside the others."""
    runs = (folder / run_name(arm) / "results.json" for arm in ("LoRA", "LoRA + TRM"))
    alone, both = (json.loads(run.read_text(encoding="utf-8"))["seconds"] for run in runs)
    length = length_of(round(size.arm_steps * both / alone), size.batch_size)
    settings = demo_arm_settings(folder, size, seed=seed)["LoRA"] | length | {"learning_rate": learning_rate}
    held_out = load_gsm8k(folder / "data", seed=seed).gsm8k_final_test
    with processes(1) as pool:
        pool.submit(train_and_evaluate_arm, AS_LONG, folder, settings, held_out).result()


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
    against = {arm: paired_difference(grades["LoRA + TRM"], grades[arm]) for arm in ("LoRA", AS_LONG, SHUFFLED)}
    return {arm: {"difference": one.difference, "low": one.low, "high": one.high, "p": one.p_value}
            for arm, one in against.items()}  # fmt: skip


def main() -> None:
    """Run what has not run, then pool."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--longer", type=int, default=1, help="times the demo's steps of every arm, and its problems")
    parser.add_argument("--learning_rate", type=float, default=DEMO_ARMS["LoRA"]["learning_rate"])
    parser.add_argument("--output_dir", type=Path, help="outputs/demo_seeds, or outputs/demo_seeds_x4")
    options = parser.parse_args()
    size, times = DemoSize(), options.longer
    size = replace(size, arm_steps=times * size.arm_steps, train_problems=times * size.train_problems)
    place = options.output_dir or Path(f"outputs/demo_seeds{f'_x{times}' if times > 1 else ''}")
    seeds: dict[int, Any] = {}
    pooled: dict[str, list[bool]] = {arm: [] for arm in ARMS}
    for seed in options.seeds:
        folder, seconds = place / str(seed), 0.0
        if not (folder / "comparison.json").is_file():
            started = time.perf_counter()
            run_demo(output_dir=str(folder), seed=seed, size=size)
            seconds = time.perf_counter() - started
        if not (folder / "predictions" / f"{ARMS[AS_LONG]}.jsonl").is_file():
            train_as_long(folder, size, seed=seed, learning_rate=options.learning_rate)
        grades = grades_in(folder)
        for arm, graded in grades.items():
            pooled[arm] += graded
        shares = {arm: sum(graded) / len(graded) for arm, graded in grades.items()}
        seeds[seed] = {"accuracy": shares, "TRM against": compared(grades), "seconds": round(seconds)}
        runs = {arm: folder / run_name(arm) / "results.json" for arm in ARMS if arm != SHUFFLED}
        seeds[seed]["training seconds"] = {arm: json.loads(run.read_text())["seconds"] for arm, run in runs.items()}
    table = [[seed, *(f"{100 * share:.1f}" for share in one["accuracy"].values()), one["seconds"]]
             for seed, one in seeds.items()]  # fmt: skip
    print_table(["seed", *ARMS, "seconds"], table)
    names = ("base_steps", "arm_steps", "train_problems", "test_problems")
    figures = {"size": {name: getattr(size, name) for name in names}}
    figures["learning_rate as long"] = options.learning_rate
    record("demo_seeds", {**figures, "seeds": seeds, "pooled": compared(pooled)}, keep=options.record)


if __name__ == "__main__":
    main()
