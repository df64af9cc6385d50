"""What studies of several arms share: arms side by side, and their figures paired with one arm's."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from _record import print_table

from smollm_trm.demo import processes
from smollm_trm.evaluation.statistics import paired_difference

TESTED = "TRM"
"""The arm that all others are compared with."""
AT_ONCE = 2


def side_by_side(
    jobs: Mapping[str, Any], rows: list[dict[str, str]], *, arm: Callable, at_once: int = AT_ONCE
) -> dict[str, dict[str, Any]]:
    """Every arm in a process of its own with one thread, two at a time; the slowest first."""
    with processes(at_once) as pool:
        running: dict[str, Future] = {name: pool.submit(arm, name, jobs[name], rows) for name in reversed(jobs)}
        return {name: running[name].result() for name in jobs}


def figures_of(found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Every arm's figures, and `TESTED` against each of them, paired by problem; printed as a table."""
    results = {name: result for arm in found.values() for name, result in arm["results"].items()}
    figures: dict[str, Any] = {
        name: {key: result[key] for key in ("accuracy", "interval")} for name, result in results.items()
    }
    for name, arm in found.items():
        figures[name] |= {"training_seconds": arm["training_seconds"], "halting": arm["halting"]}
    if TESTED in results:
        grades = results[TESTED]["correct_by_problem"]
        for name in figures.keys() - {TESTED}:
            figures[name]["tested"] = asdict(paired_difference(grades, results[name]["correct_by_problem"]))
    table = [[name, percent(arm["accuracy"]), *test_cells(arm.get("tested"))] for name, arm in figures.items()]
    print_table(["arm", "accuracy", f"{TESTED} better by", "95%", "p"], table)
    return figures


def percent(share: float, sign: str = "") -> str:
    """A share for a table."""
    return f"{100 * share:{sign}.1f}"


def test_cells(test: Mapping[str, Any] | None) -> list[str]:
    """A paired test for a table."""
    if test is None:
        return ["", "", ""]
    interval = f"{percent(test['low'], '+')} to {percent(test['high'], '+')}"
    return [percent(test["difference"], "+"), interval, f"{test['p_value']:.2g}"]
