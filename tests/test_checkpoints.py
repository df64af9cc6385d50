"""Checkpoints are whole, checked before they are used, and never run code."""

import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import first_difference, newest_checkpoint, save_tiny_base, train_tiny, trainable_weights

from smollm_trm.records import UserMistake
from smollm_trm.training.checkpoints import BestAndLatest, WholeCheckpointIO, damage_of, newest_good_checkpoint
from smollm_trm.training.loggers import KeptCSVLogger

WHOLE = {
    **{"global_step": 1, "epoch": 0, "state_dict": {}, "loops": {"fit_loop": {}}, "callbacks": {"BestAndLatest": {}}},
    **{"optimizer_states": [], "lr_schedulers": [], "pytorch-lightning_version": "2"},
}


def write_checkpoint(folder: Path, step: int) -> Path:
    path, weights = folder / f"step-{step}.ckpt", {"w": torch.full((5000,), float(step))}
    WholeCheckpointIO().save_checkpoint({**WHOLE, "global_step": step, "state_dict": weights}, path)
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit_of_a_weight(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGES = (truncate, cut_in_half, flip_a_bit_of_a_weight, empty)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_one_message_and_the_one_before_is_used(tmp_path, caplog, damage):
    older, newer = write_checkpoint(tmp_path, 9), write_checkpoint(tmp_path, 10)
    assert newest_good_checkpoint(tmp_path) == newer and not caplog.messages
    damage(newer)
    assert newest_good_checkpoint(tmp_path) == older
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert caplog.messages[0].startswith(f"skipped the damaged checkpoint {newer} (")
    assert "\n" not in caplog.messages[0]


def test_where_no_checkpoint_is_good_the_run_starts_anew_and_says_so(tmp_path, caplog):
    assert newest_good_checkpoint(tmp_path / "nowhere") is None and not caplog.messages
    empty(write_checkpoint(tmp_path, 3))
    assert newest_good_checkpoint(tmp_path) is None
    assert "the run starts anew" in caplog.messages[1]


class Malice:
    def __reduce__(self):
        return os.mkdir, ("malice",)


def test_a_malicious_pickle_is_refused_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step-1.ckpt"
    torch.save({"global_step": 1, "callbacks": Malice()}, path)
    assert damage_of(path) == "damaged, or more than tensors and plain values"
    with pytest.raises(UserMistake, match="step-1.ckpt: not a checkpoint of this program") as caught:
        WholeCheckpointIO().load_checkpoint(path, weights_only=False)
    assert "weights_only" not in str(caught.value), "PyTorch's own message advises to switch its safety off"
    assert "\n" not in str(caught.value) and not (tmp_path / "malice").exists()


@pytest.mark.parametrize("name", [*WHOLE, "fit_loop", "BestAndLatest", None])
def test_a_checkpoint_that_is_not_ours_is_one_line(tmp_path, name):
    foreign = [1, 2] if name is None else {**WHOLE, "loops" if name == "fit_loop" else "callbacks": {}, name: None}
    torch.save(foreign, path := tmp_path / "x.ckpt")
    with pytest.raises(UserMistake, match=r"x.ckpt: not a checkpoint of this program \(it") as caught:
        WholeCheckpointIO().load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_a_run_whose_newest_checkpoint_is_damaged_ends_as_it_did(tmp_path, caplog):
    base = save_tiny_base(tmp_path / "base")
    options = {"val_check_interval": 4, "save_every_n_steps": 1}
    _, module = train_tiny(base, tmp_path / "run", **options)
    before = newest_checkpoint(tmp_path / "run")
    flip_a_bit_of_a_weight(tmp_path / "run" / "checkpoints" / "step-6.ckpt")
    _, again = train_tiny(base, tmp_path / "run", **options)
    assert sum("skipped the damaged checkpoint" in message for message in caplog.messages) == 1
    after = newest_checkpoint(tmp_path / "run")
    for checkpoint in (before, after):
        del checkpoint["callbacks"]["Speedometer"]
    assert first_difference(before, after) is None
    assert first_difference(trainable_weights(module), trainable_weights(again)) is None


def test_the_best_checkpoint_stays_as_long_as_a_checkpoint_that_is_kept_names_it(tmp_path):
    kept = BestAndLatest(folder=tmp_path, every_n_steps=1)
    trainer = SimpleNamespace(
        is_global_zero=True,
        should_stop=False,
        state=SimpleNamespace(fn="fit"),
        save_checkpoint=lambda path, weights_only: path.touch(),
    )
    left = []
    for step, loss in enumerate((1.0, 2.0, 0.5, 0.7, 0.9), start=1):
        trainer.global_step, trainer.callback_metrics = step, {"dev_loss": torch.tensor(loss)}
        kept.on_validation_end(trainer, None)
        left.append(sorted(int(path.stem[5:]) for path in tmp_path.iterdir()))
    assert left == [[1], [1, 2], [1, 2, 3], [3, 4], [3, 4, 5]]
    assert kept.best_path == tmp_path / "step-3.ckpt" and kept.best_loss == 0.5


# The loss curves' file


def log(folder: Path, first_step: int, steps: range, **more: float) -> str:
    logger = KeptCSVLogger(folder, first_step=first_step)
    for step in steps:
        logger.log_metrics({"train_loss": float(step), **more}, step)
    return (folder / "logs" / "metrics.csv").read_text()


def test_a_resumed_logger_keeps_earlier_rows_and_drops_those_about_to_be_made_again(tmp_path):
    log(tmp_path, 0, range(5))
    text = log(tmp_path, 3, range(3, 6), dev_loss=7.0)
    assert text.split() == [
        "dev_loss,step,train_loss",
        ",0,0.0",
        ",1,1.0",
        ",2,2.0",
        "7.0,3,3.0",
        "7.0,4,4.0",
        "7.0,5,5.0",
    ]
    assert log(tmp_path, 0, range(1)).split() == ["step,train_loss", "0,0.0"]


def test_every_row_is_on_disk_at_once_and_a_torn_one_is_dropped(tmp_path):
    logger = KeptCSVLogger(tmp_path, first_step=0)
    file = tmp_path / "logs" / "metrics.csv"
    for step in range(3):
        logger.log_metrics({"train_loss": 1.5}, step)
        assert len(file.read_text().split()) == step + 2
    file.write_bytes(file.read_bytes()[:-4])
    assert log(tmp_path, 9, range(3, 4)).split() == ["step,train_loss", "0,1.5", "1,1.5", "3,3.0"]


@pytest.mark.parametrize(
    "damage", [b"\xff\n", b"x,y\n", b"1,2,3\n", "\u00b2,1\n".encode(), b"9" * 200_000 + b",1\n", b"\0\n"]
)
def test_a_line_that_cannot_be_read_is_dropped_and_said(tmp_path, caplog, damage):
    log(tmp_path, 0, range(2))
    file = tmp_path / "logs" / "metrics.csv"
    file.write_bytes(damage.join(file.read_bytes().splitlines(keepends=True)[:2]) + b"1,1.0\n")
    assert log(tmp_path, 9, range(3, 4)).split() == ["step,train_loss", "0,0.0", "1,1.0", "3,3.0"]
    assert caplog.messages == [f"{file}: dropped 1 lines that cannot be read"]
    file.write_bytes(b"\xff\xfe no header\n0,1.0\n")
    assert log(tmp_path, 9, range(3, 4)).split() == ["step,train_loss", "3,3.0"]


def test_checkpoints_that_are_no_longer_needed_are_emptied_first(tmp_path, monkeypatch):
    """A mounted Drive moves a deleted file to its Trash, where it still counts."""
    sizes, unlink = [], Path.unlink

    def note(path: Path, **options) -> None:
        if path.suffix == ".ckpt":
            sizes.append(path.stat().st_size)
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", note)
    for resume in ("auto", "never"):
        train_tiny(save_tiny_base(tmp_path / "base"), tmp_path / "run", save_every_n_steps=1, resume=resume)
    assert len(sizes) > 4 and set(sizes) == {0}
