"""The comparison: paired, with intervals, and honest about latents that do nothing."""

import json
import re
from types import SimpleNamespace

import pytest

from smollm_trm.evaluation import arms
from smollm_trm.evaluation.compare import SHUFFLED_SUFFIX, compare_arms
from smollm_trm.evaluation.predictions import PredictionFile, graded_prediction
from smollm_trm.evaluation.statistics import mcnemar_p, paired_difference, wilson_interval
from smollm_trm.records import UserMistake


def result(grades: str, problems: str = "same") -> dict:
    right = [grade == "1" for grade in grades]
    return {
        "correct_by_problem": right,
        "strict_accuracy": sum(right) / len(right),
        "settings": {"problems": problems, "total": len(right)},
    }


ARMS = {
    "base": result("1" * 40 + "0" * 60),
    "LoRA": result("1" * 45 + "0" * 55),
    "LoRA + TRM": result("0" * 5 + "1" * 60 + "0" * 35),
    "LoRA + TRM, latents shuffled": result("0" * 5 + "1" * 30 + "0" * 65),
    "static": result("1" * 50 + "0" * 50),
    "static, latents shuffled": result("1" * 46 + "0" * 54),
    "pause": result("1" * 50 + "0" * 50),
    "pause, latents shuffled": result("1" * 49 + "0" * 51),
}


def test_the_table_says_how_an_untuned_base_was_asked():
    how = {"shots": 8, "prompt_format": "chat"}
    asked = {**ARMS["base"], "settings": {**ARMS["base"]["settings"], **how}}
    table = str(compare_arms({"base": asked, "LoRA": ARMS["LoRA"]}))
    assert "| base (8-shot, chat format) |" in table and "| LoRA  " in table


def test_differences_are_paired_against_the_baseline():
    comparison = compare_arms(ARMS, baseline="LoRA")
    arms = {arm.name: arm for arm in comparison.arms}
    assert list(arms) == list(ARMS) and arms["LoRA"].against_baseline is None
    trm = arms["LoRA + TRM"]
    first, second = ARMS["LoRA + TRM"]["correct_by_problem"], ARMS["LoRA"]["correct_by_problem"]
    assert trm.against_baseline == paired_difference(first, second)
    assert trm.against_baseline.p_value == mcnemar_p(20, 5)
    assert (trm.correct, trm.total, trm.interval) == (60, 100, wilson_interval(60, 100))


def test_the_verdict_on_latents_is_used_ignored_or_too_few_problems():
    arms = {arm.name: arm for arm in compare_arms(ARMS).arms}
    assert arms["LoRA + TRM"].latents_verdict == "latents used"
    assert arms["static"].latents_verdict == "too few problems to tell"  # 4 of 100 changed: p = 0.125, up to 10 points
    assert arms["pause"].latents_verdict == "latents ignored"
    assert arms["base"].latents_verdict is None
    table = str(compare_arms(ARMS))
    assert "latents used (-30.0 points [" in table and "too few problems to tell (-4.0 points [" in table
    assert "latents ignored (-1.0 points [" in table


def judged(n: int, only_own: int, only_shuffled: int, both: int) -> str | None:
    own = "1" * both + "1" * only_own + "0" * only_shuffled + "0" * (n - both - only_own - only_shuffled)
    other = "1" * both + "0" * only_own + "1" * only_shuffled + "0" * (n - both - only_own - only_shuffled)
    return compare_arms({"x": result(own), "x, latents shuffled": result(other)}).arms[0].latents_verdict


@pytest.mark.parametrize(("changed", "used"), [(7, False), (8, True)])  # exact p: 2/2**7 = 0.0156, 2/2**8 = 0.0078
def test_latents_are_used_from_one_percent_on_in_either_direction(changed, used):
    assert (judged(100, changed, 0, 42) == judged(100, 0, changed, 42) == "latents used") is used


def test_latents_are_ignored_only_where_five_points_either_way_are_excluded():
    assert judged(1000, 20, 20, 500) == "latents ignored"
    assert judged(5, 0, 0, 0) == judged(60, 2, 2, 20) == "too few problems to tell"
    for verdict, more, fewer in (("latents ignored", 17, 7), ("too few problems to tell", 18, 7)):
        assert judged(400, more, fewer, 200) == judged(400, fewer, more, 200) == verdict  # 4.9 or 5.2 points, p > 0.01
    assert judged(100_000, 500, 300, 50_000) == "latents used"  # 0.2 points, but surely


def test_no_number_of_points_stands_without_its_interval():
    table = str(compare_arms(ARMS))
    found = re.findall(r"[+-]\d+\.\d points(.{3})", table)
    assert len(found) == 10 and all(re.match(r" \[[+-]", rest) for rest in found)
    assert "latents ignored" in table and "latents used" in table
    assert all(name in table for name in ARMS)


def test_the_text_table_is_aligned_and_the_markdown_one_is_whole():
    comparison = compare_arms(ARMS)
    lines = str(comparison).splitlines()
    column = lines[0].index("accuracy")
    assert all(re.match(r"\d+\.\d% \[", line[column:]) for line in lines[2:10])
    assert {row.count("|") for row in lines[:10]} == {8}


def test_p_values_are_never_rounded_to_nothing():
    table = str(compare_arms({"a": result("1" * 100), "b": result("0" * 100)}))
    assert "<0.0001" in table and re.search(r"\s0(\.0*)?\s", table) is None


def test_predictions_on_disk_are_compared_like_results(tmp_path):
    def line(index: int, right: bool) -> dict:
        written = SimpleNamespace(text="#### 1" if right else "#### 2", n_tokens=1, cut_off=False)
        return graded_prediction(index, {"question": f"q{index}", "answer": "#### 1"}, [written], seconds=0.1)

    for name, grades in (("a", "1100"), ("b", "1000")):
        settings = result(grades)["settings"]
        file = PredictionFile(settings=settings, path=tmp_path / f"{name}.jsonl", rows=[])
        file.add([line(index, grade == "1") for index, grade in enumerate(grades)])
    comparison = compare_arms({"a": tmp_path / "a.jsonl", "b": str(tmp_path / "b.jsonl")})
    assert [arm.correct for arm in comparison.arms] == [2, 1]
    assert json.loads(json.dumps(comparison.to_dict()))["arms"][1]["against_baseline"]["difference"] == -0.25


def test_arms_on_different_problems_are_refused_by_name():
    for other in (result("1" * 100, problems="others"), result("1" * 99)):
        with pytest.raises(UserMistake, match=r"'other' \(\d+ problems\) and 'base' \(100\) .* different problems"):
            compare_arms({**ARMS, "other": other}, baseline="base")


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(UserMistake, match="there is no arm 'bass'; the arms are: base, LoRA"):
        compare_arms(ARMS, baseline="bass")
    with pytest.raises(UserMistake, match="nothing to compare"):
        compare_arms({})


def test_an_arm_with_latents_is_also_judged_with_those_of_other_problems(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(arms, "evaluate_gsm8k", lambda model, rows, **options: asked.append(options) or {})
    assert set(arms.evaluate_arm("LoRA", SimpleNamespace(use_trm=False), [], tmp_path)) == {"LoRA"}
    found = arms.evaluate_arm("LoRA + TRM", SimpleNamespace(use_trm=True), [], tmp_path, seed=3)
    assert set(found) == {"LoRA + TRM", "LoRA + TRM" + SHUFFLED_SUFFIX}
    assert [options.get("latents", "own") for options in asked] == ["own", "own", "shuffled"]
    assert len({options["predictions_path"] for options in asked}) == 3 and asked[2]["seed"] == 3


def test_an_arm_whose_texts_were_cut_off_is_noted_above_two_percent():
    def cut(number: int, samples: int = 1) -> dict:
        settings = {"problems": "same", "samples_per_problem": samples}
        return {**result("1" * 50), "cut_off": number, "settings": settings}

    comparison = compare_arms({"few": cut(1), "many": cut(2), "voting": cut(3, samples=3), "old": result("1" * 50)})
    assert [arm.cut_off for arm in comparison.arms] == [0.02, 0.04, 0.02, 0.0]
    assert str(comparison).endswith("Texts cut off by max_new_tokens: many: 4%.")
