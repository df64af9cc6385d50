"""The real thing, end to end, on a real pretrained base and the real GSM8K: `make real`, ten minutes on two cores.

    python benchmarks/real.py [--steps 24] [--problems 24] [--record]

SmolLM2-135M-Instruct as it is, asked in its own way (plain and by its chat template); then LoRA and LoRA + TRM, trained
side by side for some dozens of steps to answer at once; compared on the same dev problems, saved, loaded again, asked.
So few steps teach the way, not the reasoning: the table says how sure it is.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from _record import benchmark_options, record
from _smollm2 import CHECKOUT, real_gsm8k, smollm2_folder

from smollm_trm.data.gsm8k import load_gsm8k
from smollm_trm.evaluation.arms import evaluate_arm, report_comparison
from smollm_trm.evaluation.loading import load_for_evaluation
from smollm_trm.models.smollm import SmolLMv3WithTRM

QUESTION = "Tom has 3 bags of 4 apples. He eats 2. How many are left?"
OUTPUTS = CHECKOUT / "outputs" / "real"
ARMS = {"LoRA": ["--use_trm", "false"], "LoRA + TRM": ["--num_latents", "16", "--trm_learning_rate", "1e-3"]}


def train_side_by_side(base: Path, data: Path | None, *, steps: int) -> None:
    """Both arms by the command line, one core each."""
    common = [
        *("--model_name", str(base), "--target", "answer", "--max_steps", str(steps), "--batch_size", "8"),
        *("--accumulate_grad_batches", "1", "--learning_rate", "5e-4", "--max_dev_samples", "32"),
        *("--max_samples", "2000", "--save_every_n_steps", str(steps)),
    ]
    if data is not None:
        common += ["--data_dir", str(data)]
    running = []
    for name, options in ARMS.items():
        command = [sys.executable, "-m", "smollm_trm", "train", *common, *options]
        command += ["--output_dir", str(OUTPUTS / folder_name(name))]
        running.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}))
    if any([process.wait() for process in running]):
        raise SystemExit("training failed; its message stands above")


def folder_name(arm: str) -> str:
    """An arm's folder."""
    return arm.lower().replace(" + ", "_")


def main() -> None:
    """Run it all."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of each arm")
    parser.add_argument("--problems", type=int, default=24, help="dev problems that every arm answers")
    options = parser.parse_args()
    started = time.perf_counter()
    base, data = smollm2_folder(), real_gsm8k()
    dev = load_gsm8k(data).gsm8k_test[: options.problems]
    results: dict[str, dict] = {}
    for prompt_format in ("plain", "chat"):
        untuned = load_for_evaluation(str(base), prompt_format=prompt_format)
        print(f"\nuntuned base, {prompt_format}: {untuned.generate_with_thinking(QUESTION, max_new_tokens=64).strip()}")
        results |= evaluate_arm(f"base, {prompt_format}", untuned, dev, OUTPUTS / "predictions", max_new_tokens=128)
    print(f"\nLoRA and LoRA + TRM side by side, {options.steps} steps of 8 problems, answering at once")
    train_side_by_side(base, data, steps=options.steps)
    for name in ARMS:
        model = SmolLMv3WithTRM.from_pretrained(OUTPUTS / folder_name(name))
        results |= evaluate_arm(name, model, dev, OUTPUTS / "predictions")
    comparison = report_comparison(results, OUTPUTS, baseline="LoRA", part="dev")
    print(f"\n{comparison}\n")
    answer = model.generate_with_thinking(QUESTION)
    model.save_pretrained(OUTPUTS / "saved")
    again = SmolLMv3WithTRM.from_pretrained(OUTPUTS / "saved").generate_with_thinking(QUESTION)
    print(f"{QUESTION}\n  LoRA + TRM: {answer.strip()}\n  saved and loaded again: {again.strip()}")
    if again != answer:
        raise SystemExit("the reloaded model answers otherwise")
    minutes = (time.perf_counter() - started) / 60
    print(f"{minutes:.1f} minutes; everything is in {OUTPUTS.relative_to(CHECKOUT)}")
    figures = {
        "minutes": round(minutes, 1),
        "steps": options.steps,
        "n_problems": len(dev),
        "right": {name: result["correct"] for name, result in results.items()},
    }
    record("real", figures, seed=42, keep=options.record)


if __name__ == "__main__":
    main()
