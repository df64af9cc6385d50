"""Where a completion goes wrong, what the screen shows of it, and what may be typed."""

import pytest

from smollm_trm.arithmetic.evaluation import format_evaluation, judge_completion, plot_evaluation
from smollm_trm.arithmetic.interactive import check_expression, describe_completion

GOLD = "99+21=<think>9+1=10 9+2+1=12</think>120<end>"


@pytest.mark.parametrize(
    ("written", "answer_right", "chain_right", "place", "kind"),
    [
        (GOLD, True, True, "", ""),
        ("99+21=<think>9+1=10 9+2+1=12</think>110<end>", False, True, "answer", "number"),
        ("99+21=<think>9+1=10 9+2+1=12</think>120", False, True, "answer", "no end"),
        ("99+21=<think>9+1=10 9+2+1=12</think>1+<end>", False, True, "answer", "form"),
        ("99+21=<think>9+1=10 9+2+1=11</think>120<end>", True, False, "column 2", "total"),
        ("99+21=<think>9+1=10 9+2=11</think>110<end>", False, False, "column 2", "carry"),
        ("99+21=<think>9+1=10 9+3+1=13</think>130<end>", False, False, "column 2", "digits"),
        ("99+21=<think>9+2=11 9+2+1=12</think>121<end>", False, False, "column 1", "digits"),
        ("99+21=<think>9+1=10 9=2</think>120<end>", True, False, "column 2", "digits"),
        ("99+21=<think>9+1=10 +2+1=12</think>120<end>", True, False, "column 2", "form"),
        ("99+21=<think>9+1=10</think>120<end>", True, False, "column 2", "missing"),
        ("99+21=<think>9+1=10 9+2+1=12 0+1=1</think>120<end>", True, False, "column 3", "extra"),
        ("99+21=<think>9+1=10 9+2+1=12", False, False, "column 2", "no end"),
        ("99+21=120<end>", True, False, "column 1", "form"),
        ("99+21=", False, False, "column 1", "form"),
    ],
)
def test_the_first_mistake_is_found_and_named(written, answer_right, chain_right, place, kind):
    judged = judge_completion(GOLD, written)
    assert (judged.answer_right, judged.chain_right, judged.place, judged.kind) == (
        answer_right,
        chain_right,
        place,
        kind,
    )


def test_a_sum_without_chain_is_judged_by_its_answer():
    assert judge_completion("3+5=8<end>", "3+5=8<end>").answer_right
    assert judge_completion("3+5=8<end>", "3+5=8<end>").chain_right is None
    wrong = judge_completion("3+5=8<end>", "3+5=9<end>")
    assert (wrong.answer_right, wrong.place, wrong.kind) == (False, "answer", "number")
    thought = judge_completion("3+5=8<end>", "3+5=<think>3+5=8</think>8<end>")
    assert (thought.answer_right, thought.kind) == (False, "form")


@pytest.mark.parametrize("text", ["3+5=", "7+", "12", " 12 + 34 = ", "0+0=", "1+2+3="])
def test_whole_and_begun_sums_are_accepted(text):
    assert check_expression(text, max_tokens=126) == text.replace(" ", "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "type a sum"),
        ("3-5=", "only digits, \\+ and = are known, not -"),
        ("three", "only digits, \\+ and = are known, not e h r t"),
        ("3+5=8", "stop at the equals sign"),
        ("3==", "stop at the equals sign"),
        ("+5=", "a number is missing"),
        ("3++5=", "a number is missing"),
        ("3+=", "a number is missing"),
        ("=", "a number is missing"),
        ("5=", "one number is no sum"),
        ("007+1=", "write 7 instead of 007"),
        ("1+" * 70 + "1=", "has 142 tokens, but there is room for 126"),
    ],
)
def test_what_cannot_be_typed_is_explained(text, message):
    with pytest.raises(ValueError, match=message):
        check_expression(text, max_tokens=126)


def test_the_chain_is_shown_step_by_step_as_in_the_document():
    assert describe_completion("99+21=", GOLD) == [
        "✨ Model output: 99+21=<think>9+1=10 9+2+1=12</think>120<end>",
        "🤔 Chain of thought:",
        "  99+21=",
        "  🧮 Think:",
        "    9+1=10",
        "    9+2+1=12",
        "  120<end>",
        "✅ Answer: 99+21=120",
    ]


def test_wrong_steps_and_answers_are_marked_with_the_right_ones():
    shown = describe_completion("99+21=", "99+21=<think>9+1=10 9+2+1=11 0+1=1 1+0=1</think>110<end>")
    assert "    9+2+1=11  ✗ (right: 9+2+1=12)" in shown
    assert "    0+1=1  ✗ (right: nothing more)" in shown
    assert shown[-1] == "❌ Answer: 99+21=110 (right: 120)"


def test_a_short_or_unfinished_completion_is_shown_as_it_is():
    assert describe_completion("3+5=", "3+5=8<end>") == [
        "✨ Model completion: '3+5=' → '3+5=8<end>'",
        "✅ Answer: 3+5=8",
    ]
    assert describe_completion("7+", "7+3=10<end>")[-1] == "✅ Answer: 7+3=10"
    assert "cut before <end>" in describe_completion("7+", "7+3=1")[-1]
    assert describe_completion("15+6=", "15+6=12<end>", digit_order="reversed")[-1] == "✅ Answer: 15+6=12"


def test_colours_only_add_colour():
    coloured = "\n".join(describe_completion("99+21=", GOLD, coloured=True))
    assert "\033[32m✅" in coloured
    for code in ("\033[32m", "\033[36m", "\033[1m", "\033[0m"):
        coloured = coloured.replace(code, "")
    assert coloured == "\n".join(describe_completion("99+21=", GOLD))


def a_report(mistakes: list[dict], wrong: list[dict]) -> dict:
    row = {"num_examples": 4, "exact_match": 0.75, "exact_match_95": [0.3, 0.95], "chain_accuracy": 0.5}
    return {
        **row,
        "token_accuracy": 0.9,
        "problems_per_second": 1000.0,
        "mistakes": mistakes,
        "wrong": wrong,
        "by_digits": {"2": row},
        "by_operands": {"2": row},
        "by_carries": {"0": {**row, "chain_accuracy": None}},
    }


def test_a_report_says_its_scores_and_draws_them(tmp_path):
    mistakes = [
        {"place": "column 2", "kind": "carry", "count": 3},
        {"place": "answer", "kind": "number", "count": 1},
    ]
    text = format_evaluation(a_report(mistakes, [{"written": "1+1=3<end>", "expected": "1+1=2<end>"}]))
    for words in (
        "Exact Match Accuracy: 75.00%",
        "Token-Level Accuracy: 90.00%",
        "column 2",
        "carry",
        "1+1=3<end>",
    ):
        assert words in text
    for name, report in (("wrong", a_report(mistakes, [])), ("right", a_report([], []))):
        plot_evaluation(report, tmp_path / "plots" / f"{name}.png")
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
