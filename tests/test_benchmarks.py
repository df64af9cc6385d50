"""What the benchmarks share with the demo: the same base, and held-out problems that are held out."""

import sys
from pathlib import Path

import pytest

from smollm_trm import demo
from smollm_trm.data.rows import normalize_question, read_jsonl

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import _models  # noqa: E402


class Stopped(Exception):
    pass


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A small demo's size, its data on disk, and the settings of its base, whose training is left out."""
    size, given = demo.DemoSize(train_problems=60, test_problems=40), {}

    def stop(**settings):
        given.update(settings)
        raise Stopped

    monkeypatch.setattr(demo, "train_gsm8k", stop)
    monkeypatch.setattr(_models, "DemoSize", lambda: size)
    with pytest.raises(Stopped):
        demo.run_demo(output_dir=str(tmp_path), seed=0, size=size)
    return size, tmp_path, given


@pytest.mark.parametrize("count", [5, 50])
def test_held_out_problems_are_none_of_the_demos(begun, count):
    _, folder, _ = begun
    its_own = {
        normalize_question(row["question"])
        for part in ("train", "test")
        for _, row in read_jsonl(folder / "data" / f"{part}.jsonl")
    }
    held_out = {normalize_question(row["question"]) for row in _models.held_out_problems(count)}
    assert len(its_own) == 100 and len(held_out) == count
    assert not held_out & its_own


def test_the_benchmarks_base_is_trained_as_the_demos(begun):
    size, folder, given = begun
    del given["progress"]
    assert _models.demo_base_settings(folder, size, seed=0) == given
