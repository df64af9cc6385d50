"""Do latents carry reasoning? LoRA only, static latents, compressor only and TRM, on word problems answered at once.

    python benchmarks/study.py [--seed 0] [--steps 2000] [--arms LoRA TRM] [--record]
    python benchmarks/study.py --seeds 0 1 2 [--record]        (one table of what was recorded)

Every arm starts from the same tiny base, which was trained as the demo's to write its chain, and has to answer without
one. All arms make equal steps, each at its own learning rates, and answer the same held-out problems, also with latents
shuffled between problems. (Equal steps are not equal time: static latents need no read pass of the base, the TRM needs
one and thinks.) Two arms run at a time, a process and a thread each; run again, the study goes on where it stopped.
"""

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from _models import demo_base_settings, demo_settings, write_demo_problems
from _record import RESULTS, benchmark_options, print_table, record

from smollm_trm.data.gsm8k import load_gsm8k
from smollm_trm.demo import DemoSize, length_of
from smollm_trm.evaluation.arms import evaluate_arm, report_comparison
from smollm_trm.evaluation.halting import judge_halting
from smollm_trm.evaluation.plots import plot_losses
from smollm_trm.evaluation.statistics import mcnemar_p, paired_difference
from smollm_trm.finetune import train_gsm8k
from smollm_trm.models.smollm import SmolLMv3WithTRM

STUDIED_TRM: dict[str, Any] = {
    "reasoner": "trm",
    "trm_kwargs": {"n_latent_steps": 3, "n_deep_recursions": 1, "n_supervision_steps": 2},
    "learning_rate": 2e-3,
    "trm_learning_rate": 3e-3,
}
ARMS: dict[str, dict[str, Any]] = {
    "LoRA": {"use_trm": False, "learning_rate": 2e-3},
    "static latents": {"reasoner": "static", "learning_rate": 2e-3, "trm_learning_rate": 2e-3},
    "compressor": {"reasoner": "compressor", "learning_rate": 2e-3, "trm_learning_rate": 2e-3},
    "TRM, answer only": {**STUDIED_TRM, "latents_per_step": 0},
    "TRM": STUDIED_TRM,
}
"""What each arm is, at its own learning rates: of LoRA, and of the reasoner. "Answer only" asks its latents for no
results of steps."""
TESTED = "TRM"
"""The arm that all others are compared with."""
AT_ONCE = 2


def parse() -> argparse.Namespace:
    """The command line."""
    size, parser = DemoSize(), benchmark_options(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of problems, weights and order")
    parser.add_argument("--seeds", type=int, nargs="+", help="train nothing: pool what is recorded of these seeds")
    parser.add_argument("--steps", type=int, default=2000, help="training steps of every arm")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="which arms to train")
    parser.add_argument("--train_problems", type=int, default=size.train_problems)
    parser.add_argument("--test_problems", type=int, default=2000, help="held-out problems that every arm answers")
    parser.add_argument("--base_steps", type=int, default=size.base_steps, help="training steps of the base")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/study"), help="data, runs and results go here")
    return parser.parse_args()


def size_of(options: argparse.Namespace) -> DemoSize:
    """The demo's size, with what the command line changes."""
    names = ("train_problems", "test_problems", "base_steps")
    return replace(DemoSize(), arm_steps=options.steps, **{name: getattr(options, name) for name in names})


def setup_of(size: DemoSize) -> dict[str, Any]:
    """What records must share to be pooled."""
    return {**asdict(size), "arms": ARMS}


def arm_settings(folder: Path, name: str, size: DemoSize, *, seed: int) -> dict[str, Any]:
    """Settings of an arm's run, in a folder named by steps and rates: a run at other rates leaves this one as it is."""
    rates = [f"{ARMS[name][rate]:g}" for rate in ("learning_rate", "trm_learning_rate") if rate in ARMS[name]]
    run = "_".join([name.replace(" ", "_").lower(), str(size.arm_steps), *rates])
    return {
        **demo_settings(folder / "data", size, seed=seed),
        **length_of(size.arm_steps, size.batch_size),
        **ARMS[name],
        "save_every_n_steps": 250,
        "model_name": str(folder / "base" / "model"),
        "target": "answer",
        "num_latents": size.num_latents,
        "lora_kwargs": {"dropout": 0.0},
        "progress": False,
        "output_dir": str(folder / run),
    }


def train_and_evaluate(name: str, settings: dict[str, Any], rows: list[dict[str, str]]) -> dict[str, Any]:
    """One arm from training to its graded answers, latents shuffled included; a finished run is only read."""
    torch.set_num_threads(1)
    folder = Path(settings["output_dir"])
    _, module = train_gsm8k(**settings)
    asked = {"batch_size": 128, "seed": settings["seed"], "progress": False}
    results = evaluate_arm(name, module.model, rows, folder / "predictions", **asked)
    halting = judge_halting(module.model, rows, results[name]["correct_by_problem"])
    seconds = json.loads((folder / "results.json").read_text(encoding="utf-8"))["seconds"]
    print(f"{name}: {100 * results[name]['accuracy']:.1f}%, trained in {seconds:.0f} s", flush=True)
    return {"results": results, "halting": halting, "training_seconds": seconds}


def side_by_side(
    jobs: dict[str, Any], rows: list[dict[str, str]], *, arm: Callable = train_and_evaluate, at_once: int = AT_ONCE
) -> dict[str, dict[str, Any]]:
    """Every arm in a process of its own with one thread, two at a time; the slowest first."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("spawn")) as processes:
        running: dict[str, Future] = {name: processes.submit(arm, name, jobs[name], rows) for name in reversed(jobs)}
        return {name: running[name].result() for name in jobs}


def study(folder: Path, size: DemoSize, arms: list[str], *, seed: int) -> dict[str, Any]:
    """All arms of one seed: train, evaluate, compare."""
    rows = load_gsm8k(write_demo_problems(folder, size, seed=seed), seed=seed).gsm8k_final_test
    print(f"a base from scratch, {size.base_steps} steps; then {', '.join(arms)}, {size.arm_steps} steps", flush=True)
    train_gsm8k(**demo_base_settings(folder, size, seed=seed))
    jobs = {name: arm_settings(folder, name, size, seed=seed) for name in ARMS if name in arms}
    found = side_by_side(jobs, rows)
    base = SmolLMv3WithTRM.from_pretrained(folder / "base" / "model")
    asked = {"batch_size": 128, "progress": False}
    chain = evaluate_arm("base, writing its chain", base, rows[: size.base_problems], folder / "predictions", **asked)
    results = {name: result for arm in found.values() for name, result in arm["results"].items()}
    curves = {name: Path(job["output_dir"]) / "logs" / "metrics.csv" for name, job in jobs.items()}
    plot_losses(curves, folder / "losses.png")
    print(report_comparison(results, folder, baseline=next(iter(jobs)), seed=seed), end="\n\n")
    figures = figures_of(found)
    return {"setup": setup_of(size), "base_chain": next(iter(chain.values()))["accuracy"], "arms": figures}


def figures_of(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every arm's figures, and `TESTED` against each of them, paired by problem; printed as a table."""
    results = {name: result for arm in found.values() for name, result in arm["results"].items()}
    figures: dict[str, Any] = {
        name: {key: result[key] for key in ("accuracy", "interval")} for name, result in results.items()
    }
    for name, arm in found.items():
        figures[name] |= {"training_seconds": arm["training_seconds"], "halting": arm["halting"]}
    if TESTED in results:
        grades = results[TESTED]["correct_by_problem"]
        for name in figures.keys() - {TESTED}:
            figures[name]["tested"] = asdict(paired_difference(grades, results[name]["correct_by_problem"]))
    table = [[name, percent(arm["accuracy"]), *test_cells(arm.get("tested"))] for name, arm in figures.items()]
    print_table(["arm", "accuracy", f"{TESTED} better by", "95%", "p"], table)
    return figures


def percent(share: float, sign: str = "") -> str:
    """A share for a table."""
    return f"{100 * share:{sign}.1f}"


def test_cells(test: dict[str, Any] | None) -> list[str]:
    """A paired test for a table."""
    if test is None:
        return ["", "", ""]
    interval = f"{percent(test['low'], '+')} to {percent(test['high'], '+')}"
    return [percent(test["difference"], "+"), interval, f"{test['p_value']:.2g}"]


def mean_and_range(shares: list[float], sign: str = "") -> str:
    """Mean, lowest and highest for a table."""
    mean, low, high = sum(shares) / len(shares), min(shares), max(shares)
    return f"{percent(mean, sign)} ({percent(low, sign)} to {percent(high, sign)})"


def recorded(seeds: list[int], size: DemoSize) -> dict[int, dict[str, Any]]:
    """The newest record of every seed with this size and these rates.

    Raises:
        SystemExit: a seed has none.
    """
    wanted = json.loads(json.dumps(setup_of(size)))
    lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    found = {
        line["seed"]: line["figures"]["arms"]
        for line in lines
        if line["name"] == "study" and line["figures"].get("setup") == wanted
    }
    for seed in seeds:
        if seed not in found:
            raise SystemExit(f"seed {seed} is not recorded with these settings: study.py --seed {seed} --record")
    return {seed: found[seed] for seed in seeds}


def pool(by_seed: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """One table of several seeds: mean and range, and McNemar's test over the problems of all of them."""
    names = [name for name in next(iter(by_seed.values())) if all(name in arms for arms in by_seed.values())]
    figures: dict[str, Any] = {}
    for name in names:
        arms = [arms[name] for arms in by_seed.values()]
        figures[name] = {"accuracy": [arm["accuracy"] for arm in arms]}
        if tests := [arm["tested"] for arm in arms if "tested" in arm]:
            discordant = (sum(test[side] for test in tests) for side in ("only_first", "only_second"))
            figures[name] |= {"better_by": [test["difference"] for test in tests], "p": mcnemar_p(*discordant)}
    table = [
        [name, mean_and_range(arm["accuracy"]),
         *([mean_and_range(arm["better_by"], "+"), f"{arm['p']:.2g}"] if "p" in arm else ["", ""])]
        for name, arm in figures.items()
    ]  # fmt: skip
    print_table([f"arm, {len(by_seed)} seeds", "accuracy", f"{TESTED} better by", "p, all problems"], table)
    return figures


def main() -> None:
    """One seed's study, or a table of several."""
    options = parse()
    size = size_of(options)
    if options.seeds:
        figures = {"setup": setup_of(size), "seeds": options.seeds, "arms": pool(recorded(options.seeds, size))}
        record("study_seeds", figures, keep=options.record)
        return
    figures = study(options.output_dir / f"seed_{options.seed}", size, options.arms, seed=options.seed)
    record("study", figures, seed=options.seed, keep=options.record)


if __name__ == "__main__":
    main()
