"""The study's pictures: accuracy by arm, by steps a problem needs, by supervision steps at test time, and by M."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from smollm_trm.evaluation.plots import COLOURS, MARKERS
from smollm_trm.records import write_whole

DOTS_PER_INCH = 100
CHAIN = "base, writing its chain"
LONGER = ", as long"
LINES: dict[str, tuple[str, str, str]] = {
    CHAIN: ("0.55", "x", ":"),
    "LoRA": (COLOURS[6], "s", "-"),
    "pause": (COLOURS[5], "v", "--"),
    "static": (COLOURS[4], "P", "--"),
    "compressor": (COLOURS[2], "^", "-"),
    "TRM": (COLOURS[1], "o", "-"),
    "TRM, word mixtures": (COLOURS[1], "D", "--"),
    "TRM first, word mixtures": (COLOURS[1], "*", "-."),
    "iCoT": (COLOURS[0], "X", "--"),
    "Coconut": (COLOURS[0], "D", "-"),
    "TRM, curriculum": (COLOURS[3], "o", "-"),
}
"""Colour, marker and line of each arm."""


def plot_study(figures: Mapping[str, Any], folder: Path) -> None:
    """Every picture that the figures of `study.py` allow, as `study_*.png` in a folder."""
    for name, stem in {"arms": "study_arms", "core arms": "study_core"}.items():
        if name in figures:
            plot_arms(figures[name], folder / f"{stem}.png", seeds=figures["seeds"][name])
    if figures.get("equal time"):
        longer = {name: arm for name, arm in figures["equal time"].items() if name.endswith(LONGER)}
        beside = {name: figures["equal time"][name] for name in ("LoRA", "TRM")}
        plot_arms(beside | longer, folder / "study_equal_time.png", seeds=[0], whole=False)
    arms = figures.get("arms") or figures["core arms"]
    plot_steps_needed(arms, folder / "study_steps_needed.png")
    arms = arms | figures.get("core arms", {})  # those of more seeds, where there are any
    if any("by_supervision_steps" in arm for arm in arms.values()):
        plot_supervision_steps(arms, folder / "study_supervision_steps.png")
    if figures.get("M"):
        plot_latents(figures["M"], folder / "study_latents.png")


def plot_arms(arms: Mapping[str, Any], path: Path, *, seeds: list[int], whole: bool = True) -> None:
    """Accuracy of every arm as a bar with its interval and its seeds; below it, hatched, with latents shuffled.

    `whole`: on a scale to 100%.
    """
    figure = Figure(figsize=(8.5, 1.3 + 0.56 * len(arms)), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    for row, (name, arm) in enumerate(arms.items()):
        shuffled = arm.get("shuffled")
        up, colour = -0.17 if shuffled else 0.0, LINES[name.removesuffix(LONGER)][0]
        draw_bar(axes, row + up, arm, color=colour, alpha=0.75, label=None)
        axes.plot([100 * one for one in arm["by_seed"]], [row + up] * len(arm["by_seed"]), "k|", markersize=9)
        if shuffled:
            style = {"color": "white", "hatch": "////", "edgecolor": colour}
            draw_bar(axes, row + 0.21, shuffled, **style, label=None)
        note = "" if not shuffled or shuffled["effect"]["p_value"] <= 0.01 else "  latents make no difference"
        where = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
        axes.annotate(
            f"{100 * arm['accuracy']:.1f}{note}", (100 * max(arm["interval"][1], *arm["by_seed"]), row + up), **where
        )
    axes.set_yticks(range(len(arms)), list(arms))
    axes.invert_yaxis()
    axes.set_xlim(0, 100 if whole else None)
    total = next(iter(arms.values()))["total"]
    told = f"{total} held-out problems, " + (
        f"{len(seeds)} seeds (ticks: each seed)" if len(seeds) > 1 else f"seed {seeds[0]}"
    )
    axes.set_xlabel(f"problems solved (%), 95% interval; {told}\nhatched: with the latents of another problem")
    axes.grid(axis="x", alpha=0.25)
    save(figure, path)


def draw_bar(axes: Axes, at: float, arm: Mapping[str, Any], **style: Any) -> None:
    """A thin bar with its interval."""
    value, low, high = (100 * one for one in (arm["accuracy"], *arm["interval"]))
    axes.barh(at, value, height=0.36, zorder=2, **style)
    axes.errorbar(value, at, xerr=[[value - low], [high - value]], color="black", capsize=3, linewidth=1.1, zorder=3)


def draw_line(axes: Axes, points: Mapping[str, Mapping[str, Any]], label: str, **style: Any) -> None:
    """Accuracies with their intervals over the keys of `points`, which are numbers."""
    places = [int(number) for number in points]
    values = [100 * one["accuracy"] for one in points.values()]
    ends = [[100 * one["interval"][end] for one in points.values()] for end in (0, 1)]
    reach = [[value - low for value, low in zip(values, ends[0], strict=True)],
             [high - value for value, high in zip(values, ends[1], strict=True)]]  # fmt: skip
    axes.errorbar(places, values, yerr=reach, label=label, capsize=2, linewidth=1.6, markersize=5, **style)


def plot_steps_needed(arms: Mapping[str, Any], path: Path) -> None:
    """Accuracy by how many steps a problem needs, a line an arm; the chain on a scale of its own."""
    figure = Figure(figsize=(8.5, 4.2), dpi=DOTS_PER_INCH, layout="constrained")
    of_chain, of_arms = figure.subplots(1, 2, width_ratios=[1, 2.2])
    for name, arm in arms.items():
        colour, marker, line = LINES[name]
        axes = of_chain if name == CHAIN else of_arms
        draw_line(axes, arm["by_steps_needed"], name, color=colour, marker=marker, linestyle=line)
    of_chain.set_title(CHAIN, fontsize=9)
    of_arms.set_title("answering at once", fontsize=9)
    for axes in (of_chain, of_arms):
        axes.set_xticks([int(number) for number in next(iter(arms.values()))["by_steps_needed"]])
        axes.set_xlabel("steps that a problem needs")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    of_chain.set_ylabel("problems solved (%), 95% interval")
    of_arms.legend(frameon=False, fontsize=8.5)
    save(figure, path)


def plot_supervision_steps(arms: Mapping[str, Any], path: Path) -> None:
    """Accuracy by supervision steps at test time."""
    figure = Figure(figsize=(6.0, 3.8), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    asked = {name: arm for name, arm in arms.items() if "by_supervision_steps" in arm}
    for name, arm in asked.items():
        colour, marker, line = LINES[name]
        draw_line(axes, arm["by_supervision_steps"], name, color=colour, marker=marker, linestyle=line)
    trained, numbers = arm["halting"]["steps"][0], [int(number) for number in arm["by_supervision_steps"]]
    axes.axvline(trained, color="0.35", linestyle=":", linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, labels=numbers)
    axes.set_xlabel("supervision steps at test time (dotted: as trained)")
    finish(figure, axes, path)


def plot_latents(arms: Mapping[str, Any], path: Path) -> None:
    """Accuracy of the TRM by M, as it is and with latents shuffled; LoRA as a line."""
    figure = Figure(figsize=(6.0, 3.8), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.add_subplot()
    by_number = {name.rpartition("= ")[2] if "=" in name else "8": arm
                 for name, arm in arms.items() if name == "TRM" or name.startswith("TRM, M =")}  # fmt: skip
    by_number = {number: by_number[number] for number in sorted(by_number, key=int)}
    draw_line(axes, by_number, "TRM", color=COLOURS[1], marker=MARKERS[0])
    shuffled = {number: arm["shuffled"] for number, arm in by_number.items()}
    draw_line(axes, shuffled, "TRM, latents shuffled", color=COLOURS[1], marker=MARKERS[1], linestyle="--")
    axes.axhline(100 * arms["LoRA"]["accuracy"], color="black", linestyle=":", label="LoRA, no latents")
    axes.set_xscale("log", base=2)
    axes.set_xticks([int(number) for number in by_number], labels=list(by_number))
    axes.set_xlabel("M, number of latents (seed 0)")
    finish(figure, axes, path)


def finish(figure: Figure, axes: Axes, path: Path) -> None:
    """What the pictures with lines share."""
    axes.set_ylabel("problems solved (%), 95% interval")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.minorticks_off()
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG whole or not at all."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    write_whole(path, lambda temporary: FigureCanvasAgg(figure).print_png(str(temporary)))
