"""YAML files of Coconut's published code, read as settings of ours: its keys are understood or refused by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from smollm_trm.records import UserMistake, first_line

RENAMED = {
    "model_id": "model_name",
    "lr": "learning_rate",
    "batch_size_training": "batch_size",
    "gradient_accumulation_steps": "accumulate_grad_batches",
    "train_path": "dataset_path",
    "val_path": "dev_path",
    "project": "wandb_project",
}
MODE_KEYS = ("coconut", "cot", "no_cot", "no_thoughts")
REFUSED = {
    "only_eval": "`smollm-trm evaluate FOLDER` evaluates",
    "debug": "set max_samples and max_dev_samples",
}
OTHERS = ("name", "save_path", "save_only_improve", "bf16")
"""`save_only_improve` needs no successor: the best checkpoint and the newest two are kept in any case."""
AS_THE_REFERENCE = {"prompt_format": "coconut", "base_training": "full", "ema_decay": 0.0}


def read_config_file(path: str) -> str:
    """A YAML file of settings, in our keys or the reference's, as YAML in ours."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(getattr(error, "problem", None) or getattr(error, "strerror", None) or error).split())
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else path
        raise UserMistake(f"{where}: not a YAML file that can be read ({first_line(ValueError(reason))})") from error
    if not isinstance(values, Mapping):
        raise UserMistake(f"{path}: expected settings, one `name: value` a line, found {type(values).__name__}")
    try:
        return yaml.safe_dump(own_settings(values))
    except UserMistake as error:
        raise UserMistake(f"{path}: {error}") from error


def own_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by our names; whoever writes none of the reference's keys gets back what was given."""
    given = dict(values)
    if not given.keys() & {*RENAMED, *MODE_KEYS, *REFUSED, *OTHERS}:
        return given
    for name, instead in REFUSED.items():
        if given.pop(name, False):
            raise UserMistake(f"{name}: true is not a setting of a run here: {instead}")
    for name, own in RENAMED.items():
        if name in given and own in given:
            raise UserMistake(f"{name} and {own} are one setting: leave one out")
        if name in given:
            given[own] = given.pop(name)
    given |= mode_settings({name: bool(given.pop(name)) for name in MODE_KEYS if name in given}, given)
    given.pop("save_only_improve", None)
    if (name := given.pop("name", None)) is not None:
        given = {"output_dir": f"{given.get('save_path', 'outputs')}/{name}", "wandb_name": name, **given}
    given.pop("save_path", None)
    if "bf16" in given:
        given = {"precision": "bf16-mixed" if given.pop("bf16") else "32-true", **given}
    if given.get("load_model_path") in ("None", ""):
        given["load_model_path"] = None
    if isinstance(skipped := given.get("resume"), int):
        given |= skipped_epochs(skipped, given)
    return given


def mode_settings(switches: Mapping[str, bool], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the reference's four switches mean; all of them off are pause tokens under the curriculum."""
    if not switches:
        return {}
    on = [name for name, value in switches.items() if value]
    if len(on) > 1:
        raise UserMistake(f"{' and '.join(on)} are both true: choose one of {', '.join(MODE_KEYS)}")
    mode = on[0] if on else "pause"
    steps = {"steps_from": "lines", "keep_annotations": True} if given.get("dataset_path") else {}
    chosen = {"mode": mode, "steps_from": "annotations", **AS_THE_REFERENCE, **steps}
    if mode in ("coconut", "pause"):
        chosen["reasoner"] = mode
    return {name: value for name, value in chosen.items() if name not in given}


def skipped_epochs(skipped: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """The reference's `resume: 3` leaves out the first 3 epochs, which an earlier run has made."""
    if skipped == 0:
        return {"resume": "auto"}
    if not given.get("load_model_path"):
        raise UserMistake(f"resume: {skipped} leaves out epochs of an earlier run: give its folder as load_model_path")
    stage, rest = divmod(skipped, given.get("epochs_per_stage", 3))
    if rest or skipped >= given.get("num_epochs", 3):
        raise UserMistake(f"resume: {skipped} must be a multiple of epochs_per_stage and less than num_epochs")
    return {"resume": "auto", "first_stage": stage, "num_epochs": given.get("num_epochs", 3) - skipped}
