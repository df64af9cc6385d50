"""`train_grpo`: a saved model gets better at what is graded, its answers, by sampling them.

It stands above `training` and `evaluation`, as `train_gsm8k` does: the dev part is answered before and after.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from smollm_trm.evaluation.arms import report_comparison
from smollm_trm.evaluation.evaluate import SPARE_TOKENS, evaluate_gsm8k, longest_completion
from smollm_trm.evaluation.plots import plot_rewards
from smollm_trm.evaluation.predictions import model_fingerprint
from smollm_trm.finetune import exported_sizes, is_exported
from smollm_trm.models.loading import device_and_precision
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.storage import saved_model_folder
from smollm_trm.records import UserMistake, run_record, settings_from, write_json, write_whole
from smollm_trm.training.checkpoints import only_run_in
from smollm_trm.training.optim import OptimizerSettings
from smollm_trm.training.parts import Rows, gather_splits, pick_precision
from smollm_trm.training.run import Run, begin_run

grpo_log = logging.getLogger(__name__)

MAY_CHANGE_IN_GRPO = (
    *("model", "resume", "progress", "output_dir", "data_dir", "wandb_project", "save_every_n_steps"),
    *("gradient_checkpointing", "split_seed"),
)


@dataclass(frozen=True)
class GRPOSettings:
    """Settings of `train_grpo` and of `smollm-trm grpo`."""

    model: str
    """Folder of a saved model or of a training run, or its name on the Hub."""
    train: str = "both"
    """What is trained: "reasoner", "lora" or "both"; the base stays as it is."""
    data_dir: str | None = None
    """Folder with GSM8K's train.jsonl and test.jsonl; without it the variable GSM8K_DIR, then the Hub."""
    dataset_path: str | None = None
    """Own data instead of GSM8K; 80% is trained on, the rest is dev."""
    dev_path: str | None = None
    """A file of its own for the dev part of dataset_path, all of which is trained on then."""
    split_seed: int | None = None
    """Of the split into train and dev; None takes the one that the model was trained with."""
    max_steps: int = 200
    """Optimizer steps."""
    problems_per_step: int = 16
    """Problems whose answers are sampled for a step."""
    samples_per_problem: int = 8
    """Answers to each: the group that a reward is compared with."""
    batch_size: int = 32
    """Samples per forward and backward pass, a divisor of all samples of a step; dev problems answered at once."""
    temperature: float = 1.0
    """Of the sampling."""
    open_next_at: float = 0.3
    """Success rate of the hardest problems so far at which those with one more step join; 0 opens all at once."""
    constant_limit: int = 10
    """Steps in a row whose samples all have the same reward, after which the run ends."""
    learning_rate: float = 2e-5
    """Peak learning rate of the adapter."""
    trm_learning_rate: float | None = None
    """Peak learning rate of the reasoner; None takes five times learning_rate."""
    warmup_fraction: float = 0.05
    """Share of the run in which the learning rates climb to their peak."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    gradient_checkpointing: bool = False
    """Keep no activations of the base: less memory, about a third more time."""
    precision: str = "auto"
    """"auto" (by the device), "fp32", "bf16" or "fp16"."""
    max_dev_samples: int | None = 1000
    """Dev problems answered before and after; None for all."""
    save_every_n_steps: int = 25
    """Optimizer steps between checkpoints."""
    output_dir: str = "outputs/grpo"
    """Checkpoints, logs, results and the model go here."""
    resume: str = "auto"
    """"auto" goes on from the newest good checkpoint, "never" starts anew; or a checkpoint."""
    wandb_project: str | None = None
    """Weights & Biases project; used only where WANDB_API_KEY is set."""
    seed: int = 42
    """Of the problems drawn and the sampling."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        counts = ("max_steps", "problems_per_step", "samples_per_problem", "batch_size", "max_dev_samples",
                  "constant_limit", "save_every_n_steps")  # fmt: skip
        for name in counts:
            least = 2 if name == "samples_per_problem" else 1
            if (value := getattr(self, name)) is not None and value < least:
                raise UserMistake(f"{name}={value}: must be at least {least}")
        if self.train not in ("reasoner", "lora", "both"):
            raise UserMistake(f"train={self.train!r}: choose one of reasoner, lora, both")
        if self.samples_per_step % self.batch_size and self.samples_per_step > self.batch_size:
            raise UserMistake(
                f"batch_size={self.batch_size}: must divide the {self.samples_per_step} samples of a step"
            )
        if not self.temperature > 0 or not self.gradient_clip > 0:
            raise UserMistake(f"temperature={self.temperature}, gradient_clip={self.gradient_clip}: must be above 0")
        if not 0 <= self.open_next_at <= 1:
            raise UserMistake(f"open_next_at={self.open_next_at}: must be between 0 and 1")
        if not self.output_dir.strip():
            raise UserMistake("output_dir: it is empty; name a folder")
        self.optimizer_settings()

    @property
    def samples_per_step(self) -> int:
        """Answers sampled for a step."""
        return self.problems_per_step * self.samples_per_problem

    def optimizer_settings(self) -> OptimizerSettings:
        """The optimizer's part."""
        names = ("learning_rate", "trm_learning_rate", "warmup_fraction")
        return OptimizerSettings(weight_decay=0.0, **{name: getattr(self, name) for name in names})


def train_grpo(
    model: str | Path, *, train_dataset: Rows | None = None, test_dataset: Rows | None = None, **config: Any
) -> tuple[SmolLMv3WithTRM, dict[str, Any]]:
    """Train a saved model on the grades of its own sampled answers, by TRL's `GRPOTrainer`.

        model, results = train_grpo("outputs/run", train="both", max_steps=200)

    Args:
        model: see `GRPOSettings.model`; it stays as it is.
        train_dataset: rows `{question, answer}` to sample answers for, in place of GSM8K.
        test_dataset: the dev part, answered before and after.
        config: fields of `GRPOSettings`.

    Returns:
        The trained model, which lies in `output_dir/model` too, and what `output_dir/results.json` holds: `before`,
        `after` and their paired `difference` among it.

    Raises:
        UserMistake: a setting that cannot be, TRL not installed, or a reward that is the same for all samples.
    """
    settings = settings_from(GRPOSettings, {"model": model, **config}, "train_grpo")
    if find_spec("trl") is None:
        raise UserMistake("grpo needs TRL, which is not installed: pip install 'smollm-trm[grpo]'")
    place = saved_model_folder(settings.model)
    precision, dtype = pick_precision(settings.precision)
    with only_run_in(Path(settings.output_dir)):
        started = SmolLMv3WithTRM.from_pretrained(place, dtype=dtype)
        train, dev, split = grpo_problems(settings, started, train_dataset, test_dataset)
        return run_grpo(settings, started, train, dev[: settings.max_dev_samples], split=split, precision=precision)


def grpo_problems(
    settings: GRPOSettings, model: SmolLMv3WithTRM, train_dataset: Rows | None, test_dataset: Rows | None
) -> tuple[list[dict], list[dict], dict[str, Any]]:
    """Training and dev problems and what they are of, split as they were when the model was trained."""
    earlier = model.config.notes.get("training", {}).get("split") or {}
    seed = settings.split_seed if settings.split_seed is not None else earlier.get("seed", 42)
    splits = gather_splits(replace(settings, split_seed=seed), train_dataset, test_dataset)
    own_dev = settings.dev_path is not None or test_dataset is not None
    if earlier and not own_dev and earlier.get("fingerprint") != splits.fingerprint:
        raise UserMistake(
            f"{settings.model} was trained on {earlier.get('source')} with split seed {earlier.get('seed')}: this dev "
            "part may hold its training problems; give the same data, or dev_path with problems it has not seen"
        )
    return splits.gsm8k_train, splits.gsm8k_test, splits.summary


def run_grpo(
    settings: GRPOSettings,
    model: SmolLMv3WithTRM,
    train: Sequence[Mapping[str, str]],
    dev: Sequence[Mapping[str, str]],
    *,
    split: dict[str, Any],
    precision: str,
) -> tuple[SmolLMv3WithTRM, dict[str, Any]]:
    """See `train_grpo`: answer, train, answer, save."""
    from smollm_trm.training.grpo_trainer import choose_trained, fit_grpo, grpo_damage_of

    folder = Path(settings.output_dir)
    shared = {name: getattr(settings, name) for name in ("resume", "seed", "progress")}
    run = Run(folder=folder, wandb=(settings.wandb_project, None), **shared)
    noted = {**asdict(settings), "split": split["fingerprint"], "start": model_fingerprint(model)}
    checkpoint = begin_run(run, noted, may_change=MAY_CHANGE_IN_GRPO, damage_of=grpo_damage_of)
    if settings.resume != "never" and is_exported(folder):
        grpo_log.warning("%s: this run has ended; nothing was trained", folder)
        ended = SmolLMv3WithTRM.from_pretrained(folder, dtype=model.dtype)
        return ended, json.loads((folder / "results.json").read_text(encoding="utf-8"))
    choose_trained(model, settings.train, settings.model)
    limit = longest_completion(model, dev) + SPARE_TOKENS
    asked = {"batch_size": settings.batch_size, "max_new_tokens": limit, "progress": settings.progress}
    asked["overwrite"] = settings.resume == "never"
    before = evaluate_gsm8k(model, dev, predictions_path=folder / "evaluation" / "before.jsonl", **asked)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grpo_log.info(f"training {sum(p.numel() for p in parameters):,} parameters ({settings.train}) on {len(train):,} "
                  f"problems, {settings.samples_per_step} samples a step, into {folder}")  # fmt: skip
    seconds = fit_grpo(settings, run, model, train, checkpoint=checkpoint, max_new_tokens=limit, precision=precision)
    after = evaluate_gsm8k(model, dev, predictions_path=folder / "evaluation" / "after.jsonl", **asked)
    plot_rewards(folder / "logs" / "metrics.csv", folder / "rewards.png")
    compared = report_comparison({"before": before, "after": after}, folder, baseline="before", split=split)
    kept = ("accuracy", "interval", "correct", "total")
    before, after = ({name: result[name] for name in kept} for result in (before, after))
    figures = {
        **{"before": before, "after": after, "difference": asdict(compared.arms[1].against_baseline)},
        **{"train": settings.train, "optimizer_steps": settings.max_steps, "seconds": round(seconds, 1)},
        **{"samples": settings.max_steps * settings.samples_per_step, "train_rows": len(train), "split": split},
    }
    notes = model.config.notes
    counts = {"train_rows": len(train), "optimizer_steps": settings.max_steps}
    notes |= {"training": {**counts, **notes.get("training", {}), "dev_loss": None, "split": split}, "grpo": figures}
    notes["evaluations"] = {f"dev-first-{len(dev)}": {**after, "source": split["source"]}}
    write_whole(folder / "model", model.save_pretrained)
    figures = {**figures, "settings": asdict(settings), **device_and_precision(model)}
    write_json(folder / "results.json", {**figures, "model_files": exported_sizes(folder), **run_record()})
    return model, figures
