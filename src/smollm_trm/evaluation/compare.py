"""Several models on the same problems: who is better, how surely, and whether the latents matter.

A difference is never shown without its interval. The control that tells latents from decoration is an arm's
twin that answers every problem from another problem's latents (`evaluate_gsm8k(..., latents="shuffled")`):
latents are *used* where that changes what is right (McNemar p <= 0.01), *ignored* where the whole interval of
its effect lies within 5 points, and otherwise the problems are too few to tell.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from smollm_trm.evaluation.predictions import load_predictions
from smollm_trm.evaluation.statistics import PairedDifference, paired_difference, wilson_interval
from smollm_trm.records import UserMistake

SHUFFLED_SUFFIX = ", latents shuffled"
SHUFFLING_MATTERS_AT = 0.01  # p-value of "shuffling changes nothing"
NEGLIGIBLE_EFFECT = 0.05  # of shuffling on the share solved
CUT_OFF_NOTED_ABOVE = 0.02
SURE_AT = 0.05
VERDICTS = {
    "latents used": "the latents are used",
    "latents ignored": "the latents are ignored, they are a soft prompt at most",
    "too few problems to tell": "these are too few problems to tell whether the latents are used",
}


@dataclass(frozen=True)
class ComparedArm:
    """One line of the comparison; shares are 0 to 1."""

    name: str
    total: int
    correct: int  # problems answered right (flexible score)
    accuracy: float
    interval: tuple[float, float]  # wilson's 95% interval of the accuracy
    strict_accuracy: float | None  # share answered right after `####`; None where the result does not say
    against_baseline: PairedDifference | None  # this arm minus the baseline, paired; None for the baseline
    against_shuffled: PairedDifference | None  # its shuffled twin minus this arm, paired; None without a twin
    asked: str = ""  # how, where it was not in plain format and 0-shot
    cut_off: float = 0.0  # share of its texts that used all tokens without ending

    @property
    def latents_verdict(self) -> str | None:
        """What shuffling the latents showed: used, ignored, or too few problems; None where it was not tried."""
        effect = self.against_shuffled
        if effect is None:
            return None
        if effect.p_value <= SHUFFLING_MATTERS_AT:
            return "latents used"
        small = max(-effect.low, effect.high) < NEGLIGIBLE_EFFECT
        return "latents ignored" if small else "too few problems to tell"

    def cells(self) -> tuple[str, ...]:
        low, high = self.interval
        against, shuffled = self.against_baseline, self.against_shuffled
        return (
            self.name + (f" ({self.asked})" if self.asked else ""),
            str(self.total),
            f"{100 * self.accuracy:.1f}% [{100 * low:.1f}, {100 * high:.1f}]",
            "" if self.strict_accuracy is None else f"{100 * self.strict_accuracy:.1f}%",
            "baseline" if against is None else points_with_interval(against),
            "" if against is None else "<0.0001" if against.p_value < 0.0001 else f"{against.p_value:.2g}",
            "" if shuffled is None else f"{self.latents_verdict} ({points_with_interval(shuffled)} when shuffled)",
        )


@dataclass(frozen=True)
class Comparison:
    """Arms compared on the same problems, in the order given; `str()` is a table, which is Markdown as well."""

    arms: tuple[ComparedArm, ...]
    baseline: str  # the arm that differences are taken from

    def __str__(self) -> str:
        cells = self.cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, tuple("-" * width for width in widths))
        rows = (" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)
        return "\n".join([*(f"| {row} |" for row in rows), "", self.legend()])

    def cells(self) -> list[tuple[str, ...]]:
        head = ("arm", "n", "accuracy [95%]", "strict", "difference [95%]", "p", "latents")
        return [head, *(arm.cells() for arm in self.arms)]

    def legend(self) -> str:
        cut = [f" {arm.name}: {100 * arm.cut_off:.0f}%" for arm in self.arms if arm.cut_off > CUT_OFF_NOTED_ABOVE]
        note = f" Texts cut off by max_new_tokens:{','.join(cut)}." if cut else ""
        return (
            f"Differences from '{self.baseline}', paired by problem (Newcombe); p: exact McNemar test. "
            f"Latents are used where shuffling them between problems gives p <= {SHUFFLING_MATTERS_AT}, "
            f"ignored where its whole interval lies within {100 * NEGLIGIBLE_EFFECT:.0f} points.{note}"
        )

    def to_dict(self) -> dict:
        """Everything as JSON values, for a results file."""
        arms = [{**asdict(arm), "latents_verdict": arm.latents_verdict} for arm in self.arms]
        return {"baseline": self.baseline, "arms": arms}


def points_with_interval(difference: PairedDifference) -> str:
    """A difference in percentage points, always with its interval: `+4.1 points [+0.2, +8.0]`."""
    size, low, high = (100 * share for share in (difference.difference, difference.low, difference.high))
    return f"{size:+.1f} points [{low:+.1f}, {high:+.1f}]"


def compare_arms(results: Mapping[str, dict | str | Path], *, baseline: str | None = None) -> Comparison:
    """Compare arms that were evaluated on the same problems; `X, latents shuffled` is the shuffled twin of arm `X`."""
    if not results:
        raise UserMistake("nothing to compare: give at least one arm")
    loaded = {name: load_predictions(one) if isinstance(one, (str, Path)) else one for name, one in results.items()}
    baseline = next(iter(loaded)) if baseline is None else baseline
    if baseline not in loaded:
        raise UserMistake(f"there is no arm '{baseline}'; the arms are: {', '.join(loaded)}")
    problems = {name: (len(one["correct_by_problem"]), one["settings"]["problems"]) for name, one in loaded.items()}
    for name, its_problems in problems.items():  # grades are paired by position
        if its_problems != problems[baseline]:
            raise UserMistake(
                f"'{name}' ({its_problems[0]} problems) and '{baseline}' ({problems[baseline][0]}) were evaluated on "
                "different problems; evaluate both on the same ones, in the same order"
            )
    return Comparison(arms=tuple(compared_arm(name, loaded, baseline) for name in loaded), baseline=baseline)


def compared_arm(name: str, results: Mapping[str, dict], baseline: str) -> ComparedArm:
    """An arm's line, from its own result, the baseline's and its shuffled twin's."""
    grades = {arm: result["correct_by_problem"] for arm, result in results.items()}
    own, twin, result = grades[name], grades.get(name + SHUFFLED_SUFFIX), results[name]
    correct, total = sum(own), len(own)
    shots, prompt_format = (result["settings"].get(key) for key in ("shots", "prompt_format"))
    asked = [f"{shots}-shot"] * bool(shots) + [f"{prompt_format} format"] * bool(prompt_format)
    return ComparedArm(
        name=name,
        total=total,
        correct=correct,
        accuracy=correct / total,
        interval=wilson_interval(correct, total),
        strict_accuracy=result.get("strict_accuracy"),
        against_baseline=None if name == baseline else paired_difference(own, grades[baseline]),
        against_shuffled=None if twin is None else paired_difference(twin, own),
        asked=", ".join(asked),
        cut_off=result.get("cut_off", 0) / total / result["settings"].get("samples_per_problem", 1),
    )


def verdict_in_words(comparison: Comparison) -> list[str]:
    """For each arm but the controls: is it better or worse than the baseline, and are its latents used?"""
    sentences = []
    for arm in comparison.arms:
        against, shuffled = arm.against_baseline, arm.against_shuffled
        if against is not None and not arm.name.endswith(SHUFFLED_SUFFIX):
            said = "is, as far as these problems show, neither better nor worse"
            if against.p_value <= SURE_AT:
                said = f"is {'better' if against.difference > 0 else 'worse'}"
            chance = "p < 0.0001" if against.p_value < 0.0001 else f"p = {against.p_value:.2g}"
            points = points_with_interval(against)
            sentences.append(f"{arm.name} {said} than {comparison.baseline}: {points}, {chance}.")
        if shuffled is not None:
            effect = f"{points_with_interval(shuffled)} with the latents of other problems"
            sentences.append(f"In {arm.name} {VERDICTS[arm.latents_verdict]}: {effect}.")
    return sentences


def comparison_html(comparison: Comparison, *, headline: str = "") -> str:
    """Headline, sentences and table; it scrolls sideways where a screen is narrow."""
    style = "padding:4px 10px;text-align:left;border-bottom:1px solid rgba(128,128,128,.35)"
    head, *arms = [[escape(cell) for cell in row] for row in comparison.cells()]
    rows = [[f"<b>{cell}</b>" for cell in head], *([f"<b>{name}</b>", *cells] for name, *cells in arms)]
    rows = [[f'<td style="{style}">{cell}</td>' for cell in row] for row in rows]
    table = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict_in_words(comparison))
    return (
        f'<div style="max-width:60em"><p><b>{escape(headline)}</b></p><ul>{said}</ul>'
        f'<div style="overflow-x:auto"><table style="border-collapse:collapse">{table}</table></div>'
        f'<p style="font-size:85%;opacity:.75">{escape(comparison.legend())}</p></div>'
    )
