"""Do latents carry on a real pretrained base? SmolLM2-135M, answering at once, on word problems or real GSM8K.

    python benchmarks/real_base.py [--problems words] [--steps 100] [--seed 0] [--arms LoRA TRM] [--record]

A reasoner is trained alone first (`train_reasoner`), then LoRA and it together. LoRA alone gets the same number of
steps of 16 problems, and as "LoRA, as long" as many as fit into the TRM's seconds, those alone included. All in bf16
from the same base (figures differ between CPUs); all answer the same held-out problems, with latents shuffled between
problems too. An arm is a process and a thread, two at a time; run again, it goes on where it stopped. Word problems
have one or two steps and numbers up to 30.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from _arms import figures_of, side_by_side
from _record import benchmark_options, record
from _smollm2 import real_gsm8k, smollm2_folder
from torch.nn.attention import SDPBackend, sdpa_kernel

from smollm_trm.data.gsm8k import load_gsm8k
from smollm_trm.data.word_problems import write_word_problems
from smollm_trm.data.word_stories import WordProblemSettings
from smollm_trm.evaluation.arms import evaluate_arm, report_comparison
from smollm_trm.evaluation.plots import plot_losses
from smollm_trm.finetune import train_gsm8k, train_reasoner
from smollm_trm.records import UserMistake

SMALL_TRM = {"n_latent_steps": 2, "n_deep_recursions": 1, "n_supervision_steps": 1, "dim": 256, "soft_words": True}
AS_LONG = "LoRA, as long"
ARMS: dict[str, dict[str, Any]] = {
    "LoRA": {"use_trm": False},
    AS_LONG: {"use_trm": False},
    "compressor": {"reasoner": "compressor", "trm_kwargs": {"dim": 256, "soft_words": True}},
    "TRM": {"trm_kwargs": SMALL_TRM},
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--problems", choices=("words", "gsm8k"), default="words", help="what is trained and asked")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps of LoRA, with or without a reasoner")
    parser.add_argument("--reasoner_steps", type=int, default=1000, help="steps of 32 of the reasoner alone, before")
    parser.add_argument("--reasoner_rows", type=int, default=10_000, help="problems that these are of, each read once")
    parser.add_argument("--seed", type=int, default=0, help="of problems, weights and order")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="which arms to train")
    parser.add_argument("--num_latents", type=int, default=8, help="M")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="LoRA's")
    parser.add_argument(
        "--trm_learning_rate", type=float, default=1e-3, help="of the reasoner beside LoRA; alone, twice"
    )
    parser.add_argument("--warmup_fraction", type=float, default=0.2, help="of LoRA's steps")
    parser.add_argument("--test_problems", type=int, default=500, help="held-out problems that every arm answers")
    parser.add_argument("--processes", type=int, default=2, help="arms at a time, a core each")
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


def settings_of(name: str, options: argparse.Namespace, folder: Path, data: Path, steps: int) -> list[dict[str, Any]]:
    """An arm's runs, each in a folder named by what decides it: the reasoner alone, then LoRA and it."""
    shared: dict[str, Any] = {
        "data_dir": str(data), "model_name": str(smollm2_folder()), "target": "answer", "precision": "bf16-mixed",
        "accumulate_grad_batches": 1, "eval_batch_size": 64, "max_dev_samples": 256, "num_epochs": 1000,
        "patience": None, "lora_kwargs": {"dropout": 0.0}, "progress": False, "seed": options.seed,
        "split_seed": options.seed, **ARMS[name],
    }  # fmt: skip
    run = f"{name.replace(' ', '_').replace(',', '')}_{steps}_{options.learning_rate:g}_{options.warmup_fraction:g}"
    together = {"batch_size": 16, "max_steps": steps, "val_check_interval": 50, "save_every_n_steps": 50}
    together |= {"learning_rate": options.learning_rate, "warmup_fraction": options.warmup_fraction}
    if not shared.get("use_trm", True):
        return [{**shared, **together, "output_dir": str(folder / run.lower())}]
    shared["num_latents"] = options.num_latents
    run += f"_m{options.num_latents}_{options.trm_learning_rate:g}_{options.reasoner_steps}_{options.reasoner_rows}"
    last = {**shared, **together, "trm_learning_rate": options.trm_learning_rate}
    last["output_dir"] = str(folder / run.lower())
    if not options.reasoner_steps:
        return [last]
    alone = {"batch_size": 32, "max_steps": options.reasoner_steps, "max_samples": options.reasoner_rows}
    alone |= {"trm_learning_rate": 2 * options.trm_learning_rate, "val_check_interval": 250, "save_every_n_steps": 250}
    first = {**shared, **alone, "output_dir": str(folder / f"{run}_first".lower())}
    return [first, {**last, "load_model_path": first["output_dir"]}]


def train_and_answer(name: str, runs: list[dict[str, Any]], rows: list[dict[str, str]]) -> dict[str, Any]:
    """One arm from training to its graded answers; what is finished is only read."""
    torch.set_num_threads(1)
    *alone, last = runs
    with sdpa_kernel(SDPBackend.MATH):  # the other kernel's backward in bf16 takes a CPU five times as long
        for first in alone:
            train_reasoner(**first)
        _, module = train_gsm8k(**last)
    asked = {"batch_size": 128, "seed": last["seed"], "progress": False}
    results = evaluate_arm(name, module.model, rows, Path(last["output_dir"]) / "predictions", **asked)
    files = [json.loads((Path(run["output_dir"]) / "results.json").read_text(encoding="utf-8")) for run in runs]
    seconds = [file["seconds"] for file in files]
    told = " + ".join(f"{one:.0f}" for one in seconds)
    print(f"{name}: {100 * results[name]['accuracy']:.1f}%, trained in {told} s", flush=True)
    return {"results": results, "halting": None, "training_seconds": sum(seconds), "dev_loss": files[-1]["dev_loss"]}


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
    names = [name for name in ARMS if name in options.arms and name != AS_LONG]
    jobs = {name: settings_of(name, options, folder, data, options.steps) for name in names}
    found = side_by_side(jobs, rows, arm=train_and_answer, at_once=options.processes)
    if AS_LONG in options.arms and {"LoRA", "TRM"} <= found.keys():
        longer = found["TRM"]["training_seconds"] / found["LoRA"]["training_seconds"]
        jobs[AS_LONG] = settings_of(AS_LONG, options, folder, data, round(options.steps * longer))
        found |= side_by_side({AS_LONG: jobs[AS_LONG]}, rows, arm=train_and_answer, at_once=1)
    results = {name: result for arm in found.values() for name, result in arm["results"].items()}
    curves = {name: Path(runs[-1]["output_dir"]) / "logs" / "metrics.csv" for name, runs in jobs.items()}
    plot_losses(curves, folder / "losses.png")
    print(report_comparison(results, folder, baseline=next(iter(jobs)), seed=options.seed), end="\n\n")
    figures = figures_of(found)
    for name, arm in found.items():
        figures[name] |= {"dev_loss": arm["dev_loss"], "steps": jobs[name][-1]["max_steps"]}
    setup = {name: value for name, value in vars(options).items() if name not in ("record", "output_dir", "seed")}
    record("real_base", {"setup": setup, "arms": figures}, seed=options.seed, keep=options.record)


if __name__ == "__main__":
    main()
