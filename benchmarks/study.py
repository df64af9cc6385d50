"""Do latents do anything that a cheaper thing would not do? Word problems of one to four steps, from scratch.

    python benchmarks/study.py                      LoRA, static latents, compressor, TRM; one seed (make study)
    python benchmarks/study.py --full               learning rates, all arms, 3 seeds, equal time, M (make study-full)
    python benchmarks/study.py --full --finished    train nothing: tables and plots of what is done so far

A tiny base is trained to write its chain. Every arm starts from it by LoRA, makes equal steps at its own learning rate,
and answers the same held-out problems without a chain, also with the latents of other problems. Seconds are CPU seconds
of training steps, so that other work beside it changes little. Killed and run again, it goes on where it stopped.
"""

import argparse
from collections.abc import Mapping
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _study as studied
from _record import benchmark_options, print_table, record
from _study import ARMS, AS_LONG, CHOSEN, CORE, FIRST, GRID, OTHER_RATES, SIZE, Job, arm_settings, base_settings
from _study_figures import arm_table, judged
from _study_plots import plot_study

from smollm_trm.data.gsm8k import load_gsm8k
from smollm_trm.data.word_problems import write_word_problems
from smollm_trm.demo import processes

Figures = dict[str, dict[str, Any]]
BASE = "base, writing its chain"
M_LATENTS = {4: 1, 16: 4}  # M other than the arms', and the latents that are asked for a step's result


def parse() -> argparse.Namespace:
    """The command line."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--full", action="store_true", help="all arms and questions in place of the core")
    parser.add_argument("--seeds", type=int, nargs="+", help="of problems, weights and order; 0, or 0 1 2 with --full")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="which arms to train")
    parser.add_argument("--steps", type=int, default=SIZE.arm_steps, help="training steps of every arm")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a core each")
    parser.add_argument("--finished", action="store_true", help="train nothing, tell what is done")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/study"), help="data, runs and results")
    parser.add_argument("--plots", type=Path, help="folder of the plots; output_dir by default")
    options = parser.parse_args()
    if options.steps < (least := 3 * studied.STAGES):
        parser.error(f"--steps {options.steps}: at least {least}, a step a stage in a third of the length")
    options.seeds = options.seeds or ([0, 1, 2] if options.full else [0])
    options.arms = options.arms or [arm for arm in ARMS if arm in CORE or (options.full and arm != FIRST)]
    return options


class Study:
    """The runs of a study, by stage; each gives the figures of its runs by name."""

    def __init__(self, options: argparse.Namespace, pool: Executor | None) -> None:
        self.folder, self.steps, self.arms = options.output_dir, options.steps, options.arms
        self.pool = pool
        """Where runs are made; None reads what is finished."""

    def of_seed(self, seed: int) -> Path:
        """The folder of a seed's problems, base and arms."""
        return self.folder / f"seed_{seed}"

    def made(self, jobs: Mapping[str, Job]) -> Figures:
        """Make the runs, two at a time; the longest should come first. Without processes, those that are finished."""
        if self.pool is None:
            found = {name: studied.finished(job) for name, job in jobs.items()}
            return {name: figures for name, figures in found.items() if figures is not None}
        running = {name: self.pool.submit(studied.train_and_ask, job) for name, job in jobs.items()}
        return {name: run.result() for name, run in running.items()}

    def base(self, seed: int) -> Figures:
        """Problems and base of a seed."""
        counts = {"train": SIZE.train_problems, "test": SIZE.test_problems}
        if self.pool is not None and not (self.of_seed(seed) / "data" / "test.jsonl").is_file():
            write_word_problems(self.of_seed(seed) / "data", **counts, seed=seed, settings=SIZE.problems)
        return self.made({BASE: Job(base_settings(self.of_seed(seed), seed=seed))})

    def job(self, arm: str, seed: int) -> Job:
        """An arm of a seed in the whole length."""
        settings = arm_settings(self.of_seed(seed), arm, seed=seed, steps=self.steps)
        return Job(settings, asked_steps=studied.ASKED_STEPS if arm in studied.MORE_STEPS else ())

    def of_arms(self, seed: int) -> Figures:
        """Every arm of a seed, in equal steps."""
        jobs = {arm: self.job(arm, seed) for arm in sorted(self.arms, key=list(ARMS).index, reverse=True)}
        made = self.made(jobs)
        return {arm: made[arm] for arm in self.arms if arm in made}

    def grid(self) -> Figures:
        """Dev losses of every arm at every learning rate, in a third of the steps, on seed 0."""
        jobs = {}
        for arm in self.arms:
            for rate in GRID:
                settings = arm_settings(self.of_seed(0), arm, seed=0, steps=self.steps // 3, rate=rate)
                jobs[f"{arm} {rate:g}"] = Job(settings, asked=False)
        made = self.made(jobs)
        by_arm = {arm: {f"{rate:g}": made.get(f"{arm} {rate:g}", {}).get("dev_loss") for rate in GRID}
                  for arm in self.arms}  # fmt: skip
        return {arm: losses for arm, losses in by_arm.items() if None not in losses.values()}

    def other_rates(self) -> Figures:
        """The arms whose grid chose its edge, at the rate that was not taken, in the whole length on seed 0."""
        jobs = {}
        for arm, rate in OTHER_RATES.items():
            settings = arm_settings(self.of_seed(0), arm, seed=0, steps=self.steps, rate=rate)
            jobs[f"{arm} at {rate:g}"] = Job(settings)
        return self.made(jobs)

    def as_long(self, of_seed_0: Figures) -> Figures:
        """The cheaper arms for as long as the TRM took, on seed 0."""
        if "TRM" not in of_seed_0:
            return {}
        jobs = {}
        for arm in (arm for arm in AS_LONG if arm in of_seed_0):
            longer = of_seed_0["TRM"]["cpu_seconds"] / of_seed_0[arm]["cpu_seconds"]
            settings = arm_settings(self.of_seed(0), arm, seed=0, steps=round(self.steps * longer))
            jobs[f"{arm}, as long"] = Job(settings)
        return self.made(jobs)

    def by_latents(self) -> Figures:
        """The TRM with fewer and with more latents, on seed 0."""
        jobs = {}
        for number, per_step in M_LATENTS.items():
            changes = {"num_latents": number, "latents_per_step": per_step}
            jobs[f"TRM, M = {number}"] = Job(arm_settings(self.of_seed(0), "TRM", seed=0, steps=self.steps, **changes))
        return self.made(jobs)

    def controls(self) -> Figures:
        """What step results, rows that are read again in every stage, and the TRM first are worth; on seed 0."""
        changes: dict[str, dict[str, Any]] = {
            "TRM, answer only": {"latents_per_step": 0},
            "TRM, rows repeated": {"num_epochs": studied.STAGES},
            "LoRA, rows repeated": {"num_epochs": studied.STAGES},
        }
        jobs = {FIRST: self.job(FIRST, 0)}
        for name, change in changes.items():
            settings = arm_settings(self.of_seed(0), name.split(",")[0], seed=0, steps=self.steps, **change)
            jobs[name] = Job(settings)
        return self.made(jobs)

    def needed(self, seed: int) -> list[int]:
        """Steps that each held-out problem of a seed needs."""
        return [
            studied.steps_needed(row) for row in load_gsm8k(self.of_seed(seed) / "data", seed=seed).gsm8k_final_test
        ]


def print_grid(grid: Mapping[str, Mapping[str, float]]) -> None:
    """The grid's dev losses, and where they speak for another learning rate than the stored one."""
    rows = []
    for arm, losses in grid.items():
        best = min(losses, key=losses.get)
        note = "" if float(best) == CHOSEN[arm] else f"best: {best}"
        rows.append([arm, *(f"{loss:.4f}" for loss in losses.values()), f"{CHOSEN[arm]:g}", note])
    print_table(["arm", *(f"{rate:g}" for rate in GRID), "stored", ""], rows)


def run(options: argparse.Namespace, study: Study) -> dict[str, Any]:
    """All that was asked for, in the order of what matters; the figures to keep."""
    full = options.full and 0 in options.seeds
    first = options.seeds[0]
    base = study.base(first)
    grid = study.grid() if full else {}
    by_seed = {first: base | study.of_arms(first)}
    alone: dict[str, Figures] = {}
    if full and {"LoRA", "TRM"} <= by_seed[0].keys():
        alone = {"equal time": study.as_long(by_seed[0]), "M": study.by_latents(), "other rates": study.other_rates()}
        alone["controls"] = study.controls()
    for seed in options.seeds[1:]:
        by_seed[seed] = study.base(seed) | study.of_arms(seed)
    if grid:
        print_grid(grid)
    return pooled(options, study, by_seed, alone) | ({"grid": grid} if grid else {})


def pooled(
    options: argparse.Namespace, study: Study, by_seed: Mapping[int, Figures], alone: Mapping[str, Figures]
) -> dict[str, Any]:
    """Figures over the seeds that have all arms, of the core over those that have it, and of what seed 0 has alone."""
    needed = {seed: study.needed(seed) for seed, found in by_seed.items() if found}
    figures: dict[str, Any] = {"seeds": {}}
    for name, arms in {"arms": options.arms, "core arms": [arm for arm in CORE if arm in options.arms]}.items():
        whole = {seed: found for seed, found in by_seed.items() if found.keys() >= {BASE, *arms}}
        if arms and whole and sorted(whole) != figures["seeds"].get("arms"):
            figures["seeds"][name] = sorted(whole)
            figures[name] = judged(
                {seed: {arm: found[arm] for arm in (BASE, *arms)} for seed, found in whole.items()}, needed
            )
            print_table(*arm_table(figures[name], f"{name}, seeds {sorted(whole)}"))
    if not figures["seeds"]:
        raise SystemExit("no seed has all its arms yet: run again without --finished")
    for name, found in alone.items():
        if found:
            figures[name] = judged({0: by_seed[0] | found}, needed)
            print_table(*arm_table({arm: figures[name][arm] for arm in ("LoRA", "TRM", *found)}, f"{name}, seed 0"))
    return figures


def setup_of(options: argparse.Namespace) -> dict[str, Any]:
    """What decides a study's figures."""
    arms = {arm: {**ARMS[arm], "learning_rate": CHOSEN[arm]} for arm in options.arms}
    shared = {"reasoner_rate": studied.REASONER_RATE, "warmup_fraction": studied.WARMUP, "base_rate": studied.BASE_RATE}
    shared |= {"base_batch": studied.BASE_BATCH}
    return {"size": asdict(SIZE), "steps": options.steps, **shared, "arms": arms}


def main() -> None:
    """Train, ask, compare, draw."""
    options = parse()
    with nullcontext() if options.finished else processes(options.processes) as pool:
        figures = run(options, Study(options, pool))
    plot_study(figures, options.plots or options.output_dir)
    kept = {"setup": setup_of(options), **figures}
    seed = options.seeds[0] if len(options.seeds) == 1 else None
    record("study_full" if options.full else "study", kept, seed=seed, keep=options.record)


if __name__ == "__main__":
    main()
