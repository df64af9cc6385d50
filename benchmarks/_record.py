"""One JSON line per measurement, with everything needed to repeat it, in `benchmarks/results.jsonl`."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).with_name("results.jsonl")
PACKAGES = ("torch", "transformers", "peft", "pytorch-lightning", "datasets", "trl", "lm-eval")


def benchmark_options(description: str) -> argparse.ArgumentParser:
    """A parser with the one option that every benchmark has."""
    parser = argparse.ArgumentParser(description=description.strip().splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"append the JSON line to {RESULTS.name}")
    return parser


def record(name: str, figures: dict, *, seed: int | None = None, keep: bool = False) -> dict:
    """Print the JSON line of a measurement; `keep` appends it to `results.jsonl`.

    Args:
        name: of the benchmark.
        figures: what was measured; JSON.
        seed: of the measurement, if anything in it is random.
        keep: append the line to the file.
    """
    line = {
        "name": name,
        "figures": figures,
        "command": shlex.join(["python", *map(_relative, sys.argv)]),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seed": seed,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES if _version(package)},
        "hardware": _hardware(),
    }
    text = json.dumps(line, ensure_ascii=False)
    print(text)
    if keep:
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(text + "\n")
    return line


def print_table(head: list[str], rows: list[list[object]]) -> None:
    """A plain table, aligned."""
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _relative(argument: str) -> str:
    """Paths inside the checkout as seen from it, others by their name: no machine's folders in the file."""
    checkout, path = RESULTS.parent.parent, Path(argument)
    if not path.is_absolute() and not path.exists():
        return argument
    return os.path.relpath(path, checkout) if path.resolve().is_relative_to(checkout) else path.name


def _commit() -> str:
    """The checkout's commit, with `+` where tracked files differ from it."""

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=RESULTS.parent, capture_output=True, text=True)
        return found.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)benchmarks/results.jsonl")
    return (git("rev-parse", "--short", "HEAD") or "none") + ("+" if changed else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hardware() -> str:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        return f"{sys.modules['torch'].cuda.get_device_name()}; {cpu}, {os.cpu_count()} cores"
    return f"{cpu}, {os.cpu_count()} cores"
