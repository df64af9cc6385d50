"""What the arithmetic benchmarks share: one JSON line for each figure, with command, commit and hardware."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results.jsonl"


def describe_machine() -> dict:
    """Commit, command, cores, threads and versions of this run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cpu = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())  # fmt: skip
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "commit": commit.stdout.strip() or "none",
        "command": " ".join(["python", *sys.argv]),
        "hardware": f"{os.cpu_count()} x {cpu}{gpu}",
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
    }


def record(benchmark: str, figures: dict, machine: dict) -> None:
    """Print one JSON line and add it to `results.jsonl`."""
    line = json.dumps({"benchmark": benchmark, **machine, **figures})
    print(line)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
