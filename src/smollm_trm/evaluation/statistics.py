"""How sure a score is: intervals and paired tests.

Two models that answer the same problems are compared problem by problem. Only the *discordant* problems,
which one model gets right and the other wrong, tell them apart. Everything here is a pure function of grades.

Sources: Wilson (1927); McNemar (1947), in its exact binomial form; Newcombe (1998), *Improved confidence
intervals for the difference between binomial proportions based on paired data*, method 10.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from scipy.stats import binomtest


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share `correct / total`: inside [0, 1] and honest for small counts."""
    if total <= 0 or not 0 <= correct <= total:
        raise ValueError(f"correct={correct} of total={total} is no share; give 0 <= correct <= total, total > 0")
    interval = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that two models are equally good, from the problems that one alone got right."""
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


@dataclass(frozen=True)
class PairedDifference:
    """How much better the first of two models did on the same problems."""

    difference: float  # accuracy of the first minus accuracy of the second, -1 to 1
    low: float
    high: float  # ends of the difference's 95% interval (Newcombe's method 10)
    only_first: int
    only_second: int  # problems that one of the two alone got right
    p_value: float  # exact two-sided McNemar test


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> PairedDifference:
    """Compare two models by their grades on the same problems, in the same order."""
    if not first or len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} grades cannot be paired; grade both on the same problems")
    pairs = [(bool(one), bool(other)) for one, other in zip(first, second, strict=True)]
    both, only_first = pairs.count((True, True)), pairs.count((True, False))
    only_second, total = pairs.count((False, True)), len(pairs)
    phi = corrected_phi(both, only_first, only_second, total - both - only_first - only_second)
    share_first, share_second = (both + only_first) / total, (both + only_second) / total
    low_first, high_first = wilson_interval(both + only_first, total)
    low_second, high_second = wilson_interval(both + only_second, total)

    def reach(of_first: float, of_second: float) -> float:
        return sqrt(max(0.0, of_first**2 - 2 * phi * of_first * of_second + of_second**2))

    difference = share_first - share_second
    return PairedDifference(
        difference=difference,
        low=max(-1.0, difference - reach(share_first - low_first, high_second - share_second)),
        high=min(1.0, difference + reach(high_first - share_first, share_second - low_second)),
        only_first=only_first,
        only_second=only_second,
        p_value=mcnemar_p(only_first, only_second),
    )


def corrected_phi(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Correlation of two models' grades, continuity-corrected (Newcombe); 0 where one never varies."""
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    covariance = both * neither - only_first * only_second
    if covariance > 0:
        covariance = max(covariance - (both + only_first + only_second + neither) / 2, 0)
    return covariance / sqrt(margins) if margins else 0.0
