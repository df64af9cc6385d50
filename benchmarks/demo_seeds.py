"""The demo on several seeds, and one test over all of their problems: does its claim stand on luck?

    python benchmarks/demo_seeds.py [--seeds 0 1 2] [--longer 1] [--learning_rate 3e-3] [--all_layers] [--record]

Beside the demo's arms LoRA alone is trained for as many seconds as the TRM and LoRA + TRM took together. A seed that
has run already is only read. Its seconds are those of the whole demo, from first problem to last plot, on an otherwise
idle machine if they are to mean anything; 0 where nothing had to be run. `--longer 4` gives every arm four times the
steps, on four times the problems: who is ahead when the first minutes are over? `--learning_rate` is then that of LoRA
for as long, which wants less the longer it trains; `--all_layers` adds LoRA on all linear layers (r 32), the TRM with
it too.
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
ALL, ALL_TRM = "LoRA, all layers", "LoRA + TRM, all layers"
SHUFFLED = "latents shuffled"
ARMS = {"LoRA": "lora", AS_LONG: "lora,_as_long", "LoRA + TRM": "lora_and_trm", SHUFFLED: "lora_and_trm_shuffled",
        ALL: "lora,_all_layers", ALL_TRM: "lora_and_trm,_all_layers"}  # fmt: skip
"""Names of arms and of their predictions' files."""
ALL_LAYERS = {"lora_kwargs": {"r": 32, "alpha": 64, "dropout": 0.0, "target_modules": "all-linear"}}


def train_further(arm: str, folder: Path, size: DemoSize, *, seed: int, like: str = "LoRA", **own: Any) -> None:
    """A further arm on a finished demo's base, like one of its own, unless it is done; grades beside the others."""
    if len(grades_in(folder).get(arm, [])) == size.test_problems:
        return
    settings = demo_arm_settings(folder, size, seed=seed)[like] | own
    held_out = load_gsm8k(folder / "data", seed=seed).gsm8k_final_test
    with processes(1) as pool:
        pool.submit(train_and_evaluate_arm, arm, folder, settings, held_out).result()


def training_seconds(folder: Path, arm: str) -> float:
    """What an arm's training took, the TRM's alone included."""
    return json.loads((folder / run_name(arm) / "results.json").read_text(encoding="utf-8"))["seconds"]


def grades_in(folder: Path) -> dict[str, list[bool]]:
    """Every arm's grades, problem by problem, from the predictions of a demo."""
    grades = {}
    for arm, file in ARMS.items():
        path = folder / "predictions" / f"{file}.jsonl"
        lines = map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.is_file() else [])
        by_index = {line["index"]: line["correct"] for line in lines if "index" in line}
        grades[arm] = [by_index[index] for index in sorted(by_index)]
    return {arm: graded for arm, graded in grades.items() if graded}


def compared(grades: dict[str, list[bool]]) -> dict[str, Any]:
    """The TRM against LoRA, and against its own latents shuffled."""
    others = [arm for arm in grades if arm != "LoRA + TRM" and len(grades[arm]) == len(grades["LoRA + TRM"])]
    against = {arm: paired_difference(grades["LoRA + TRM"], grades[arm]) for arm in others}
    return {arm: {"difference": one.difference, "low": one.low, "high": one.high, "p": one.p_value}
            for arm, one in against.items()}  # fmt: skip


def main() -> None:
    """Run what has not run, then pool."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--longer", type=int, default=1, help="times the demo's steps of every arm, and its problems")
    parser.add_argument("--learning_rate", type=float, default=DEMO_ARMS["LoRA"]["learning_rate"])
    parser.add_argument("--all_layers", action="store_true", help="also LoRA on all linear layers, r 32")
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
        rate, shared = {"learning_rate": options.learning_rate}, (folder, size)
        share = training_seconds(folder, "LoRA + TRM") / training_seconds(folder, "LoRA")
        as_long = length_of(round(size.arm_steps * share), size.batch_size)
        train_further(AS_LONG, *shared, seed=seed, **rate, **as_long)
        if options.all_layers:
            train_further(ALL, *shared, seed=seed, **rate, **ALL_LAYERS)
            train_further(ALL_TRM, *shared, seed=seed, like="LoRA + TRM", **ALL_LAYERS)
        grades = grades_in(folder)
        for arm, graded in grades.items():
            pooled[arm] += graded
        shares = {arm: sum(graded) / len(graded) for arm, graded in grades.items()}
        seeds[seed] = {"accuracy": shares, "TRM against": compared(grades), "seconds": round(seconds)}
        seeds[seed]["training seconds"] = {arm: training_seconds(folder, arm) for arm in grades if arm != SHUFFLED}
    told = [arm for arm in ARMS if pooled[arm]]
    table = [[seed, *(f"{100 * one['accuracy'].get(arm, float('nan')):.1f}" for arm in told), one["seconds"]]
             for seed, one in seeds.items()]  # fmt: skip
    print_table(["seed", *told, "seconds"], table)
    names = ("base_steps", "arm_steps", "train_problems", "test_problems")
    figures = {"size": {name: getattr(size, name) for name in names}}
    figures["learning_rate as long"] = options.learning_rate
    record("demo_seeds", {**figures, "seeds": seeds, "pooled": compared(pooled)}, keep=options.record)


if __name__ == "__main__":
    main()
