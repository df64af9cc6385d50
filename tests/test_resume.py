"""A run that was killed and goes on ends where an unbroken one does."""

import csv
import json
import signal
from pathlib import Path

import pytest
from killed_runs import DEATHS, PLANS
from processes import ended, started
from runs import first_difference, newest_checkpoint, save_tiny_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Each run of PLANS, with LoRA dropout, trained once unbroken and once through all its deaths."""
    folder = tmp_path_factory.mktemp("killed")
    base = save_tiny_base(folder / "base")
    runs = [((base, str(folder / plan / "unbroken"), plan, None), 0) for plan in PLANS]
    for plan, deaths in DEATHS.items():
        broken = (base, str(folder / plan / "broken"), plan)
        runs += [((*broken, death), -signal.SIGKILL) for death in deaths] + [((*broken, None), 0)]
    assert ended(started("processes", "forked", "killed_runs", "session", runs)) == 0
    return folder


def without_clocks(checkpoint: dict) -> dict:
    del checkpoint["callbacks"]["Speedometer"]
    return checkpoint


@pytest.mark.parametrize("plan", PLANS)
def test_a_run_killed_at_any_moment_ends_as_an_unbroken_one(folder, plan):
    broken, unbroken = (without_clocks(newest_checkpoint(folder / plan / name)) for name in ("broken", "unbroken"))
    assert first_difference(broken, unbroken) is None


@pytest.mark.parametrize("plan", PLANS)
def test_a_killed_run_saves_the_same_model_and_figures(folder, plan):
    results = []
    for name in ("broken", "unbroken"):
        result = json.loads((folder / plan / name / "results.json").read_text())
        del result["seconds"], result["settings"]["output_dir"]
        results.append(result)
        assert not list((folder / plan / name / "checkpoints").glob(".*")), "something half-written was left"
    assert results[0] == results[1]
    for part in ("adapter/adapter_model.safetensors", "model.safetensors"):
        broken, unbroken = ((folder / plan / name / "model" / part).read_bytes() for name in ("broken", "unbroken"))
        assert broken == unbroken


@pytest.mark.parametrize("plan", PLANS)
def test_the_loss_curves_survive_a_resume(folder, plan):
    curves = []
    for name in ("broken", "unbroken"):
        with open(folder / plan / name / "logs" / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        curves.append({(row["step"], key): row[key] for row in rows for key in ("train_loss", "dev_loss") if row[key]})
        assert len(curves[-1]) == sum(bool(row[key]) for row in rows for key in ("train_loss", "dev_loss"))
    broken, unbroken = curves
    assert {key: unbroken.get(key) for key in broken} == broken
    assert len(unbroken) - len(broken) <= 2  # a line that was due in the instant of a death


def test_the_early_stop_came_early(folder):
    result = json.loads((folder / "early_stop" / "broken" / "results.json").read_text())
    assert (result["best_step"], result["optimizer_steps"]) == (6, 12)
