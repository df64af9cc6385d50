"""A run that was killed and goes on ends where an unbroken one does."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import first_difference, newest_checkpoint, save_tiny_base

PLANS = ("mid_epoch", "early_stop")


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("killed")
    base = save_tiny_base(folder / "base")
    here = Path(__file__).parent
    places = os.pathsep.join([str(here), str(here.parent / "src")])
    environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(here / "killed_runs.py"), base, str(folder), "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, [json.loads(line) for line in done.stdout.splitlines()]


def test_runs_were_killed_in_every_kind_of_place(killed):
    places = {death["death"][0] for death in killed[1] if death["died"]}
    assert places == {"forward", "backward", "validation", "half written", "written"}


def without_clocks(checkpoint: dict) -> dict:
    del checkpoint["callbacks"]["Speedometer"]
    return checkpoint


@pytest.mark.parametrize("plan", PLANS)
def test_a_run_killed_at_any_moment_ends_as_an_unbroken_one(killed, plan):
    folder, deaths = killed
    assert sum(death["died"] for death in deaths if death["plan"] == plan) >= 3
    broken, unbroken = (without_clocks(newest_checkpoint(folder / plan / name)) for name in ("broken", "unbroken"))
    assert first_difference(broken, unbroken) is None


@pytest.mark.parametrize("plan", PLANS)
def test_a_killed_run_saves_the_same_model_and_figures(killed, plan):
    folder, _ = killed
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
def test_the_loss_curves_survive_a_resume(killed, plan):
    folder, _ = killed
    curves = []
    for name in ("broken", "unbroken"):
        with open(folder / plan / name / "logs" / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        curves.append({(row["step"], key): row[key] for row in rows for key in ("train_loss", "dev_loss") if row[key]})
        assert len(curves[-1]) == sum(bool(row[key]) for row in rows for key in ("train_loss", "dev_loss"))
    broken, unbroken = curves
    assert {key: unbroken.get(key) for key in broken} == broken
    assert len(unbroken) - len(broken) <= 2  # a line that was due in the instant of a death


def test_the_early_stop_came_early(killed):
    folder, _ = killed
    result = json.loads((folder / "early_stop" / "broken" / "results.json").read_text())
    assert (result["best_step"], result["optimizer_steps"]) == (6, 12)
