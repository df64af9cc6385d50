"""How sure a score is: intervals, paired tests, and what a halting head knows.

Two models that answer the same problems are compared problem by problem. Only the *discordant* problems,
which one model gets right and the other wrong, tell them apart. Everything here is a pure function of grades.

Sources: Wilson (1927); McNemar (1947), in its exact binomial form; Newcombe (1998), *Improved confidence
intervals for the difference between binomial proportions based on paired data*, method 10.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from scipy.stats import binomtest, norm, rankdata


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share `correct / total`: inside [0, 1] and honest for small counts.

    Raises:
        ValueError: `total` is not positive or `correct` is not within 0..total.
    """
    if total <= 0 or not 0 <= correct <= total:
        raise ValueError(f"correct={correct} of total={total} is no share; give 0 <= correct <= total, total > 0")
    z = float(norm.ppf(0.5 + confidence / 2))
    share, spread = correct / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that two models are equally good, from their discordant problems.

    Args:
        only_first: problems that the first model alone got right.
        only_second: problems that the second model alone got right.
    """
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


@dataclass(frozen=True)
class PairedDifference:
    """How much better the first of two models did on the same problems."""

    difference: float
    """Accuracy of the first minus accuracy of the second, -1 to 1."""
    low: float
    """Lower end of the difference's 95% interval (Newcombe's method 10)."""
    high: float
    """Upper end of it."""
    only_first: int
    """Problems that the first alone got right."""
    only_second: int
    """Problems that the second alone got right."""
    p_value: float
    """Exact two-sided McNemar test."""


def paired_difference(first: Sequence[bool], second: Sequence[bool], confidence: float = 0.95) -> PairedDifference:
    """Compare two models by their grades on the same problems, in the same order.

    Raises:
        ValueError: the lists are empty or of different lengths.
    """
    if not first or len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} grades cannot be paired; grade both on the same problems")
    pairs = [(bool(one), bool(other)) for one, other in zip(first, second, strict=True)]
    both, only_first = pairs.count((True, True)), pairs.count((True, False))
    only_second, neither = pairs.count((False, True)), pairs.count((False, False))
    total = len(pairs)
    share_first, share_second = (both + only_first) / total, (both + only_second) / total
    low_first, high_first = wilson_interval(both + only_first, total, confidence)
    low_second, high_second = wilson_interval(both + only_second, total, confidence)
    phi = _corrected_phi(both, only_first, only_second, neither)
    difference = share_first - share_second

    def reach(towards_first: float, towards_second: float) -> float:
        squared = towards_first**2 - 2 * phi * towards_first * towards_second + towards_second**2
        return sqrt(max(0.0, squared))

    return PairedDifference(
        difference=difference,
        low=max(-1.0, difference - reach(share_first - low_first, high_second - share_second)),
        high=min(1.0, difference + reach(high_first - share_first, share_second - low_second)),
        only_first=only_first,
        only_second=only_second,
        p_value=mcnemar_p(only_first, only_second),
    )


def _corrected_phi(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Correlation of two models' grades, continuity-corrected (Newcombe); 0 where one never varies."""
    margins = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    if margins == 0:
        return 0.0
    covariance = both * neither - only_first * only_second
    if covariance > 0:
        covariance = max(covariance - (both + only_first + only_second + neither) / 2, 0)
    return covariance / sqrt(margins)


@dataclass(frozen=True)
class HaltingReport:
    """Whether a halting head's probability tells right answers from wrong ones."""

    auroc: float | None
    """Chance that a right answer has the higher probability (0.5: knows nothing), or None if all agree."""
    base_rate: float
    """Share of right answers: the accuracy of always predicting the commoner grade is max(rate, 1 - rate)."""


def halting_report(probabilities: Sequence[float], was_right: Sequence[bool]) -> HaltingReport:
    """Judge halting probabilities by the answers' grades: area under the ROC curve (ties count half).

    Raises:
        ValueError: the lists are empty or of different lengths.
    """
    if not len(probabilities) or len(probabilities) != len(was_right):
        raise ValueError(f"{len(probabilities)} probabilities and {len(was_right)} grades; give one of each a problem")
    right = [bool(grade) for grade in was_right]
    total, positives = len(right), sum(right)
    auroc = None
    if 0 < positives < total:
        ranks = rankdata(probabilities)
        rank_sum = float(sum(rank for rank, grade in zip(ranks, right, strict=True) if grade))
        auroc = (rank_sum - positives * (positives + 1) / 2) / (positives * (total - positives))
    return HaltingReport(auroc=auroc, base_rate=positives / total)
