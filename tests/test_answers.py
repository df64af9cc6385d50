"""The grader: which number of a text is its answer, and whether it is right."""

import json
import os
import re
import time
from pathlib import Path

import pytest

from smollm_trm.data.answers import (
    extract_answer,
    extract_strict_answer,
    gold_answer,
    is_correct,
    strip_annotations,
)
from smollm_trm.records import UserMistake

ODD_FORMS = json.loads((Path(__file__).parent / "data" / "odd_answers.json").read_text())
OPENAI_ANSWER = re.compile(r"#### (\-?[0-9\.\,]+)")  # grade-school-math, dataset.py


def openai_grade(text: str, gold: str) -> bool:
    found = OPENAI_ANSWER.search(text)
    return bool(found) and found[1].replace(",", "") == OPENAI_ANSWER.search(gold)[1].replace(",", "")


def gsm8k_rows(part: str) -> list[dict]:
    folder = Path(os.environ.get("GSM8K_DIR", Path(__file__).parents[2] / "shared" / "data" / "gsm8k"))
    if not (folder / f"{part}.jsonl").is_file():
        pytest.skip(f"no {part}.jsonl in {folder}; set GSM8K_DIR to GSM8K's folder")
    return [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("form", ODD_FORMS, ids=lambda form: form["note"])
def test_odd_forms_are_read_as_the_table_says(form):
    assert (extract_answer(form["text"]), extract_strict_answer(form["text"])) == (
        form["flexible"],
        form["strict"],
    )


@pytest.mark.parametrize("part", ["train", "test"])
def test_every_gold_solution_of_gsm8k_is_right_and_a_neighbours_is_not(part):
    answers = [row["answer"] for row in gsm8k_rows(part)]
    for answer, other in zip(answers, answers[1:] + answers[:1], strict=True):
        gold = answer.split("####")[1].strip()
        for right in (answer, f"#### {gold}", gold):
            assert is_correct(strip_annotations(answer), right) and is_correct(answer, right, strict=True)
        assert is_correct(other, gold) == openai_grade(other, answer)


def test_published_model_solutions_get_their_official_grades():
    file = Path(os.environ.get("GSM8K_SOLUTIONS", "example_model_solutions.jsonl"))
    if not file.is_file():
        pytest.skip("set GSM8K_SOLUTIONS to example_model_solutions.jsonl of openai/grade-school-math")
    graded = 0
    for row in map(json.loads, file.read_text().splitlines()):
        gold = row["ground_truth"].rsplit("A:", 1)[1].strip()
        for solution in (value for value in row.values() if isinstance(value, dict)):
            with_hashes = re.sub(r"(?m)^A: ", "#### ", solution["solution"])
            for text, strict in ((solution["solution"], False), (with_hashes, False), (with_hashes, True)):
                assert is_correct(text, gold, strict=strict) == solution["is_correct"], solution
            graded += 1
    assert graded == 5276


@pytest.mark.parametrize("text", ["#### 72", "#### 71", "#### 7,200", "#### -72", "72", "#### none", "", "#### 72.5"])
def test_plain_forms_get_openais_grade(text):
    for gold in ("#### 72", "#### 7,200", "#### -72"):
        assert is_correct(text, gold, strict=True) == openai_grade(text, gold)


def test_numbers_are_compared_by_value():
    for text in ("72", "72.0", "$72", "72.", "144/2", "+72", "72%", "7.2e1", "The answer is 72 apples."):
        assert is_correct(text, "72") and is_correct(text, "#### 72.00")
    for text in ("-72", "7.2", "722", "72.000001", "0.1", "720"):
        assert not is_correct(text, "72")
    assert is_correct("0.3", "3/10") and not is_correct("0.333", "1/3")


def test_the_strict_score_needs_the_mark():
    assert is_correct("The answer is 5", "5") and not is_correct("The answer is 5", "5", strict=True)


def test_no_answer_is_never_right():
    assert not is_correct("", "0") and not is_correct("nothing", "0")


def test_gold_answer_is_a_plain_number():
    assert gold_answer("He pays $1,234.50.\n#### 1,234.50") == "1234.5"


def test_a_solution_without_a_final_answer_is_refused():
    with pytest.raises(UserMistake, match="no final '#### <number>'"):
        gold_answer("He pays 5.")
    with pytest.raises(UserMistake, match="is none; give 'n' or '#### n'"):
        is_correct("5", "?")


@pytest.mark.parametrize(
    ("text", "flexible", "strict"),
    [
        ("It flows north.\n#### the nile!", True, True),
        ("So the answer is Nile. It is long.", True, False),
        ("Answer: the Nile\n\nQuestion: and the other?\nAnswer: Rhine", True, False),
        ("It flows north.\nThe Nile.", True, False),
        ("#### Nile delta", False, False),
        ("The Nile is long.", False, False),
        ("", False, False),
    ],
)
def test_an_answer_in_words_is_compared_without_case_articles_and_punctuation(text, flexible, strict):
    for gold in ("Nile", "#### The Nile", "A long river.\n#### Nile."):
        assert (is_correct(text, gold), is_correct(text, gold, strict=True)) == (flexible, strict), gold


def test_annotations_are_stripped_and_nothing_else():
    assert strip_annotations("48/2 = <<48/2=24>>24 < 30 << 40 >> 1\n<<a=1>>") == "48/2 = 24 < 30  1\n"
    assert strip_annotations("1 < 2 <<no end") == "1 < 2 <<no end"


@pytest.mark.parametrize("piece", ["3", "1 ", "1,", "1/", "\n", "<<", "#", "1e5", "the answer is ", "½"])
def test_a_runaway_generation_is_graded_in_no_time(piece):
    start = time.process_time()
    extract_answer(piece * (20_000 // len(piece)))
    assert time.process_time() - start < 2


def test_a_number_too_long_for_python_integers_is_still_compared():
    assert is_correct("#### " + "3" * 10_000, "3" * 10_000) and not is_correct("3" * 10_000 + "/3", "1")
