"""A run, whatever model it trains: here a line of three numbers."""

import csv
import io
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from smollm_trm.data.datamodule import ResumableLoader
from smollm_trm.records import AboveBars
from smollm_trm.training.loggers import quiet_lightning
from smollm_trm.training.run import Run, begin_run, build_run_trainer, fit_run, load_average
from smollm_trm.training.text_log import training_log

BATCHES = 10


class Points(list):
    """Rows that come as batches, as `ResumableLoader` wants them."""

    @property
    def lengths(self) -> list[int]:
        return [1] * len(self)

    def __getitem__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[float(row)] * 3 for row in rows])}


class Line(LightningModule):
    """y = w x, with the mean of all it has seen in a buffer; its validation is called `height`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.seen += batch["input_ids"].mean()
        loss = (self.weight * batch["input_ids"]).sum()
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("height", self.weight.sum() ** 2, batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit_line(folder: Path, *, settings: dict | None = None, may_change: tuple = (), **changes):
    """A run of two epochs of ten steps, validated every four steps."""
    options = {"max_epochs": 2, "max_steps": -1, "val_check_interval": 4, "check_val_every_n_epoch": None}
    names = {name: changes.pop(name) for name in list(changes) if name in Run.__dataclass_fields__}
    run = Run(**{"folder": folder, "metric": "height", "progress": False, **names})
    start = begin_run(run, settings or {}, may_change=may_change)
    line = Line()
    points = Points(range(2 * BATCHES))
    with quiet_lightning():
        trainer = build_run_trainer(run, start, **{**options, "log_every_n_steps": 1, **changes})
        loaders = {
            "train_dataloaders": ResumableLoader(points, batch_size=2),
            "val_dataloaders": DataLoader([torch.zeros(1)], batch_size=None),
        }
        fit_run(run, trainer, line, checkpoint=start.checkpoint, **loaders)
    return trainer, line


def kept_steps(folder: Path) -> list[int]:
    return sorted(int(path.stem.split("-")[1]) for path in (folder / "checkpoints").glob("*.ckpt"))


def test_the_best_is_picked_by_the_metric_that_the_run_names(tmp_path):
    trainer, _ = fit_line(tmp_path)
    kept = trainer.checkpoint_callback
    assert kept.best_path.is_file() and kept.best_loss == pytest.approx(float(trainer.callback_metrics["height"]))
    assert "height" in (tmp_path / "logs" / "metrics.csv").read_text().splitlines()[0].split(",")


def test_validations_counted_over_epochs_and_the_end_write_checkpoints(tmp_path):
    fit_line(tmp_path, max_steps=14)
    assert kept_steps(tmp_path) == [12, 14]


class Killed(Exception):
    """As if the process had ended here."""


@pytest.mark.parametrize("death", range(2, 20, 3))
def test_a_run_that_dies_after_any_step_ends_as_an_unbroken_one(tmp_path, monkeypatch, death):
    _, unbroken = fit_line(tmp_path / "unbroken", save_every_n_steps=3)
    step = Line.training_step

    def dying_step(self, batch, batch_idx):
        if self.global_step == death:
            raise Killed
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Line, "training_step", dying_step)
    with pytest.raises(Killed):
        fit_line(tmp_path / "broken", save_every_n_steps=3)
    monkeypatch.undo()
    trainer, broken = fit_line(tmp_path / "broken", save_every_n_steps=3)
    assert trainer.global_step == 2 * BATCHES
    assert torch.equal(broken.weight, unbroken.weight) and torch.equal(broken.seen, unbroken.seen)
    assert kept_steps(tmp_path / "broken") == kept_steps(tmp_path / "unbroken")


def test_a_validation_that_was_not_finished_is_made_again(tmp_path, monkeypatch):
    """No checkpoint is written between a batch and its validation, in a second epoch either."""
    validate = Line.validation_step

    def dying_validation(self, batch, batch_idx):
        if self.global_step == 12:
            raise Killed
        validate(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Line, "validation_step", dying_validation)
        with pytest.raises(Killed):
            fit_line(tmp_path, save_every_n_steps=1)
    assert kept_steps(tmp_path)[-1] == 11
    fit_line(tmp_path, save_every_n_steps=1)
    with open(tmp_path / "logs" / "metrics.csv", newline="") as file:
        assert [int(row["step"]) + 1 for row in csv.DictReader(file) if row["height"]] == [4, 8, 12, 16, 20]


def test_a_run_without_an_average_holds_none_and_one_with_it_gives_it_back_with_the_buffers(tmp_path):
    trainer, _ = fit_line(tmp_path / "none")
    assert "AverageWeights" not in torch.load(trainer.checkpoint_callback.best_path, weights_only=True)["callbacks"]
    trainer, line = fit_line(tmp_path / "kept", ema_decay=0.9)
    best = trainer.checkpoint_callback.best_path
    found = torch.load(best, weights_only=True)
    fresh = Line()
    load_average(fresh, best)
    assert torch.equal(fresh.weight, found["callbacks"]["AverageWeights"]["averages"]["weight"])
    assert not torch.equal(fresh.weight, found["state_dict"]["weight"])
    assert fresh.seen == found["state_dict"]["seen"] == line.seen > 0


def test_other_settings_are_refused_by_name_but_for_those_that_may_change(tmp_path):
    fit_line(tmp_path, settings={"slope": 1, "colour": "red"})
    with pytest.raises(ValueError, match="holds a run with slope=1, now it is 2: .*resume='never'"):
        fit_line(tmp_path, settings={"slope": 2, "colour": "red"})
    trainer, _ = fit_line(tmp_path, settings={"slope": 1, "colour": "blue"}, may_change=("colour",))
    assert trainer.global_step == 2 * BATCHES
    fit_line(tmp_path, settings={"slope": 2}, resume="never", max_steps=3)
    assert kept_steps(tmp_path) == [3]
    with pytest.raises(ValueError, match="resume='nowhere.ckpt': no such file"):
        fit_line(tmp_path, settings={"slope": 2}, resume="nowhere.ckpt")


def test_what_to_do_is_said_in_the_runs_own_words(tmp_path, monkeypatch):
    monkeypatch.setattr(Line, "validation_step", lambda self, *_: self.log("height", torch.tensor(float("inf"))))
    with pytest.raises(FloatingPointError, match="^height is inf: go easy$"):
        fit_line(tmp_path, not_finite="go easy")

    def burst(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Line, "training_step", burst)
    with pytest.raises(RuntimeError, match="^out of memory: buy some$"):
        fit_line(tmp_path, out_of_memory="buy some")


# The progress of a run


class Screen(io.StringIO):
    """Standard error, as a terminal or not."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def shown_by(folder: Path, monkeypatch, *, terminal: bool = False, wait: float = 10.0, **changes) -> str:
    screen = Screen(terminal=terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr("smollm_trm.bars.SECONDS_BETWEEN_LINES", wait)
    fit_line(folder, progress=True, **changes)
    monkeypatch.undo()
    return screen.getvalue()


@pytest.mark.parametrize(("limits", "total"), [({"max_steps": 14}, 14), ({"max_steps": 50}, 20), ({}, 20)])
def test_steps_are_counted_to_where_the_run_ends_by_steps_or_by_epochs(tmp_path, monkeypatch, limits, total):
    lines = shown_by(tmp_path, monkeypatch, wait=0.0, **limits).splitlines()
    steps = [tuple(map(int, re.search(r" (\d+)/(\d+) \[", line).groups())) for line in lines if "training" in line]
    assert steps == [(step, total) for step in range(total + 1)]
    assert any(line.startswith("validating 1/1") for line in lines)
    assert f"100% {total}/{total} [" in lines[-1] and "train_loss=" in lines[-1] and "height=" in lines[-1]


def test_a_resumed_run_counts_the_steps_it_has(tmp_path, monkeypatch):
    step = Line.training_step

    def dying_step(self, batch, batch_idx):
        if self.global_step == 9:
            raise Killed
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(Line, "training_step", dying_step)
        with pytest.raises(Killed):
            fit_line(tmp_path)
    lines = shown_by(tmp_path, monkeypatch, wait=0.0).splitlines()
    assert re.search(r"^training: +40% 8/20 \[", lines[0]) and " 9/20 [" in lines[1]
    assert shown_by(tmp_path, monkeypatch, wait=0.0) == "", "the run had ended"


def test_where_there_is_no_terminal_a_line_comes_every_few_seconds_only(tmp_path, monkeypatch):
    text = shown_by(tmp_path, monkeypatch)
    assert len(text.splitlines()) == 2 and "\r" not in text, "its beginning and its end"
    assert text.startswith("training:   0% 0/20 [")
    assert re.search(r"trained: +100% 20/20 \[\d\d:\d\d<\d\d:\d\d, .*step/s, train_loss=", text)


def test_on_a_terminal_there_is_one_bar(tmp_path, monkeypatch):
    text = shown_by(tmp_path, monkeypatch, terminal=True, max_steps=14)
    assert text.count("\n") == 1 and "\r" in text
    last = text.rstrip().rsplit("\r", 1)[-1]
    assert "100%" in last and "14/14" in last and "height=" in last


def test_a_message_stands_above_the_bar_and_not_behind_it(tmp_path, monkeypatch):
    step = Line.training_step

    def telling_step(self, batch, batch_idx):
        logging.getLogger("smollm_trm.training.stages").warning("stage 2 begins")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Line, "training_step", telling_step)
    handler = logging.StreamHandler(AboveBars())
    logging.getLogger("smollm_trm").addHandler(handler)
    try:
        text = shown_by(tmp_path, monkeypatch, terminal=True, max_steps=4)
    finally:
        logging.getLogger("smollm_trm").removeHandler(handler)
    assert text.count("\rstage 2 begins\n") == 4, "each begins its line"


def test_no_progress_is_shown_where_none_is_wanted_or_by_another_process(tmp_path, monkeypatch, capfd):
    fit_line(tmp_path / "quiet")
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda self: False))
    assert shown_by(tmp_path / "second", monkeypatch, max_steps=4) == ""
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("terminal", [True, False])
def test_the_log_has_times_and_figures_in_its_file_and_colours_on_a_terminal(tmp_path, monkeypatch, terminal):
    screen = Screen(terminal=terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    package = logging.getLogger("smollm_trm")
    before = package.level, package.propagate, list(package.handlers)
    with training_log(tmp_path / "logs" / "training.log"):
        logging.getLogger("smollm_trm.training.run").warning("take care")
        fit_line(tmp_path, max_steps=4)
    assert screen.getvalue() == ("\033[33mtake care\033[0m\n" if terminal else "take care\n")
    log = (tmp_path / "logs" / "training.log").read_text()
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ WARNING take care$", log, re.MULTILINE)
    assert re.search(r"DEBUG step 4 .*height", log)
    assert (package.level, package.propagate, package.handlers) == before
