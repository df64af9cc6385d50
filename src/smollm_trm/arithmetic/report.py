"""An evaluation as a page of text and as a picture."""

from pathlib import Path

from matplotlib.figure import Figure

from smollm_trm.arithmetic.diagnosis import MISTAKE_KINDS

BREAKDOWNS = {"by_digits": "digits", "by_operands": "operands", "by_carries": "carries"}


def format_evaluation(report: dict) -> str:
    """The report as text: scores, breakdowns, and where chains go wrong.

    Args:
        report: of `evaluate_sums`.
    """
    chain = report["chain_accuracy"]
    lines = [
        f"Exact Match Accuracy: {report['exact_match']:.2%}  "
        f"(95% interval {report['exact_match_95'][0]:.1%} to {report['exact_match_95'][1]:.1%})",
        f"Token-Level Accuracy: {report['token_accuracy']:.2%}",
        f"Right Chains:         {'no chains in this data' if chain is None else f'{chain:.2%}'}",
        f"Number of Examples:   {report['num_examples']}  ({report['problems_per_second']:.0f} problems/s decoded)",
    ]
    for table, title in BREAKDOWNS.items():
        lines += ["", f"{title:>10}  examples  exact match   chain"]
        for key, row in report[table].items():
            chain = "" if row["chain_accuracy"] is None else f"{row['chain_accuracy']:.2%}"
            lines.append(f"{key:>10}  {row['num_examples']:>8}  {row['exact_match']:>11.2%} {chain:>7}")
    if report["mistakes"]:
        lines += ["", "first mistake        kind     count"]
        lines += [f"{row['place']:<20} {row['kind']:<8} {row['count']:>5}" for row in report["mistakes"]]
    if report["wrong"]:
        first = report["wrong"][0]
        lines += ["", f"for example {first['written']}", f"should be   {first['expected']}"]
    return "\n".join(lines)


def plot_evaluation(report: dict, path: Path) -> None:
    """Draw exact match by digits, operands and carries, and the table of first mistakes, as a PNG.

    Args:
        report: of `evaluate_sums`.
        path: of the picture; its folder is made.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")
    panels = figure.subplot_mosaic([list(BREAKDOWNS), ["mistakes"] * len(BREAKDOWNS)])
    for table, title in BREAKDOWNS.items():
        keys = list(report[table])
        bars = panels[table].bar(keys, [100 * report[table][key]["exact_match"] for key in keys], color="tab:blue")
        panels[table].bar_label(bars, [f"n={report[table][key]['num_examples']}" for key in keys], fontsize=7)
        panels[table].set(xlabel=title, ylim=(0, 108))
    panels["by_digits"].set_ylabel("exact match, %")
    _draw_mistakes(panels["mistakes"], report["mistakes"])
    figure.suptitle(f"{report['num_examples']} problems, exact match {report['exact_match']:.2%}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_mistakes(panel: object, mistakes: list[dict]) -> None:
    panel.set_title("where a completion first goes wrong")
    if not mistakes:
        panel.text(0.5, 0.5, "no mistakes", ha="center", va="center", transform=panel.transAxes)
        panel.set_axis_off()
        return
    places = sorted({row["place"] for row in mistakes}, key=lambda place: (place == "answer", len(place), place))
    counts = [[0] * len(MISTAKE_KINDS) for _ in places]
    for row in mistakes:
        counts[places.index(row["place"])][MISTAKE_KINDS.index(row["kind"])] = row["count"]
    panel.imshow(counts, cmap="Reds", aspect="auto")
    panel.set_xticks(range(len(MISTAKE_KINDS)), MISTAKE_KINDS)
    panel.set_yticks(range(len(places)), places)
    for row_number, row in enumerate(counts):
        for column, count in enumerate(row):
            if count:
                panel.text(column, row_number, str(count), ha="center", va="center")
