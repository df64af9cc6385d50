"""Coconut's curriculum on the word problems, one seed: which way of leaving the chain out costs least?

    python benchmarks/coconut_study.py [--seed 0] [--steps 2000] [--arms Coconut TRM] [--record]

From the study's base, which writes its chain, by LoRA and in equal steps: the chain itself, the answer at once,
pause tokens, iCoT, Coconut with its curriculum, the TRM, and the TRM under the same curriculum. Every arm with latents
is also asked with those of other problems. All arms read the same rows as often: an epoch a stage. Run again, it goes
on where it stopped. A first look: the learning rates were not searched for each arm.
"""

import argparse
from pathlib import Path
from typing import Any

from _models import demo_base_settings, demo_settings, write_demo_problems
from _record import benchmark_options, print_table, record
from study import percent, side_by_side

from smollm_trm.data.gsm8k import load_gsm8k
from smollm_trm.demo import DemoSize
from smollm_trm.evaluation.arms import report_comparison
from smollm_trm.evaluation.plots import plot_losses
from smollm_trm.finetune import train_gsm8k

C_THOUGHT = 2
STAGES = 4  # all steps; the first by latents; both; and none written at all, as published
RATES = {"learning_rate": 2e-3, "trm_learning_rate": 3e-3}
TRM = {"reasoner": "trm", "trm_kwargs": {"n_latent_steps": 3, "n_deep_recursions": 1, "n_supervision_steps": 2}}
CURRICULUM = {"mode": "coconut", "c_thought": C_THOUGHT, "max_latent_stage": STAGES - 2, "epochs_per_stage": 1}
AT_ONCE = {"target": "answer", "num_latents": C_THOUGHT * (STAGES - 2)}
ARMS: dict[str, dict[str, Any]] = {
    "CoT": {"mode": "cot"},
    "no CoT": {"mode": "no_cot"},
    "pause": {"reasoner": "pause", **AT_ONCE},
    "iCoT": {"mode": "icot", "epochs_per_stage": 1},
    "Coconut": {**CURRICULUM, "reasoner": "coconut", "reset_optimizer": True},
    "TRM": {**TRM, **AT_ONCE},
    "TRM, curriculum": {**TRM, **CURRICULUM, "reset_optimizer": True},
}


def parse() -> argparse.Namespace:
    """The command line."""
    size, parser = DemoSize(), benchmark_options(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of problems, weights and order")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of every arm")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--train_problems", type=int, default=size.train_problems)
    parser.add_argument("--test_problems", type=int, default=2000, help="held-out problems that every arm answers")
    parser.add_argument("--base_steps", type=int, default=size.base_steps, help="training steps of the base")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/coconut_study"))
    return parser.parse_args()


def arm_settings(folder: Path, name: str, size: DemoSize, *, seed: int) -> dict[str, Any]:
    """Settings of an arm's run."""
    per_stage = max(1, size.arm_steps // STAGES)
    return {
        **demo_settings(folder / "data", size, seed=seed),
        **RATES,
        **ARMS[name],
        "max_samples": per_stage * size.batch_size,
        "num_epochs": STAGES,
        "save_every_n_steps": 250,
        "model_name": str(folder / "base" / "model"),
        "lora_kwargs": {"dropout": 0.0},
        "use_trm": "reasoner" in ARMS[name],
        "progress": False,
        "output_dir": str(folder / f"{name.replace(', ', '_').replace(' ', '_').lower()}_{size.arm_steps}"),
    }


def main() -> None:
    """Base, arms, table."""
    options = parse()
    names = ("train_problems", "test_problems", "base_steps")
    size = DemoSize(arm_steps=options.steps, **{name: getattr(options, name) for name in names})
    folder = options.output_dir / f"seed_{options.seed}"
    rows = load_gsm8k(write_demo_problems(folder, size, seed=options.seed), seed=options.seed).gsm8k_final_test
    train_gsm8k(**demo_base_settings(folder, size, seed=options.seed))
    jobs = {name: arm_settings(folder, name, size, seed=options.seed) for name in ARMS if name in options.arms}
    found = side_by_side(jobs, rows)
    results = {name: result for arm in found.values() for name, result in arm["results"].items()}
    curves = {name: Path(job["output_dir"]) / "logs" / "metrics.csv" for name, job in jobs.items()}
    plot_losses(curves, folder / "losses.png")
    baseline = "no CoT" if "no CoT" in jobs else next(iter(jobs))
    print(report_comparison(results, folder, baseline=baseline, seed=options.seed), end="\n\n")
    kept = ("accuracy", "interval", "cot_match")
    figures: dict[str, Any] = {name: {key: result[key] for key in kept} for name, result in results.items()}
    for name, arm in found.items():
        figures[name]["training_seconds"] = arm["training_seconds"]
    table = [[name, percent(arm["accuracy"]), arm.get("training_seconds", "")] for name, arm in figures.items()]
    print_table(["arm", "accuracy", "seconds"], table)
    setup = {"steps": options.steps, "stages": STAGES, "rates": RATES, "arms": ARMS}
    record("coconut_study", {"setup": setup, "arms": figures}, seed=options.seed, keep=options.record)


if __name__ == "__main__":
    main()
