"""Do latents carry on a real pretrained base? SmolLM2-135M, answering at once, on word problems or real GSM8K.

    python benchmarks/real_base.py [--problems words] [--steps 300] [--seed 0] [--arms LoRA TRM] [--record]

A reasoner is trained alone first (`reasoner_steps`), then LoRA and it together. LoRA alone gets the same number of
steps of 16 problems, and as "LoRA, as long" as many as fit into the TRM's CPU seconds, those alone included. All in
bf16 from the same base (figures differ between CPUs); all answer the same held-out problems, with latents shuffled
between problems too; "base" is the untuned base, which writes its steps; "LoRA, all layers" adapts every linear layer,
the others the attention. An arm is a process and a thread, two at a time; run again, it goes on where it stopped. Word
problems have one or two steps and numbers up to 30.
"""

import argparse
import json
import time
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
from smollm_trm.finetune import train_gsm8k
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.records import UserMistake, write_json

SMALL_TRM = {"n_latent_steps": 2, "n_deep_recursions": 1, "n_supervision_steps": 1, "dim": 256, "soft_words": True}
BASE = "base"
AS_LONG = "LoRA, as long"
ARMS: dict[str, dict[str, Any]] = {
    BASE: {},
    "LoRA": {"use_trm": False},
    AS_LONG: {"use_trm": False},
    "LoRA, all layers": {"use_trm": False, "lora_kwargs": {"dropout": 0.0, "target_modules": "all-linear"}},
    "compressor": {"reasoner": "compressor", "trm_kwargs": {"dim": 256, "soft_words": True}},
    "TRM": {"trm_kwargs": SMALL_TRM},
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--problems", choices=("words", "gsm8k"), default="words", help="what is trained and asked")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of LoRA, with or without a reasoner")
    parser.add_argument("--reasoner_steps", type=int, default=1500, help="steps of 32 of the reasoner alone, before")
    parser.add_argument("--rows", type=int, default=10_000, help="problems that are trained on")
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


def settings_of(name: str, options: argparse.Namespace, folder: Path, data: Path, steps: int) -> dict[str, Any]:
    """An arm's run, in a folder named by what decides it."""
    settings: dict[str, Any] = {
        "data_dir": str(data), "model_name": str(smollm2_folder()), "target": "answer", "precision": "bf16-mixed",
        "batch_size": 16, "accumulate_grad_batches": 1, "eval_batch_size": 64, "max_dev_samples": 256,
        "max_samples": options.rows, "max_steps": steps, "num_epochs": 1000, "val_check_interval": 50,
        "save_every_n_steps": 50, "patience": None, "lora_kwargs": {"dropout": 0.0}, "progress": False,
        "learning_rate": options.learning_rate, "warmup_fraction": options.warmup_fraction,
        "seed": options.seed, "split_seed": options.seed, **ARMS[name],
    }  # fmt: skip
    run = f"{name.replace(' ', '_').replace(',', '')}_{steps}_{options.learning_rate:g}_{options.warmup_fraction:g}"
    if settings.get("use_trm", True):
        latents = {"num_latents": options.num_latents, "trm_learning_rate": options.trm_learning_rate}
        settings |= {**latents, "reasoner_steps": options.reasoner_steps}
        run += f"_m{options.num_latents}_{options.trm_learning_rate:g}_{options.reasoner_steps}"
    return {**settings, "output_dir": str(folder / f"{run}_{options.rows}".lower())}


def train_and_answer(name: str, settings: dict[str, Any], rows: list[dict[str, str]]) -> dict[str, Any]:
    """One arm from training to its graded answers; what is finished is only read."""
    torch.set_num_threads(1)
    folder, seconds = Path(settings["output_dir"]), 0.0
    with sdpa_kernel(SDPBackend.MATH):  # the other kernel's backward in bf16 takes a CPU five times as long
        if name == BASE:
            how = {"reasoner": None, "base_training": "frozen", "think": False, "dtype": torch.bfloat16}
            model = SmolLMv3WithTRM.from_base(settings["model_name"], **how).eval()
        else:
            model, seconds = timed(settings)
    asked = {"batch_size": 128, "seed": settings["seed"], "progress": False}
    results = evaluate_arm(name, model, rows, folder / "predictions", **asked)
    print(f"{name}: {100 * results[name]['accuracy']:.1f}%, trained in {seconds:.0f} CPU seconds", flush=True)
    trained = {} if name == BASE else json.loads((folder / "results.json").read_text(encoding="utf-8"))
    loss, steps = (trained.get(key) for key in ("dev_loss", "optimizer_steps"))
    return {"results": results, "halting": None, "training_seconds": seconds, "dev_loss": loss, "steps": steps}


def timed(settings: dict[str, Any]) -> tuple[SmolLMv3WithTRM, float]:
    """A trained model, and its training's CPU seconds, those of sessions that were broken off left out."""
    file = Path(settings["output_dir"]) / "cpu_seconds.json"
    started = time.process_time()
    _, module = train_gsm8k(**settings)
    if not file.is_file():
        write_json(file, {"cpu_seconds": round(time.process_time() - started, 1)})
    return module.model, json.loads(file.read_text(encoding="utf-8"))["cpu_seconds"]


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
    curves = {name: Path(job["output_dir"]) / "logs" / "metrics.csv" for name, job in jobs.items()}
    plot_losses({name: file for name, file in curves.items() if name != BASE}, folder / "losses.png")
    baseline = "LoRA" if "LoRA" in jobs else next(iter(jobs))
    print(report_comparison(results, folder, baseline=baseline, seed=options.seed), end="\n\n")
    figures = figures_of(found)
    for name, arm in found.items():
        figures[name] |= {"dev_loss": arm["dev_loss"], "steps": arm["steps"]}
    setup = {name: value for name, value in vars(options).items() if name not in ("record", "output_dir", "seed")}
    record("real_base", {"setup": setup, "arms": figures}, seed=options.seed, keep=options.record)


if __name__ == "__main__":
    main()
