"""GRPO on the word problems: does sampling and grading raise held-out accuracy, and what would more SFT have done?

    python benchmarks/grpo_study.py [--settings chain once] [--seeds 0 1 2] [--train both] [--record]

Two models on the demo's base: LoRA + TRM that writes its chain after a short SFT, and LoRA + TRM that answers at once.
From each: GRPO; as many steps of SFT as GRPO made; and as many as take its CPU seconds. All answer the same held-out
problems. A part that has run already is only read.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from _models import write_demo_problems
from _record import benchmark_options, print_table, record

from smollm_trm.data.gsm8k import load_gsm8k
from smollm_trm.demo import DemoSize, demo_base_settings, demo_settings, length_of
from smollm_trm.evaluation.evaluate import evaluate_gsm8k
from smollm_trm.evaluation.statistics import paired_difference
from smollm_trm.finetune import train_gsm8k
from smollm_trm.grpo import train_grpo
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.records import write_json

SFT: dict[str, Any] = {
    "learning_rate": 2e-3,
    "trm_learning_rate": 3e-3,
    "warmup_fraction": 0.3,
    "trm_kwargs": {"n_latent_steps": 2, "n_deep_recursions": 1, "n_supervision_steps": 1},
}
STARTS: dict[str, dict[str, Any]] = {
    "chain": {"target": "steps", "steps": 60},
    "once": {"target": "answer", "steps": 550},
}
GRPO: dict[str, dict[str, Any]] = {
    "chain": {
        "learning_rate": 1e-3,
        "trm_learning_rate": 1e-3,
        "problems_per_step": 32,
        "samples_per_problem": 8,
        "open_next_at": 0.5,
    },  # fmt: skip
    "once": {
        "learning_rate": 1e-3,
        "trm_learning_rate": 1e-3,
        "problems_per_step": 32,
        "samples_per_problem": 16,
        "open_next_at": 0.2,
    },  # fmt: skip
}
SHARED = {"batch_size": 256, "warmup_fraction": 0.1, "max_dev_samples": 100, "progress": False}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--settings", nargs="+", choices=list(STARTS), default=list(STARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", choices=("both", "reasoner", "lora"), default="both")
    parser.add_argument("--controls", nargs="*", choices=("steps", "seconds"), default=["steps", "seconds"])
    parser.add_argument("--steps", type=int, default=80, help="of GRPO")
    parser.add_argument("--rounds", type=int, default=1, help="runs of GRPO, each from the one before")
    parser.add_argument("--test_problems", type=int, default=1000, help="held-out problems that all answer")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/grpo_study"))
    return parser.parse_args()


def sft_settings(folder: Path, kind: str, *, seed: int, steps: int, **own: Any) -> dict[str, Any]:
    """Settings of so many SFT steps, as the demo makes them."""
    options = {"num_latents": DemoSize.num_latents, "lora_kwargs": {"dropout": 0.0}, "target": STARTS[kind]["target"]}
    shared = {**demo_settings(folder / "data", DemoSize(), seed=seed), **length_of(steps, DemoSize.batch_size)}
    return {**shared, **SFT, **options, "progress": False, **own}


def train_once(**settings: Any) -> None:
    """`train_gsm8k`, unless it has run."""
    if not (Path(settings["output_dir"]) / "results.json").is_file():
        train_gsm8k(**settings)


def cpu_seconds(folder: Path, train: Any) -> float:
    """CPU seconds of a training, kept beside it."""
    file = folder / "cpu_seconds.json"
    if not file.is_file():
        started = time.process_time()
        train()
        write_json(file, {"cpu_seconds": time.process_time() - started})
    return json.loads(file.read_text())["cpu_seconds"]


def round_folder(folder: Path, name: str, at: int) -> Path:
    """Where a round of GRPO lies, counted from 0."""
    return folder / f"{name}_grpo{f'_{at + 1}' if at else ''}"


def grpo_round(folder: Path, name: str, at: int, start: Path, **asked: Any) -> float:
    """CPU seconds of a round, the first from the start, each other from the one before."""
    start, place = round_folder(folder, name, at - 1) if at else start, round_folder(folder, name, at)
    asked |= {"data_dir": str(folder / "data"), "output_dir": str(place)}
    return cpu_seconds(place, lambda: train_grpo(start, **asked))


def one_seed(folder: Path, kind: str, options: argparse.Namespace, *, seed: int) -> dict[str, Any]:
    """Base, start, GRPO and both controls; what each solves."""
    size = DemoSize()
    if not (folder / "data" / "test.jsonl").is_file():
        write_demo_problems(folder, size, seed=seed)
    train_once(**demo_base_settings(folder, size, seed=seed))
    start, base = folder / kind, str(folder / "base" / "model")
    train_once(**sft_settings(folder, kind, seed=seed, steps=STARTS[kind]["steps"], model_name=base,
                               output_dir=str(start)))  # fmt: skip
    name = f"{kind}_{options.train}_{options.steps}"
    places = {"start": start, "GRPO": round_folder(folder, name, options.rounds - 1)}
    name += f"_x{options.rounds}" if options.rounds > 1 else ""
    places |= {f"SFT, same {what}": folder / f"{name}_sft_{what}" for what in options.controls}
    started = time.process_time()
    held_out = load_gsm8k(folder / "data", seed=seed).gsm8k_final_test[: options.test_problems]
    loading = time.process_time() - started

    def control(arm: str, steps: int) -> float:
        own = {"load_model_path": str(start), "output_dir": str(places[arm])}
        settings = sft_settings(folder, kind, seed=seed, steps=steps, **own)
        return cpu_seconds(places[arm], lambda: train_gsm8k(**settings)) - loading

    seconds, total = {"GRPO": 0.0}, options.rounds * options.steps
    for at in range(options.rounds):
        asked = {**SHARED, **GRPO[kind], "max_steps": options.steps, "train": options.train, "seed": seed + 1000 * at}
        seconds["GRPO"] += grpo_round(folder, f"{kind}_{options.train}_{options.steps}", at, start, **asked) - loading
    steps = {"start": 0, "GRPO": total, "SFT, same steps": total}
    if "steps" in options.controls:
        seconds["SFT, same steps"] = control("SFT, same steps", total)
    if "seconds" in options.controls:  # the steps' control says how long a step takes
        steps["SFT, same seconds"] = round(total * seconds["GRPO"] / seconds["SFT, same steps"])
        seconds["SFT, same seconds"] = control("SFT, same seconds", steps["SFT, same seconds"])
        made = json.loads((places["SFT, same seconds"] / "results.json").read_text(encoding="utf-8"))
        steps["SFT, same seconds"] = made["optimizer_steps"]
    grades: dict[str, list[bool]] = {}
    found: dict[str, Any] = {}
    for arm, place in places.items():
        file = folder / "held_out" / f"{place.name}.jsonl"
        result = evaluate_gsm8k(SmolLMv3WithTRM.from_pretrained(place), held_out, batch_size=100, progress=False,
                                predictions_path=file)  # fmt: skip
        grades[arm] = result["correct_by_problem"]
        found[arm] = {"accuracy": result["accuracy"], "steps": steps[arm], "cpu_seconds": round(seconds.get(arm, 0))}
        if arm != "start":
            change = paired_difference(grades[arm], grades["start"])
            found[arm]["gain"] = {"points": round(100 * change.difference, 1), "p": change.p_value,
                                  "interval": [round(100 * end, 1) for end in (change.low, change.high)]}  # fmt: skip
        print(kind, seed, arm, found[arm], flush=True)
    return found


def main() -> None:
    """All seeds of all settings, then the table."""
    options = parse()
    found = {kind: {seed: one_seed(options.output_dir / str(seed), kind, options, seed=seed) for seed in options.seeds}
             for kind in options.settings}  # fmt: skip
    rows = [[kind, seed, arm, one["steps"], f"{100 * one['accuracy']:.1f}", one.get("gain", {}).get("points", ""),
             f"{one['gain']['p']:.2g}" if "gain" in one else "", one["cpu_seconds"]]
            for kind, seeds in found.items() for seed, arms in seeds.items() for arm, one in arms.items()]  # fmt: skip
    print_table(["setting", "seed", "arm", "steps", "accuracy", "points", "p", "CPU s"], rows)
    setup = {"train": options.train, "grpo": {kind: GRPO[kind] for kind in options.settings}, "shared": SHARED}
    setup |= {"sft": SFT, "starts": STARTS, "test_problems": options.test_problems}
    record("grpo_study", {"setup": setup, "found": found}, keep=options.record)


if __name__ == "__main__":
    main()
