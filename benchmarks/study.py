"""Do latents carry reasoning? LoRA only, static latents, compressor only and TRM, on word problems answered at once.

Every arm starts from the same tiny base, which was trained from scratch to write its chain, and has to answer without
one. All arms make equal steps; the controls are also given the TRM's computing time. Each arm is evaluated on the
same held-out problems, also with its latents shuffled between problems. Two arms run at a time, one thread each; run
again, the study goes on where it stopped.

    python benchmarks/study.py [--record] [--seeds 0 1 2] [--output_dir outputs/study]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from _record import benchmark_options, print_table, record

SIZE = {
    "problems": {"max_steps": 2, "max_number": 10, "max_value": 30, "distractor_rate": 0.0},
    "train_problems": 120_000,
    "test_problems": 2_000,
    "base_steps": 2_500,
    "arm_steps": 3_000,
    "batch_size": 32,
    "num_latents": 8,
}
TRM = {"n_latent_steps": 3, "n_deep_recursions": 1, "n_supervision_steps": 2}
RATES = {"learning_rate": 1e-3, "trm_learning_rate": 2e-3}
ARMS = {
    "LoRA": {"use_trm": False},
    "static latents": {"reasoner": "static"},
    "compressor": {"reasoner": "compressor"},
    "TRM": {"reasoner": "trm"},
    "compressor, frozen base": {"reasoner": "compressor", "base_training": "frozen"},
    "TRM, frozen base": {"reasoner": "trm", "base_training": "frozen"},
}
LONGER = ("compressor", "static latents", "LoRA")
"""The controls that are also run for as long as the TRM took."""


def options() -> dict:
    """The command line."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--output_dir", default="outputs/study", help="data, runs and results go here")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one study per seed")
    parser.add_argument("--steps", type=int, default=SIZE["arm_steps"], help="training steps of every arm")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="arms trained at once")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="which arms to train")
    parser.add_argument(
        "--longer", action=argparse.BooleanOptionalAction, default=True, help="also equal computing time"
    )
    parser.add_argument("--job", help="(used by the study itself: one training run as JSON)")
    given = parser.parse_args()
    if not {"TRM", "static latents"} <= set(given.arms):
        parser.error("--arms: TRM and 'static latents' are what the others are compared with, so both are needed")
    return vars(given)


def train(job: dict) -> None:
    """One training run; its process does nothing else."""
    import torch

    from smollm_trm import train_gsm8k

    torch.set_num_threads(job.pop("threads"))
    train_gsm8k(**job)


def common(folder: Path, seed: int) -> dict:
    """Settings that every run shares."""
    return {
        "data_dir": str(folder / "data"),
        "batch_size": SIZE["batch_size"],
        "eval_batch_size": 128,
        "max_dev_samples": 1000,
        "accumulate_grad_batches": 1,
        "num_epochs": 1000,
        "patience": None,
        "num_latents": SIZE["num_latents"],
        "seed": seed,
        "progress": False,
        "lora_kwargs": {"dropout": 0.0},
    }


def base_job(folder: Path, seed: int) -> dict:
    """The base: trained whole, on the chain."""
    return common(folder, seed) | {
        "model_name": "tiny",
        "base_training": "full",
        "use_trm": False,
        "learning_rate": 3e-3,
        "max_steps": SIZE["base_steps"],
        "val_check_interval": SIZE["base_steps"] // 2,
        "output_dir": str(folder / "base"),
    }


def arm_job(folder: Path, seed: int, name: str, steps: int) -> dict:
    """An arm: LoRA and its latents, answering at once."""
    return (
        common(folder, seed)
        | RATES
        | ARMS[name.removesuffix(", longer")]
        | {
            "model_name": str(folder / "base" / "model" / "base"),
            "trm_kwargs": TRM,
            "target": "answer",
            "max_steps": steps,
            "val_check_interval": max(1, steps // 4),
            "save_every_n_steps": 250,
            "output_dir": str(folder / name.replace(", ", "_").replace(" ", "_").lower()),
        }
    )


def run_jobs(jobs: list[dict], *, processes: int, threads: int) -> None:
    """Train in subprocesses, several at a time; finished runs cost a moment only."""

    def run(job: dict) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        begun = time.monotonic()
        command = [sys.executable, __file__, "--job", json.dumps(job | {"threads": threads})]
        subprocess.run(command, check=True, env=environment)
        print(f"{job['output_dir']}: {time.monotonic() - begun:.0f} s", flush=True)

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(run, jobs))


def seconds_of(job: dict) -> float:
    """Training time of a finished run."""
    return json.loads((Path(job["output_dir"]) / "results.json").read_text())["seconds"]


def study(folder: Path, seed: int, steps: int, processes: int, arms: list[str], longer: bool) -> dict:
    """All arms of one seed: train, evaluate, compare."""
    from smollm_trm import SmolLMv3WithTRM, WordProblemSettings, load_gsm8k, write_word_problems
    from smollm_trm.evaluation.arms import evaluate_arm, report_comparison
    from smollm_trm.evaluation.halting import judge_halting
    from smollm_trm.evaluation.plots import plot_losses
    from smollm_trm.evaluation.statistics import paired_difference

    settings = WordProblemSettings(**SIZE["problems"])
    write_word_problems(
        folder / "data", train=SIZE["train_problems"], test=SIZE["test_problems"], seed=seed, settings=settings
    )
    run_jobs([base_job(folder, seed)], processes=1, threads=processes)
    slowest_first = ("TRM", "compressor", "TRM, frozen base", "compressor, frozen base", "static latents", "LoRA")
    jobs = {name: arm_job(folder, seed, name, steps) for name in slowest_first if name in arms}
    run_jobs(list(jobs.values()), processes=processes, threads=1)
    for name in [name for name in LONGER if longer and name in jobs]:
        more = round(steps * seconds_of(jobs["TRM"]) / seconds_of(jobs[name]))
        jobs[f"{name}, longer"] = arm_job(folder, seed, f"{name}, longer", max(more, steps))
    run_jobs([job for name, job in jobs.items() if name.endswith(", longer")], processes=processes, threads=1)
    rows = load_gsm8k(folder / "data", seed=seed).gsm8k_final_test
    base = SmolLMv3WithTRM.from_pretrained(folder / "base" / "model")
    predictions = folder / "predictions"
    chain = evaluate_arm("base, writing its chain", base, rows, predictions, batch_size=128)
    results: dict[str, dict] = {}
    halting = None
    for name, job in jobs.items():
        model = SmolLMv3WithTRM.from_pretrained(Path(job["output_dir"]) / "model")
        results |= evaluate_arm(name, model, rows, predictions, batch_size=128, seed=seed)
        if name == "TRM":
            halting = judge_halting(model, rows, results[name]["correct_by_problem"])
    comparison = report_comparison(results, folder, baseline="static latents", seed=seed)
    drawn = [name for name in jobs if "," not in name]  # four curves can be told apart
    plot_losses(
        {name: Path(jobs[name]["output_dir"]) / "logs" / "metrics.csv" for name in drawn}, folder / "losses.png"
    )
    print(comparison)
    figures = {"base_chain": next(iter(chain.values()))["accuracy"], "steps": steps, "halting": halting, "arms": {}}
    grades = {name: result["correct_by_problem"] for name, result in results.items()}
    for name, result in results.items():
        test = paired_difference(grades["TRM"], grades[name])
        figures["arms"][name] = {
            "accuracy": result["accuracy"],
            "interval": result["interval"],
            "trm_better_by": [test.difference, test.low, test.high],
            "p": test.p_value,
        }
        if name in jobs:
            figures["arms"][name] |= {"steps": jobs[name]["max_steps"], "seconds": seconds_of(jobs[name])}
    rows_shown = [
        [name, f"{100 * arm['accuracy']:.1f}", f"{100 * arm['trm_better_by'][0]:+.1f}", f"{arm['p']:.2g}"]
        for name, arm in figures["arms"].items()
    ]
    print_table(["arm", "accuracy %", "TRM better by", "p"], rows_shown)
    return figures


def main() -> None:
    """Run the study for every seed."""
    given = options()
    if given["job"]:
        train(json.loads(given["job"]))
        return
    for seed in given["seeds"]:
        folder = Path(given["output_dir"]) / f"seed_{seed}"
        figures = study(folder, seed, given["steps"], given["processes"], given["arms"], given["longer"])
        record("study", figures, seed=seed, keep=given["record"])


if __name__ == "__main__":
    main()
