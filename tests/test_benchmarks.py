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
    """A small demo's data on disk; nothing is trained."""
    size = demo.DemoSize(train_problems=60, test_problems=40)

    def stop(**_):
        raise Stopped

    monkeypatch.setattr(demo, "train_gsm8k", stop)
    monkeypatch.setattr(_models, "DemoSize", lambda: size)
    with pytest.raises(Stopped):
        demo.run_demo(output_dir=str(tmp_path), seed=0, size=size)
    return tmp_path


@pytest.mark.parametrize("count", [5, 50])
def test_held_out_problems_are_none_of_the_demos(begun, count):
    its_own = {
        normalize_question(row["question"])
        for part in ("train", "test")
        for _, row in read_jsonl(begun / "data" / f"{part}.jsonl")
    }
    held_out = {normalize_question(row["question"]) for row in _models.held_out_problems(count)}
    assert len(its_own) == 100 and len(held_out) == count
    assert not held_out & its_own
