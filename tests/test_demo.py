"""The demo's worker processes."""

import os
import signal
import time
from pathlib import Path

from processes import started

from smollm_trm.demo import processes


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
