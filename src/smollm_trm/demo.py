"""The main job in miniature, on a laptop's CPU: everything that happens to SmolLM3-3B happens to its tiny twin.

word problems as GSM8K files -> a tiny base trained from scratch, writing its chain
  -> from that base, answering at once, side by side: LoRA only, and the TRM, then LoRA + TRM, in as many steps together
  -> the same held-out problems
  -> table, plots, a saved model, a reloaded one that answers
"""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smollm_trm.data.gsm8k import load_gsm8k
from smollm_trm.data.word_problems import write_word_problems
from smollm_trm.data.word_stories import WordProblemSettings
from smollm_trm.evaluation.arms import evaluate_arm, report_comparison
from smollm_trm.evaluation.compare import Comparison
from smollm_trm.evaluation.plots import plot_losses
from smollm_trm.finetune import train_gsm8k
from smollm_trm.models.smollm import SmolLMv3WithTRM

DEMO_ARMS: dict[str, dict[str, Any]] = {
    "LoRA": {"use_trm": False, "learning_rate": 3e-3},
    "LoRA + TRM": {
        "learning_rate": 2e-3,
        "trm_learning_rate": 3e-3,
        "warmup_fraction": 0.3,  # or the latents become the same for all problems, on some seeds for good
        "trm_kwargs": {"n_latent_steps": 2, "n_deep_recursions": 1, "n_supervision_steps": 1, "soft_words": True},
    },
}
"""Each at the best learning rates of a small grid (docs/log.md)."""


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much the demo does; the defaults take at most four minutes on two cores."""

    problems: WordProblemSettings = WordProblemSettings(max_steps=2, max_number=10, max_value=30, distractor_rate=0.0)
    train_problems: int = 46_000  # before the 20% dev part is taken
    test_problems: int = 2000  # held out; the arms answer all of them
    base_problems: int = 500  # of them, those that the base answers with its chain
    base_steps: int = 1100  # training steps of the base from scratch
    arm_steps: int = 900  # training steps of LoRA only; half of them of the TRM alone, and half of LoRA + TRM
    batch_size: int = 32  # rows per step
    num_latents: int = 8  # M


def run_demo(
    *, output_dir: str = "outputs/demo", seed: int = 0, progress: bool = True, size: DemoSize | None = None
) -> Comparison:
    """Run it all, print the table, and leave everything in `output_dir`; run again, it goes on where it stopped."""
    size, folder = size or DemoSize(), Path(output_dir)
    data = folder / "data"
    write_word_problems(data, train=size.train_problems, test=size.test_problems, seed=seed, settings=size.problems)
    held_out = load_gsm8k(data, seed=seed).gsm8k_final_test
    print(f"1/3  a base from scratch: {size.base_steps} steps on {size.train_problems} word problems")
    train_gsm8k(**demo_base_settings(folder, size, seed=seed), progress=progress)
    print(f"2/3  LoRA and LoRA + TRM side by side, answering at once: {size.arm_steps} steps each")
    arms = demo_arm_settings(folder, size, seed=seed)
    arms["LoRA + TRM"]["progress"] = progress
    results = arms_side_by_side(folder, arms, held_out)
    base = SmolLMv3WithTRM.from_pretrained(folder / "base")
    [chain] = evaluate_arm("base, writing its chain", base, held_out[: size.base_problems], folder / "predictions",
                         batch_size=128, progress=progress).values()  # fmt: skip
    print(f"3/3  {len(held_out)} held-out problems for every arm")
    curves = {name: folder / run_name(name) / "logs" / "metrics.csv" for name in DEMO_ARMS}
    plot_losses(curves, folder / "losses.png")
    comparison = report_comparison(results, folder, baseline="LoRA", seed=seed)
    print(comparison)
    low, high = chain["interval"]
    print(f"base, writing its chain: {chain['accuracy']:.1%} [{low:.1%}, {high:.1%}] of {chain['total']} problems")
    ask_reloaded(folder / run_name("LoRA + TRM") / "model", held_out[0])
    print(f"plots: {folder / 'comparison.png'}, {folder / 'losses.png'}")
    return comparison


def demo_settings(data: Path, size: DemoSize, *, seed: int) -> dict[str, Any]:
    """Settings that all runs of the demo share, on the word problems in a folder."""
    return {
        "data_dir": str(data), "batch_size": size.batch_size, "eval_batch_size": 128, "max_dev_samples": 512,
        "accumulate_grad_batches": 1, "num_epochs": 1000, "patience": None, "seed": seed, "split_seed": seed,
    }  # fmt: skip


def demo_base_settings(folder: Path, size: DemoSize, *, seed: int) -> dict[str, Any]:
    """Settings of the base, trained whole on its chain: problems in `data`, the run in `base`."""
    run = {"model_name": "tiny", "base_training": "full", "use_trm": False, "learning_rate": 4e-3}
    shared = demo_settings(folder / "data", size, seed=seed) | length_of(size.base_steps, size.batch_size)
    return {**shared, **run, "output_dir": str(folder / "base")}


def demo_arm_settings(folder: Path, size: DemoSize, *, seed: int) -> dict[str, dict[str, Any]]:
    """Settings of every arm on that base, without its folder; all make as many steps."""
    common = demo_settings(folder / "data", size, seed=seed) | {
        "model_name": str(folder / "base" / "model"), "target": "answer", "num_latents": size.num_latents,
        "lora_kwargs": {"dropout": 0.0}, "progress": False,  # of so small a model nothing can be spared
    }  # fmt: skip
    alone = size.arm_steps // 2
    own = {
        "LoRA": length_of(size.arm_steps, size.batch_size),
        "LoRA + TRM": length_of(size.arm_steps - alone, size.batch_size) | {"reasoner_steps": alone},
    }
    return {name: {**common, **DEMO_ARMS[name], **own[name]} for name in DEMO_ARMS}


def length_of(steps: int, batch_size: int) -> dict[str, int]:
    """Settings of a run of so many steps with two validations, on no more rows than it reads."""
    half = max(1, steps // 2)
    often = {"val_check_interval": half, "save_every_n_steps": half}
    return {"max_steps": steps, "max_samples": steps * batch_size, **often}


def run_name(arm: str) -> str:
    return arm.lower().replace(" + ", "_")


def arms_side_by_side(folder: Path, arms: dict[str, dict[str, Any]], rows: list[dict]) -> dict[str, dict]:
    """Train and evaluate the arms, a process and a core each."""
    with processes(len(arms), threads=max(1, (os.cpu_count() or 1) // len(arms))) as pool:
        running = [pool.submit(train_and_evaluate_arm, name, folder, arms[name], rows) for name in arms]
        return {name: result for arm in running for name, result in arm.result().items()}


def processes(count: int, *, threads: int = 1) -> ProcessPoolExecutor:
    """Processes of so many threads each, which end with this one."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, mp_context=spawn, initializer=end_with_parent)


def end_with_parent() -> None:
    """Stop this process when the one that began it is gone, killed too."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def train_and_evaluate_arm(name: str, folder: Path, settings: dict[str, Any], rows: list[dict]) -> dict[str, dict]:
    """One arm from training to its graded answers, latents shuffled included."""
    _, module = train_gsm8k(**settings, output_dir=str(folder / run_name(name)))
    return evaluate_arm(name, module.model, rows, folder / "predictions", batch_size=128, progress=False)


def ask_reloaded(folder: Path, row: dict[str, str]) -> None:
    """Load the saved model as a stranger would, and let it answer."""
    model = SmolLMv3WithTRM.from_pretrained(folder)
    print(f"\nfrom {folder}:\n  {row['question']}\n  {model.generate_with_thinking(row['question']).strip()}")
    print(f"  (right: {row['answer'].rsplit('#### ', 1)[-1]})")
