"""Several models on the same problems: who is better, how surely, and whether the latents matter.

A difference is never shown without its interval. The control that tells latents from decoration is an arm's
twin that answers every problem from another problem's latents (`evaluate_gsm8k(..., latents="shuffled")`):
where that changes nothing (McNemar p > 0.01), the table says "latents ignored".
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from smollm_trm.evaluation.predictions import load_predictions
from smollm_trm.evaluation.statistics import PairedDifference, paired_difference, wilson_interval

SHUFFLED_SUFFIX = ", latents shuffled"
LATENTS_MATTER_BELOW = 0.01  # p-value of "shuffling changes nothing"
CUT_OFF_NOTED_ABOVE = 0.02
_TABLE_HEAD = ("arm", "n", "accuracy [95%]", "strict", "difference [95%]", "p", "latents")


@dataclass(frozen=True)
class ComparedArm:
    """One line of the comparison; shares are 0 to 1."""

    name: str
    """As given."""
    total: int
    """Problems answered."""
    correct: int
    """Problems answered right (flexible score)."""
    accuracy: float
    """`correct / total`."""
    interval: tuple[float, float]
    """Wilson's 95% interval of the accuracy."""
    strict_accuracy: float | None
    """Share answered right after `####`; None where the result does not say."""
    against_baseline: PairedDifference | None
    """This arm minus the baseline, paired; None for the baseline."""
    against_shuffled: PairedDifference | None
    """Its shuffled twin minus this arm, paired; None without a twin."""
    cut_off: float = 0.0
    """Share of its texts that used all tokens without ending."""

    @property
    def latents_are_used(self) -> bool | None:
        """Whether shuffling the latents changes what is right; None where it was not tried."""
        shuffled = self.against_shuffled
        return None if shuffled is None else shuffled.p_value <= LATENTS_MATTER_BELOW

    def verdict(self) -> str:
        """What shuffling showed, in words."""
        if self.against_shuffled is None:
            return ""
        shown = f"({points_with_interval(self.against_shuffled)} when shuffled)"
        return f"latents used {shown}" if self.latents_are_used else f"latents ignored {shown}"


@dataclass(frozen=True)
class Comparison:
    """Arms compared on the same problems; `str()` is a table for a terminal."""

    arms: tuple[ComparedArm, ...]
    """In the order given."""
    baseline: str
    """The arm that differences are taken from."""

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(len(row[column]) for row in cells) for column in range(len(_TABLE_HEAD))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        rule = "  ".join("-" * width for width in widths)
        return "\n".join(line.rstrip() for line in [lines[0], rule, *lines[1:], "", self._legend()])

    def to_markdown(self) -> str:
        """The table for a README, a model card or a notebook."""
        head, *rows = [f"| {' | '.join(row)} |" for row in self._cells()]
        return "\n".join([head, "|" + " --- |" * len(_TABLE_HEAD), *rows, "", self._legend()])

    def to_dict(self) -> dict:
        """Everything as JSON values, for a results file."""
        arms = [
            {**asdict(arm), "interval": list(arm.interval), "latents_are_used": arm.latents_are_used}
            for arm in self.arms
        ]
        return {"baseline": self.baseline, "arms": arms}

    def _cells(self) -> list[tuple[str, ...]]:
        rows = [_TABLE_HEAD]
        for arm in self.arms:
            low, high = arm.interval
            against = arm.against_baseline
            rows.append(
                (
                    arm.name,
                    str(arm.total),
                    f"{100 * arm.accuracy:.1f}% [{100 * low:.1f}, {100 * high:.1f}]",
                    "" if arm.strict_accuracy is None else f"{100 * arm.strict_accuracy:.1f}%",
                    "baseline" if against is None else points_with_interval(against),
                    "" if against is None else p_value_text(against.p_value),
                    arm.verdict(),
                )
            )
        return rows

    def _legend(self) -> str:
        cut = [f" {arm.name}: {100 * arm.cut_off:.0f}%" for arm in self.arms if arm.cut_off > CUT_OFF_NOTED_ABOVE]
        note = f" Texts cut off by max_new_tokens:{','.join(cut)}." if cut else ""
        return (
            f"Differences from '{self.baseline}', paired by problem (Newcombe); p: exact McNemar test. "
            f"Latents are ignored where shuffling them between problems leaves p > {LATENTS_MATTER_BELOW}.{note}"
        )


def points_with_interval(difference: PairedDifference) -> str:
    """A difference in percentage points, always with its interval: `+4.1 points [+0.2, +8.0]`."""
    size, low, high = (100 * share for share in (difference.difference, difference.low, difference.high))
    return f"{size:+.1f} points [{low:+.1f}, {high:+.1f}]"


def p_value_text(p_value: float) -> str:
    """A p-value with two digits, never rounded to zero."""
    return "<0.0001" if p_value < 0.0001 else f"{p_value:.2g}"


def compare_arms(
    results: Mapping[str, dict | str | Path],
    *,
    baseline: str | None = None,
    shuffled: Mapping[str, str] | None = None,
) -> Comparison:
    """Compare arms that were evaluated on the same problems.

    Args:
        results: per arm what `evaluate_gsm8k` returned, or the path of its predictions.
        baseline: arm to take differences from; the first when None.
        shuffled: arm -> the arm that is the same with latents shuffled. When None, an arm `X` and an arm
            `X, latents shuffled` belong together.

    Raises:
        ValueError: no arms, an unknown name, or arms evaluated on different problems.
    """
    if not results:
        raise ValueError("nothing to compare: give at least one arm")
    loaded = {
        name: load_predictions(result) if isinstance(result, (str, Path)) else result
        for name, result in results.items()
    }
    baseline = next(iter(loaded)) if baseline is None else baseline
    if shuffled is None:
        shuffled = {name: name + SHUFFLED_SUFFIX for name in loaded if name + SHUFFLED_SUFFIX in loaded}
    for name in (baseline, *shuffled, *shuffled.values()):
        if name not in loaded:
            raise ValueError(f"there is no arm '{name}'; the arms are: {', '.join(loaded)}")
    _refuse_different_problems(loaded, baseline)
    grades = {name: result["correct_by_problem"] for name, result in loaded.items()}
    arms = []
    for name, result in loaded.items():
        correct, total = sum(grades[name]), len(grades[name])
        against = None if name == baseline else paired_difference(grades[name], grades[baseline])
        texts = total * result.get("settings", {}).get("samples_per_problem", 1)
        twin = paired_difference(grades[shuffled[name]], grades[name]) if name in shuffled else None
        arms.append(
            ComparedArm(
                name=name,
                total=total,
                correct=correct,
                accuracy=correct / total,
                interval=wilson_interval(correct, total),
                strict_accuracy=result.get("strict_accuracy"),
                against_baseline=against,
                against_shuffled=twin,
                cut_off=result.get("cut_off", 0) / texts,
            )
        )
    return Comparison(arms=tuple(arms), baseline=baseline)


def _refuse_different_problems(results: Mapping[str, dict], baseline: str) -> None:
    """Grades are paired by position: all arms must have had the same problems in the same order."""

    def problems(result: dict) -> tuple[int, str | None]:
        return len(result["correct_by_problem"]), result.get("settings", {}).get("problems")

    expected = problems(results[baseline])
    for name, result in results.items():
        if problems(result) != expected:
            raise ValueError(
                f"'{name}' ({problems(result)[0]} problems) and '{baseline}' ({expected[0]}) were evaluated on "
                "different problems; evaluate both on the same ones, in the same order"
            )
