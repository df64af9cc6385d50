"""A comparison for a reader: what it showed in whole sentences, and its table as HTML."""

from html import escape

from smollm_trm.evaluation.compare import SHUFFLED_SUFFIX, ComparedArm, Comparison, points_with_interval

SURE_AT = 0.05
VERDICTS = {
    "latents used": "the latents are used",
    "latents ignored": "the latents are ignored, they are a soft prompt at most",
    "too few problems to tell": "these are too few problems to tell whether the latents are used",
}
CELL = "padding:4px 10px;text-align:left;border-bottom:1px solid rgba(128,128,128,.35)"


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
    names = ("", "solved", "95%", f"against {comparison.baseline}", "latents")
    head = "".join(f'<th style="{CELL}">{escape(name)}</th>' for name in names)
    rows = "".join(f"<tr>{_row(arm)}</tr>" for arm in comparison.arms)
    said = "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict_in_words(comparison))
    legend = str(comparison).rpartition("\n")[2]
    return (
        f'<div style="max-width:60em"><p><b>{escape(headline)}</b></p><ul>{said}</ul>'
        f'<div style="overflow-x:auto"><table style="border-collapse:collapse"><tr>{head}</tr>{rows}</table></div>'
        f'<p style="font-size:85%;opacity:.75">{comparison.arms[0].total} problems. {escape(legend)}</p></div>'
    )


def _row(arm: ComparedArm) -> str:
    share, (low, high) = 100 * arm.accuracy, (100 * end for end in arm.interval)
    against = "" if arm.against_baseline is None else points_with_interval(arm.against_baseline)
    bar = f'<div style="height:6px;width:{share:.1f}%;background:#0072B2"></div>'
    cells = (
        f"<b>{escape(arm.name)}</b>",
        f'<div style="min-width:110px">{share:.1f}%{bar}</div>',
        f"{low:.1f} to {high:.1f}",
        against or "baseline",
        arm.latents_verdict or "",
    )
    return "".join(f'<td style="{CELL}">{cell}</td>' for cell in cells)
