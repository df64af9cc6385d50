"""Settings are checked by name; files are whole or not there."""

import errno
import json
import os
import re
import resource
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from smollm_trm.data.rows import write_jsonl
from smollm_trm.models.reasoners.trm import TRMSettings
from smollm_trm.records import (
    UserMistake,
    first_line,
    refuse_other_settings,
    remove_path,
    remove_unfinished,
    run_record,
    settings_from,
    write_json,
    write_whole,
)
from smollm_trm.training.checkpoints import WholeCheckpointIO
from smollm_trm.training.settings import TrainSettings


@dataclass(frozen=True)
class Shape:
    width: int = 1
    height: int = 2


# Settings


def test_settings_are_taken_by_name_and_an_unknown_one_names_the_nearest():
    assert (
        settings_from(Shape, {"height": 5}, "shape") == Shape(1, 5) and settings_from(Shape, None, "shape") == Shape()
    )
    with pytest.raises(UserMistake, match="^shape: unknown setting 'hieght'; did you mean 'height'\\?$"):
        settings_from(Shape, {"hieght": 5}, "shape")
    with pytest.raises(UserMistake, match="^shape: unknown setting 'q'; known are width, height$"):
        settings_from(Shape, {"q": 5}, "shape")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("n_layers", "two", "kwargs: n_layers='two' must be int, found str"),
        ("n_layers", True, "kwargs: n_layers=True must be int, found bool"),
        ("n_layers", 2.0, "kwargs: n_layers=2.0 must be int, found float"),
        ("n_layers", None, "kwargs: n_layers=None must be int, found NoneType"),
        ("dim", "wide", "kwargs: dim='wide' must be int | None, found str"),
        ("start", 1, "kwargs: start=1 must be str, found int"),
        ("start", "here", "start='here': choose one of question, fixed"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(name, value, message):
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        settings_from(TRMSettings, {name: value}, "kwargs")


def test_whole_numbers_count_as_fractions_and_paths_as_text():
    assert settings_from(TRMSettings, {"gain": 1, "dim": None, "branch_scale": None}, "kwargs").gain == 1
    given = {"output_dir": Path("a"), "patience": None, "trm_kwargs": {"dim": 8}, "val_check_interval": 2}
    assert settings_from(TrainSettings, given, "train").output_dir == "a"


def test_the_papers_values_are_a_preset_that_single_values_may_change():
    def reasoner_settings(**given) -> TRMSettings:
        return TRMSettings(**TrainSettings(trm_kwargs=given).model_config()["reasoner_settings"])

    paper = reasoner_settings(preset="paper", dim=64)
    assert (paper.n_latent_steps, paper.n_deep_recursions, paper.n_supervision_steps) == (6, 3, 16)
    assert (paper.branch_scale, paper.start, paper.dim) == (None, "fixed", 64)
    changed = reasoner_settings(n_latent_steps=2, preset="paper")
    assert (changed.n_latent_steps, changed.n_deep_recursions) == (2, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"patience": 0}, "patience=0: must be at least 1"),
        ({"gradient_clip": 0.0}, "gradient_clip=0.0: must be above 0"),
        ({"ema_decay": 1.0}, "ema_decay=1.0: must be at least 0 and below 1"),
        ({"ema_decay": -0.1}, "ema_decay=-0.1: must be at least 0 and below 1"),
        ({"trm_kwargs": {"n_heads": 0}}, "^n_heads=0: must be at least 1"),
        ({"trm_kwargs": {"compression_heads": 0}}, "^compression_heads=0: must be at least 1"),
        ({"trm_kwargs": {"dim": 0}}, "^dim=0: must be at least 1"),
        ({"trm_kwargs": {"preset": "papre"}}, "trm_kwargs: preset='papre': choose one of paper"),
        ({"max_steps": 0}, "max_steps=0: must be at least 1, or -1"),
        ({"num_latents": -1}, "num_latents=-1: .* use_trm=False"),
        ({"val_check_interval": 0.0}, "val_check_interval=0.0: must be above 0"),
        ({"precision": "half"}, "precision='half': choose one of auto, fp32, bf16, fp16"),
        ({"learning_rate": 2.0}, "learning_rate=2.0: must be above 0 and below 1"),
        ({"trm_kwargs": {"n_layer": 2}}, "trm_kwargs: unknown setting 'n_layer'; did you mean 'n_layers'"),
        ({"lora_kwargs": {"r": 0}}, "lora r=0"),
        ({"lora_kwargs": {"alpha": -1}}, "lora alpha=-1: must be at least 1"),
        ({"strategy": "fsdp"}, "strategy='fsdp': it cuts weights into parts; choose 'ddp'"),
        ({"strategy": "deepspeed_stage_2"}, "strategy='deepspeed_stage_2': it cuts"),
        ({"max_samples": 0}, "max_samples=0"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        TrainSettings(**settings)
    assert "\n" not in str(caught.value)


def test_a_run_begun_with_other_settings_is_refused_by_the_first_difference(tmp_path):
    path = tmp_path / "run" / "settings.json"
    refuse_other_settings(path, {"a": 1}, ignored=())
    write_json(path, {"a": 1, "b": (2, 3), "old": 0})
    refuse_other_settings(path, {"a": 1, "b": (2, 3), "new": 0}, ignored=())
    refuse_other_settings(path, {"a": 9}, ignored=("a",))
    with pytest.raises(UserMistake, match="holds a run with b=\\[2, 3\\], now it is \\[2, 4\\]: .*resume='never'"):
        refuse_other_settings(path, {"a": 1, "b": (2, 4)}, ignored=())
    path.write_text("{")
    with pytest.raises(UserMistake, match="settings.json is damaged: choose another output_dir, or resume='never'"):
        refuse_other_settings(path, {"a": 1}, ignored=())


def test_a_run_records_what_made_it():
    record = run_record()
    assert {"python", "torch", "transformers", "peft", "pytorch-lightning"} <= record["versions"].keys()
    assert record["machine"]["cores"] and record["command"] and json.dumps(record)


def test_the_recorded_command_holds_no_local_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = f"{tmp_path}-home/me"
    monkeypatch.setenv("HOME", home)
    arguments = [
        "evaluate", f"{tmp_path}/runs/one", f"--data_dir={tmp_path}-data/gsm8k", "--output_dir", f"{home}/out",
        f'--models={{"a": "{tmp_path}", "b": "{home}else/b", "c": "me/model"}}', "--target", "answer",
        "What is 6/2 and 6 / 2? See https://huggingface.co/me/model",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [f"{home}/bin/smollm-trm", *arguments])
    assert run_record()["command"] == (
        "smollm-trm evaluate ./runs/one --data_dir=gsm8k --output_dir ~/out "
        """'--models={"a": "./", "b": "b", "c": "me/model"}' --target answer """
        "'What is 6/2 and 6 / 2? See https://huggingface.co/me/model'"
    )


@pytest.mark.parametrize(
    ("program", "begins"),
    [
        ("{}/.venv/bin/smollm-trm", ["smollm-trm"]),
        ("{}/src/smollm_trm/__main__.py", ["python", "-m", "smollm_trm"]),
        ("benchmarks/real.py", ["python", "benchmarks/real.py"]),
    ],
)
def test_the_recorded_command_can_be_pasted(program, begins, monkeypatch, tmp_path):
    given = ["train", "--trm_kwargs", '{"dim": 8}', "--data_dir", "it's here", "$HOME; true", "--output_dir=a\nb"]
    monkeypatch.setattr(sys, "argv", [program.format(tmp_path), *given])
    assert shlex.split(run_record()["command"]) == [*begins, *given]


# Files

WRITERS = {
    "json": lambda path: write_json(path, {"text": "x" * 100_000}),
    "jsonl": lambda path: write_jsonl(path, [{"text": "x" * 100_000}]),
    "checkpoint": lambda path: WholeCheckpointIO().save_checkpoint({"weights": torch.zeros(25_000)}, path),
}


@pytest.fixture
def little_space():
    """The system refuses to let any file grow beyond 50,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path, kind, little_space):
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_text("old")
    with pytest.raises(OSError, match=f"^could not write {path}: .*; free some disk space or choose another") as caught:
        WRITERS[kind](path)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_where_the_folder_should_be_is_one_clear_line(tmp_path, kind):
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(OSError, match="^could not write .*choose another output folder$"):
        WRITERS[kind](tmp_path / "folder" / "file")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("kind", WRITERS)
def test_folders_are_made_and_the_whole_file_replaces_the_old_one(tmp_path, kind):
    path = tmp_path / "a" / "b" / "file"
    for _ in range(2):
        WRITERS[kind](path)
        assert path.stat().st_size > 99_000 and os.listdir(path.parent) == ["file"]


def test_a_folder_is_replaced_whole_or_stays(tmp_path, little_space):
    def write(folder: Path, size: int) -> None:
        folder.mkdir()
        (folder / "small").write_text("new")
        save_file({"weights": torch.zeros(size)}, folder / "weights")

    path = tmp_path / "model"
    write_whole(path, lambda temporary: write(temporary, 10))
    (path / "stale").write_text("old")
    with pytest.raises(OSError, match=f"^could not write {path}: .*free some disk space") as caught:
        write_whole(path, lambda temporary: write(temporary, 100_000))
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == ["model"]
    assert sorted(os.listdir(path)) == ["small", "stale", "weights"]
    write_whole(path, lambda temporary: write(temporary, 10))
    assert sorted(os.listdir(path)) == ["small", "weights"]


def test_a_reader_never_sees_a_part(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("ne")
        assert path.read_text() == "old" and temporary.parent == path.parent
        temporary.write_text("new")

    write_whole(path, write)
    assert path.read_text() == "new"


def test_an_error_that_is_not_the_disks_is_passed_on_and_leaves_nothing(tmp_path):
    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        write_whole(tmp_path / "file", fail)
    assert os.listdir(tmp_path) == []


def test_the_reason_is_the_systems(tmp_path):
    def fill(temporary: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))

    with pytest.raises(OSError, match="file: No space left on device; free"):
        write_whole(tmp_path / "file", fill)


def test_what_a_killed_process_left_is_removed(tmp_path):
    write_json(tmp_path / "kept.json", {})
    (tmp_path / ".step-3.ckpt.77.part").write_text("half")
    (tmp_path / ".model.77.part").mkdir()
    (tmp_path / ".model.77.part" / "weights").write_text("half")
    remove_unfinished(tmp_path)
    assert os.listdir(tmp_path) == ["kept.json"]
    remove_unfinished(tmp_path / "nowhere")


def test_a_removed_file_is_emptied_first_and_what_a_link_names_is_not(tmp_path, monkeypatch):
    for name in ("file", "target"):
        (tmp_path / name).write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    sizes, unlink = [], Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path: sizes.append(path.stat().st_size) or unlink(path))
    for name in ("file", "link", "nothing"):
        remove_path(tmp_path / name)
    assert sizes[0] == 0 and os.listdir(tmp_path) == ["target"] and (tmp_path / "target").read_bytes() == b"12345"


@pytest.mark.parametrize(("message", "line"), [(" one\ntwo", "one"), ("", "ValueError"), ("\n", "ValueError")])
def test_an_error_is_named_by_its_first_line_or_its_kind(message, line):
    assert first_line(ValueError(message)) == line
