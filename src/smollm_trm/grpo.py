"""`train_grpo`: a saved model gets better at what is graded, its answers, by sampling them.

It stands above `training` and `evaluation`, as `train_gsm8k` does: the dev part is answered before and after.
"""

import csv
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from smollm_trm.evaluation.arms import report_comparison
from smollm_trm.evaluation.evaluate import SPARE_TOKENS, evaluate_gsm8k, longest_completion
from smollm_trm.evaluation.plots import plot_rewards
from smollm_trm.evaluation.predictions import model_fingerprint
from smollm_trm.finetune import exported_files, is_exported
from smollm_trm.models.loading import device_and_precision
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.storage import saved_model_folder
from smollm_trm.records import UserMistake, picked, run_record, settings_from, write_json, write_whole
from smollm_trm.training.checkpoints import only_run_in
from smollm_trm.training.grpo_settings import GRPOSettings
from smollm_trm.training.grpo_trainer import choose_trained, fit_grpo, grpo_damage_of
from smollm_trm.training.parts import Rows, gather_splits, pick_precision
from smollm_trm.training.run import Run, begin_run

grpo_log = logging.getLogger(__name__)

MAY_CHANGE_IN_GRPO = (
    *("model", "resume", "progress", "output_dir", "data_dir", "wandb_project", "save_every_n_steps"),
    *("gradient_checkpointing", "split_seed"),
)


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
        UserMistake: a setting that cannot be, problems of another split, or a reward that is the same for all samples.
    """
    settings = settings_from(GRPOSettings, {"model": model, **config}, "train_grpo")
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
    folder = Path(settings.output_dir)
    shared = picked(settings, "resume", "seed", "progress")
    run = Run(folder=folder, wandb=(settings.wandb_project, None), **shared)
    noted = {**asdict(settings), "split": split["fingerprint"], "start": model_fingerprint(model)}
    checkpoint = begin_run(run, noted, may_change=MAY_CHANGE_IN_GRPO, damage_of=grpo_damage_of).checkpoint
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
    fit_grpo(settings, run, model, train, checkpoint=checkpoint, max_new_tokens=limit, precision=precision)
    after = evaluate_gsm8k(model, dev, predictions_path=folder / "evaluation" / "after.jsonl", **asked)
    steps = list(csv.DictReader((folder / "logs" / "metrics.csv").read_text(encoding="utf-8").splitlines()))
    plot_rewards(steps, folder / "rewards.png")
    compared = report_comparison({"before": before, "after": after}, folder, baseline="before", split=split)
    kept = ("accuracy", "interval", "correct", "total")
    before, after = ({name: result[name] for name in kept} for result in (before, after))
    figures = {
        "before": before,
        "after": after,
        "difference": asdict(compared.arms[1].against_baseline),
        "train": settings.train,
        "optimizer_steps": settings.max_steps,
        "samples": settings.max_steps * settings.samples_per_step,
        "seconds": round(sum(float(step["step_time"]) for step in steps), 1),
        "train_rows": len(train),
        "split": split,
    }
    notes = model.config.notes
    counts = {"train_rows": len(train), "optimizer_steps": settings.max_steps}
    notes |= {"training": {**counts, **notes.get("training", {}), "dev_loss": None, "split": split}, "grpo": figures}
    notes["evaluations"] = {f"dev-first-{len(dev)}": {**after, "source": split["source"]}}
    write_whole(folder / "model", model.save_pretrained)
    figures = {**figures, "settings": asdict(settings), **device_and_precision(model)}
    write_json(folder / "results.json", {**figures, "model_files": exported_files(folder), **run_record()})
    return model, figures
