"""The main job in miniature, on a laptop's CPU: everything that happens to SmolLM3-3B happens to its tiny twin.

word problems as GSM8K files -> a tiny base trained from scratch, writing its chain
  -> from that base, answering at once: LoRA only, and LoRA + TRM -> the same held-out problems for every arm
  -> table, plots, a saved model, a reloaded one that answers
"""

from dataclasses import dataclass, field
from pathlib import Path

from smollm_trm.data.gsm8k import load_gsm8k
from smollm_trm.data.word_problems import write_word_problems
from smollm_trm.data.word_stories import WordProblemSettings
from smollm_trm.evaluation.arms import evaluate_arm, report_comparison
from smollm_trm.evaluation.compare import Comparison
from smollm_trm.evaluation.plots import plot_losses
from smollm_trm.finetune import train_gsm8k
from smollm_trm.models.smollm import SmolLMv3WithTRM


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much the demo does; the defaults take under five minutes on two cores."""

    problems: WordProblemSettings = field(
        default_factory=lambda: WordProblemSettings(max_steps=2, max_number=10, max_value=30, distractor_rate=0.0)
    )
    """How hard the problems are."""
    train_problems: int = 60_000
    """Problems to train on, before the 20% dev part is taken."""
    test_problems: int = 500
    """Held-out problems that every arm answers."""
    base_steps: int = 1500
    """Training steps of the base from scratch."""
    arm_steps: int = 700
    """Training steps of LoRA only and of LoRA + TRM."""
    batch_size: int = 32
    """Rows per step."""
    num_latents: int = 8
    """M."""


def run_demo(
    *, output_dir: str = "outputs/demo", seed: int = 0, progress: bool = True, size: DemoSize | None = None
) -> Comparison:
    """Run it all, print the table, and leave everything in `output_dir`.

    Args:
        output_dir: data, runs, predictions, plots and models go here; run again, it goes on where it stopped.
        seed: fixes every figure.
        progress: show progress bars.
        size: how much to do.
    """
    size = size or DemoSize()
    folder = Path(output_dir)
    data = folder / "data"
    write_word_problems(data, train=size.train_problems, test=size.test_problems, seed=seed, settings=size.problems)
    held_out = load_gsm8k(data, seed=seed).gsm8k_final_test
    common = {
        "data_dir": str(data),
        "batch_size": size.batch_size,
        "eval_batch_size": 128,
        "max_dev_samples": 512,
        "accumulate_grad_batches": 1,
        "num_epochs": 1000,
        "patience": None,
        "seed": seed,
        "split_seed": seed,
        "progress": progress,
        "num_latents": size.num_latents,
        "lora_kwargs": {"dropout": 0.0},  # of so small a model nothing can be spared
        "trm_kwargs": {"n_latent_steps": 2, "n_deep_recursions": 1, "n_supervision_steps": 1},  # few steps, few calls
    }
    print(f"1/4  a base from scratch: {size.base_steps} steps on {size.train_problems} word problems")
    train_gsm8k(
        **common,
        model_name="tiny",
        base_training="full",
        use_trm=False,
        learning_rate=4e-3,
        max_steps=size.base_steps,
        val_check_interval=size.base_steps // 2,
        save_every_n_steps=size.base_steps // 2,
        output_dir=str(folder / "base"),
    )
    arms = {"LoRA": False, "LoRA + TRM": True}
    for number, (name, use_trm) in enumerate(arms.items(), start=2):
        print(f"{number}/4  {name}, answering at once: {size.arm_steps} steps")
        train_gsm8k(
            **common,
            model_name=str(folder / "base" / "model"),
            use_trm=use_trm,
            target="answer",
            learning_rate=1e-3,
            trm_learning_rate=3e-3,
            max_steps=size.arm_steps,
            val_check_interval=size.arm_steps // 2,
            save_every_n_steps=size.arm_steps // 2,
            output_dir=str(folder / run_name(name)),
        )
    print(f"4/4  {len(held_out)} held-out problems for every arm")
    comparison = compare_demo_arms(folder, ["base", *arms], held_out, seed=seed, progress=progress)
    print(comparison)
    ask_reloaded(folder / run_name("LoRA + TRM") / "model", held_out[0])
    print(f"plots: {folder / 'comparison.png'}, {folder / 'losses.png'}")
    return comparison


def run_name(arm: str) -> str:
    """An arm's folder."""
    return arm.lower().replace(" + ", "_")


def compare_demo_arms(
    folder: Path, arms: list[str], held_out: list[dict[str, str]], *, seed: int, progress: bool
) -> Comparison:
    """Every arm on the same problems, with table and plots."""
    results: dict[str, dict] = {}
    for name in arms:
        model = SmolLMv3WithTRM.from_pretrained(folder / run_name(name) / "model")
        label = "base, writing its chain" if name == "base" else name
        results |= evaluate_arm(label, model, held_out, folder / "predictions", batch_size=128, progress=progress)
    curves = {name: folder / run_name(name) / "logs" / "metrics.csv" for name in arms if name != "base"}
    plot_losses(curves, folder / "losses.png")
    return report_comparison(results, folder, baseline="LoRA", seed=seed)


def ask_reloaded(folder: Path, row: dict[str, str]) -> None:
    """Load the saved model as a stranger would, and let it answer."""
    model = SmolLMv3WithTRM.from_pretrained(folder)
    print(f"\nfrom {folder}:\n  {row['question']}\n  {model.generate_with_thinking(row['question']).strip()}")
    print(f"  (right: {row['answer'].rsplit('#### ', 1)[-1]})")
