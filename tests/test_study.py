"""The study: its figures are those of the grades, its seconds outlive a kill, and it goes on where it stopped."""

import json
import sys
from argparse import Namespace
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from runs import save_tiny_base, train_tiny
from twins import ROWS, make_model, make_tokenizer

from smollm_trm.evaluation.evaluate import evaluate_gsm8k
from smollm_trm.records import UserMistake

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import _study  # noqa: E402
import study  # noqa: E402
from _study_figures import judged  # noqa: E402


def run_of(own: str, **more) -> dict:
    return {"grades": {"own": own, **more}, "cpu_seconds": 2.0, "dev_loss": 0.5, "optimizer_steps": 3}


def test_seeds_are_judged_over_the_problems_of_all_of_them():
    by_seed = {
        0: {"LoRA": run_of("1000"), "TRM": run_of("1110", shuffled="0000")},
        1: {"LoRA": run_of("0001"), "TRM": run_of("1011", shuffled="1000"), "pause": run_of("0000")},
    }
    found = judged(by_seed, {0: [1, 1, 2, 2], 1: [2, 2, 1, 1]})
    assert list(found) == ["LoRA", "TRM"]  # the third is not there for both
    trm = found["TRM"]
    assert trm["accuracy"] == 6 / 8 and trm["by_seed"] == [0.75, 0.75] and trm["total"] == 8
    assert {steps: (one["accuracy"], one["total"]) for steps, one in trm["by_steps_needed"].items()} == {
        "1": (4 / 4, 4),
        "2": (2 / 4, 4),
    }
    against = trm["against"]["LoRA"]
    assert (against["only_first"], against["only_second"], against["difference"]) == (4, 0, 0.5)
    assert trm["shuffled"]["accuracy"] == 1 / 8 and trm["shuffled"]["effect"]["only_second"] == 5
    assert "TRM" not in trm["against"] and "shuffled" not in found["LoRA"]


def test_what_stopping_costs_is_paired_with_all_steps():
    head = {"steps": 2, "auroc": 0.9, "base_rate": 0.5, "mean_steps": 1.5, "steps_saved": 0.25}
    graded = {"own": "1100", "1 steps": "1000", "4 steps": "1110", "halting": "1000"}
    [arm] = judged({0: {"TRM": {**run_of(**graded), "halting": head}}}, {0: [1, 1, 1, 1]}).values()
    assert {steps: one["accuracy"] for steps, one in arm["by_supervision_steps"].items()} == {
        "1": 0.25,
        "2": 0.5,
        "4": 0.75,
    }
    assert arm["halting"]["accuracy"] == 0.25 and arm["halting"]["effect"]["difference"] == -0.25


def test_cpu_seconds_go_on_from_a_checkpoint(tmp_path):
    base, counting = save_tiny_base(tmp_path / "base"), {"module_class": _study.CountsSeconds}
    _, begun = train_tiny(base, tmp_path / "run", max_steps=2, **counting)
    _, read = train_tiny(base, tmp_path / "run", max_steps=2, **counting)
    assert begun.cpu_seconds > 0 and read.cpu_seconds == pytest.approx(begun.cpu_seconds, rel=0.5)
    _, longer = train_tiny(base, tmp_path / "run", max_steps=4, **counting)
    assert longer.cpu_seconds > read.cpu_seconds


def test_other_supervision_steps_are_another_evaluation(tmp_path):
    model, asked = make_model("smollm3", make_tokenizer()), {"max_new_tokens": 4, "progress": False}
    path = tmp_path / "predictions.jsonl"
    once = evaluate_gsm8k(model, ROWS[:3], n_steps=1, predictions_path=path, **asked)
    assert once["settings"]["generation"]["n_steps"] == 1
    with pytest.raises(UserMistake, match="'n_steps': 1} there, .*'n_steps': 4} now"):
        evaluate_gsm8k(model, ROWS[:3], n_steps=4, predictions_path=path, **asked)


class AtOnce:
    """Makes a run when it is submitted, in this process."""

    def submit(self, function, *arguments):
        done = Future()
        done.set_result(function(*arguments))
        return done


def test_a_study_is_made_once_and_read_from_then_on(tmp_path, monkeypatch):
    size = replace(_study.SIZE, train_problems=300, test_problems=30, base_steps=4)
    monkeypatch.setattr(_study, "SIZE", size)
    monkeypatch.setattr(study, "SIZE", size)
    given = {"full": False, "seeds": [0], "arms": [_study.FIRST, "TRM", "LoRA"], "steps": 4, "output_dir": tmp_path}
    options = Namespace(**given)
    figures = study.run(options, study.Study(options, AtOnce()))
    assert list(figures["arms"]) == [study.BASE, _study.FIRST, "TRM", "LoRA"] and figures["arms"]["TRM"]["total"] == 30
    [alone] = tmp_path.glob("seed_0/trm_first*/reasoner/cpu_seconds.json")
    assert json.loads(alone.read_text())["cpu_seconds"] < figures["arms"][_study.FIRST]["cpu_seconds"][0]
    assert list(figures["arms"]["TRM"]["by_supervision_steps"]) == ["1", "2", "4", "8"]
    assert figures["seeds"] == {"arms": [0]}  # the core is not there twice
    monkeypatch.setattr(_study.finetune, "train_gsm8k", None)
    assert study.run(options, study.Study(options, AtOnce())) == figures
    assert study.run(options, study.Study(options, None)) == figures
    study.plot_study(figures, tmp_path / "plots")
    assert len(list((tmp_path / "plots").glob("*.png"))) == 3
    with pytest.raises(SystemExit, match="no seed has all its arms"):
        other = Namespace(**given | {"steps": 5})
        study.run(other, study.Study(other, None))
