"""Do latents carry on a real pretrained base? SmolLM2-135M, answering at once, on word problems or real GSM8K.

    python benchmarks/real_base.py [--problems words] [--steps 600] [--seed 0] [--arms LoRA TRM] [--record]

Every arm makes the same number of steps of 16 problems from the same base, in bf16 (figures differ between CPUs), and
answers the same held-out problems, also with latents shuffled between problems. Two arms run at a time, a process and a
thread each; run again, it goes on where it stopped. Word problems have one or two steps and numbers up to 30.
"""

import argparse
from pathlib import Path
from typing import Any

from _record import benchmark_options, record
from _smollm2 import real_gsm8k, smollm2_folder
from study import figures_of, side_by_side

from smollm_trm.data.gsm8k import load_gsm8k
from smollm_trm.data.word_problems import write_word_problems
from smollm_trm.data.word_stories import WordProblemSettings
from smollm_trm.evaluation.arms import report_comparison
from smollm_trm.evaluation.plots import plot_losses
from smollm_trm.records import UserMistake

SMALL_TRM = {"n_latent_steps": 2, "n_deep_recursions": 1, "n_supervision_steps": 1, "dim": 256}
ARMS: dict[str, dict[str, Any]] = {
    "LoRA": {"use_trm": False, "learning_rate": 1e-3},
    "compressor": {"reasoner": "compressor", "learning_rate": 1e-3, "trm_kwargs": {"dim": 256}},
    "TRM": {"learning_rate": 1e-3, "trm_kwargs": SMALL_TRM},
    "TRM, answer only": {"learning_rate": 1e-3, "trm_kwargs": SMALL_TRM, "latents_per_step": 0},
}
"""What each arm is; "answer only" asks nothing of its latents but the answer."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--problems", choices=("words", "gsm8k"), default="words", help="what is trained and asked")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of every arm")
    parser.add_argument("--seed", type=int, default=0, help="of problems, weights and order")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="which arms to train")
    parser.add_argument("--num_latents", type=int, default=8, help="M")
    parser.add_argument("--trm_learning_rate", type=float, default=2e-3, help="see TrainSettings")
    parser.add_argument("--warmup_fraction", type=float, default=0.2, help="of every arm")
    parser.add_argument("--test_problems", type=int, default=500, help="held-out problems that every arm answers")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/real_base"), help="data, runs and results")
    return parser.parse_args()


def problems_in(options: argparse.Namespace, folder: Path) -> Path:
    """The folder with `train.jsonl` and `test.jsonl`."""
    if options.problems == "words":
        easy = WordProblemSettings(max_steps=2, max_number=10, max_value=30, distractor_rate=0.0)
        return write_word_problems(folder / "data", train=20_000, test=2000, seed=options.seed, settings=easy)
    if (found := real_gsm8k()) is None:
        raise UserMistake("GSM8K is not on this machine: set GSM8K_DIR to the folder with train.jsonl and test.jsonl")
    return found


def settings_of(name: str, options: argparse.Namespace, folder: Path, data: Path) -> dict[str, Any]:
    """An arm's run, in a folder named by what decides it."""
    run = [name.replace(" ", "_").replace(",", ""), str(options.steps)]
    shared: dict[str, Any] = {
        "data_dir": str(data), "model_name": str(smollm2_folder()), "target": "answer", "precision": "bf16-mixed",
        "batch_size": 16, "accumulate_grad_batches": 1, "eval_batch_size": 64, "max_dev_samples": 256,
        "num_epochs": 1000, "max_steps": options.steps, "val_check_interval": 100, "patience": None,
        "save_every_n_steps": 50, "lora_kwargs": {"dropout": 0.0}, "progress": False, "seed": options.seed,
        "split_seed": options.seed, "warmup_fraction": options.warmup_fraction,
    }  # fmt: skip
    if ARMS[name].get("use_trm", True):
        shared |= {"num_latents": options.num_latents, "trm_learning_rate": options.trm_learning_rate}
        run += [f"m{options.num_latents}", f"{options.trm_learning_rate:g}"]
    run.append(f"{options.warmup_fraction:g}")
    return {**shared, **ARMS[name], "output_dir": str(folder / "_".join(run).lower())}


def main() -> None:
    """Train, evaluate and compare the arms of one seed."""
    options = parse()
    folder = options.output_dir / f"{options.problems}_{options.seed}"
    data = problems_in(options, folder)
    splits = load_gsm8k(data, seed=options.seed)
    held_out = (
        splits.gsm8k_final_test if options.problems == "words" else splits.gsm8k_test
    )  # GSM8K's test stays unseen
    rows = held_out[: options.test_problems]
    jobs = {name: settings_of(name, options, folder, data) for name in ARMS if name in options.arms}
    found = side_by_side(jobs, rows)
    results = {name: result for arm in found.values() for name, result in arm["results"].items()}
    plot_losses(
        {name: Path(job["output_dir"]) / "logs" / "metrics.csv" for name, job in jobs.items()}, folder / "losses.png"
    )
    print(report_comparison(results, folder, baseline=next(iter(jobs)), seed=options.seed), end="\n\n")
    figures = figures_of(found)
    setup = {name: value for name, value in vars(options).items() if name not in ("record", "output_dir", "seed")}
    record("real_base", {"setup": setup, "arms": figures}, seed=options.seed, keep=options.record)


if __name__ == "__main__":
    main()
