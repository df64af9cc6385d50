"""Pictures: how training went, which arm is better, when a model would stop thinking, what its latents read.

Drawn on figures of their own, without matplotlib's global state or its display. Colours are Okabe and Ito's, which
colour-blind readers can tell apart; arms and runs differ in more than colour.
"""

import csv
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from smollm_trm.evaluation.compare import Comparison
from smollm_trm.records import UserMistake, write_whole

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
CURVES = ("train_loss", "dev_loss", "latent_variation")
"""Columns of a run's metrics file."""
Curves = dict[str, dict[int, float]]
"""Of a run: column -> optimizer step -> value."""


def plot_comparison(comparison: Comparison, path: Path) -> Figure:
    """Accuracy of every arm as a bar with its 95% interval; arms with shuffled latents are hatched."""
    arms = comparison.arms
    figure = _figure(8.5, 1.4 + 0.52 * len(arms))
    axes = figure.add_subplot()
    for row, arm in enumerate(arms):
        share, low, high = (100 * value for value in (arm.accuracy, *arm.interval))
        style = {"color": "white", "hatch": "///"} if "shuffled" in arm.name else {"color": COLOURS[5]}
        axes.barh(row, share, edgecolor=COLOURS[0], height=0.62, **style)
        axes.errorbar(share, row, xerr=[[share - low], [high - share]], color="black", capsize=4, linewidth=1.3)
        label = "  ".join(filter(None, (f"{share:.1f}%", arm.latents_verdict)))
        axes.annotate(label, (high, row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
    reference = next(arm for arm in arms if arm.name == comparison.baseline)
    axes.axvline(100 * reference.accuracy, color="0.35", linestyle=":", linewidth=1.2, zorder=0)
    axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes.invert_yaxis()
    axes.set_xlim(0, min(130, max(100 * arm.interval[1] for arm in arms) * 1.3 + 3))
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= 100])
    axes.set_xlabel(f"problems solved (%), 95% Wilson interval, n = {arms[0].total}; dotted: {reference.name}")
    return _saved(figure, path)


def plot_losses(runs: Mapping[str, str | Path], path: Path) -> Figure:
    """Training and dev loss of some runs (name -> `metrics.csv`), and how much their latents differ."""
    if not runs:
        raise UserMistake("no curves to draw: give at least one metrics.csv")
    metrics = {name: _read_metrics(Path(file)) for name, file in runs.items()}
    with_latents = any(curves["latent_variation"] for curves in metrics.values())
    figure = _figure(8.5, 6.2 if with_latents else 4.2)
    panels = figure.subplots(2 if with_latents else 1, 1, sharex=True, squeeze=False)[:, 0]
    for at, (name, curves) in enumerate(metrics.items()):
        colour, marker, dev = COLOURS[at % len(COLOURS)], MARKERS[at % len(MARKERS)], curves["dev_loss"]
        _draw_smoothed(panels[0], curves["train_loss"], colour, f"{name}, train")
        if dev:
            style = {"color": colour, "linestyle": "--", "marker": marker, "markersize": 5}
            panels[0].plot(list(dev), list(dev.values()), label=f"{name}, dev", **style)
        _draw_smoothed(panels[-1], curves["latent_variation"], colour, name)
    panels[0].set_ylabel("loss (nats per supervised token)")
    panels[0].set_yscale("log")  # from the first step on, without pressing the rest flat
    panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    if with_latents:
        panels[1].set_ylabel("variation of latents\nacross problems (std / rms)")
        panels[1].set_ylim(bottom=0)
    panels[-1].set_xlabel("optimizer step")
    for panel in panels:
        panel.grid(alpha=0.25)
    return _saved(figure, path)


def plot_rewards(rows: Sequence[Mapping[str, str]], path: Path) -> Figure:
    """Of the rows of a GRPO run's `metrics.csv`: samples that were right, by the steps needed."""
    names = [name for name in rows[0] if name == "reward" or name.startswith("right_at_")]
    figure = _figure(8.5, 4.2)
    axes = figure.add_subplot()
    for at, name in enumerate(sorted(names, key=lambda name: (name != "reward", len(name), name))):
        curve = {int(row["step"]): 100 * float(row[name]) for row in rows if row.get(name)}
        label = "drawn problems" if name == "reward" else f"{name.split('_')[2]} steps needed"
        _draw_smoothed(axes, curve, COLOURS[at % len(COLOURS)], label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("samples that are right (%)")
    axes.grid(alpha=0.25)
    return _saved(figure, path)


def plot_halting(chances: Sequence[Sequence[float]], was_right: Sequence[bool], path: Path) -> Figure:
    """The halting probability after every supervision step (`halting_probabilities`), by right and wrong answers."""
    if not chances:
        raise UserMistake("no halting probabilities to draw: this model has no halting head")
    steps = len(chances[0])
    figure = _figure(max(4.5, 2 + 1.2 * steps), 3.4)
    axes = figure.add_subplot()
    for answered, colour, shift, name in ((True, COLOURS[0], -0.18, "right"), (False, COLOURS[1], 0.18, "wrong")):
        rows = [row for row, right in zip(chances, was_right, strict=True) if bool(right) is answered]
        if rows:
            places = [step + shift for step in range(1, steps + 1)]
            drawn = axes.boxplot(list(zip(*rows, strict=True)), positions=places, widths=0.3, showfliers=False)
            for part in (line for lines in drawn.values() for line in lines):
                part.set(color=colour, linewidth=1.5)
            axes.plot([], [], color=colour, linewidth=3, label=f"answered {name} ({len(rows)})")
    axes.axhline(0.5, color="0.35", linestyle=":", linewidth=1.2)
    axes.set_xticks(range(1, steps + 1), range(1, steps + 1))
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("supervision step")
    axes.set_ylabel("halting probability\n(dotted: it would stop above)")
    axes.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return _saved(figure, path)


def plot_attention(words: Sequence[str], shares: Sequence[Sequence[float]], path: Path) -> Figure:
    """Which words of a question each latent reads, `(M, words)`, and what all of them read together."""
    rows = [[float(share) for share in row] for row in shares]
    mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    size = (max(5.0, 1.2 + 0.3 * len(words)), 2.6 + 0.2 * min(len(rows), 32))
    figure = _figure(*size)
    together, each = figure.subplots(2, 1, sharex=True, height_ratios=[1, max(1.0, 0.15 * min(len(rows), 32))])
    together.bar(range(len(words)), [100 * share for share in mean], color=COLOURS[0])
    together.set_ylabel("mean (%)")
    image = each.imshow(rows, aspect="auto", cmap="cividis", vmin=0)
    each.set_ylabel("latent")
    each.set_yticks(range(len(rows)) if len(rows) <= 16 else [0, len(rows) - 1])
    each.set_yticklabels([str(1 + int(tick)) for tick in each.get_yticks()])
    each.set_xticks(range(len(words)), words, rotation=60, ha="right", fontsize=8, parse_math=False)
    figure.colorbar(image, ax=each, label="share of attention", fraction=0.03)
    return _saved(figure, path)


def plot_sweep(measured: Mapping[str, Mapping[str, float]], widths: Sequence[int], path: Path) -> Figure:
    """What compressors of several widths leave unexplained, and the base's loss on it."""
    figure = _figure(8.5, 3.8)
    error, loss = figure.subplots(1, 2)
    for name, colour, marker, style in (("kept", COLOURS[0], "o", "-"), ("PCA", COLOURS[1], "s", "--")):
        for axes, figure_name in ((error, "unexplained"), (loss, "loss")):
            values = [measured[f"{name} {width}"][figure_name] for width in widths]
            label = "compressor" if name == "kept" else name
            axes.plot(widths, values, color=colour, marker=marker, linestyle=style, label=label)
    loss.axhline(measured["base"]["loss"], color="0.35", linestyle=":", label="the base itself")
    error.set_ylabel("share of the variation not restored")
    loss.set_ylabel("loss of the base (nats per token)")
    for axes in (error, loss):
        axes.set_xlabel("D', compressed dimension")
        axes.set_xticks(widths, widths)
        axes.grid(alpha=0.25)
    return _saved(figure, path)


def _draw_smoothed(axes: Axes, curve: Mapping[int, float], colour: str, label: str) -> None:
    """The values themselves, faint, and their running mean over about a thirtieth of the run."""
    if not curve:
        return
    weight, smooth, norm, total = max(0.0, 1 - 30 / len(curve)), [], 0.0, 0.0
    for value in curve.values():
        total, norm = weight * total + value, weight * norm + 1
        smooth.append(total / norm)
    axes.plot(list(curve), list(curve.values()), color=colour, alpha=0.2, linewidth=0.8)
    axes.plot(list(curve), smooth, color=colour, linewidth=1.7, label=label)


def _read_metrics(path: Path) -> Curves:
    """The curves of a metrics file; steps without a value are left out."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such metrics file; train first, or give the run's metrics.csv")
    curves: Curves = {name: {} for name in CURVES}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name in CURVES:
                with suppress(ValueError, TypeError):  # an empty cell, no such column, a line that a crash cut off
                    curves[name][int(row.get("step"))] = float(row.get(name))
    if not curves["train_loss"] and not curves["dev_loss"]:
        raise UserMistake(f"{path} holds no loss: expected a column train_loss or dev_loss")
    return curves


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _saved(figure: Figure, path: Path) -> Figure:
    """Write the figure as a PNG: the old file or the whole new one, never a part."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend() is None and axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=9)
    write_whole(path, lambda temporary: FigureCanvasAgg(figure).print_png(str(temporary)))
    return figure
