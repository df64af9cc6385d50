"""The demo's worker processes, and a folder that holds another demo."""

import os
import signal
import time
from pathlib import Path

import pytest
from processes import started

from smollm_trm import demo
from smollm_trm.cli import main
from smollm_trm.demo import processes
from smollm_trm.records import write_json
from smollm_trm.training.settings import TrainSettings


def keep_a_worker(told: str) -> None:
    """Begin a worker, write down its process id, and wait to be killed."""
    with processes(1) as pool:
        Path(told).write_text(str(pool.submit(os.getpid).result()))
        pool.submit(time.sleep, 60).result()


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def until(condition, *, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(condition())


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    told = tmp_path / "worker"
    parent = started("test_demo", "keep_a_worker", str(told))
    assert until(lambda: told.is_file() and told.read_text(), seconds=60)
    worker = int(told.read_text())
    assert is_running(worker)
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    assert until(lambda: not is_running(worker), seconds=20)


def test_a_folder_begun_with_another_seed_is_refused_with_what_the_demo_can_do(tmp_path, monkeypatch, capsys):
    size = demo.DemoSize(train_problems=50, test_problems=5)
    monkeypatch.setattr(demo, "DemoSize", lambda: size)
    settings = TrainSettings(**demo.demo_base_settings(tmp_path, size, seed=0))
    write_json(tmp_path / "base" / "settings.json", vars(settings))
    write_json(tmp_path / "base" / "results.json", {})
    with pytest.raises(SystemExit):
        main(["demo", "--seed", "1", "--output_dir", str(tmp_path)])
    told = capsys.readouterr().err
    assert "holds a run with --seed=0, now it is 1: choose another --output_dir, or remove" in told
    assert f"remove {tmp_path} to start anew" in told and "never" not in told
