"""Data sets of sums: no leak, exact counts, the same bytes from the same seed, refusals."""

import json
from itertools import combinations_with_replacement

import numpy as np
import pytest

from smollm_trm.arithmetic.commands import generate_arithmetic
from smollm_trm.arithmetic.data_set import (
    ProblemKind,
    draw_data_set,
    draw_problems,
    make_parts,
    operand_sets,
    read_data_folder,
    read_sum_file,
)
from smollm_trm.arithmetic.rules import read_sum
from smollm_trm.arithmetic.settings import SumSettings


def test_no_problem_stands_in_two_parts_in_any_order():
    parts = make_parts(SumSettings(num_examples=5000))
    as_sets = [{tuple(sorted(read_sum(line).operands)) for line in lines} for lines in parts.values()]
    assert [len(part) for part in as_sets] == [4000, 500, 500]  # and none twice in one part
    assert len(set.union(*as_sets)) == 5000


def test_all_problems_there_are_can_be_asked_for_and_not_one_more():
    everything = [
        tuple(sorted(operands)) for operands in draw_data_set(SumSettings(num_examples=275, max_digits=1, seed=3))
    ]
    numbers = range(10)
    assert sorted(everything) == sorted(
        [*combinations_with_replacement(numbers, 2), *combinations_with_replacement(numbers, 3)]
    )
    with pytest.raises(ValueError, match="num_examples is 276, but there are only 275 different problems"):
        draw_data_set(SumSettings(num_examples=276, max_digits=1, seed=3))


def test_the_count_of_a_kind_is_what_listing_it_gives():
    for kind in (ProblemKind(operands, digits) for operands in (2, 3) for digits in (1, 2)):
        longest = [len(str(max(s))) for s in combinations_with_replacement(range(100), kind.operands)]
        assert kind.available == longest.count(kind.digits)


def test_drawn_problems_are_different_and_of_their_kind():
    for kind, count in ((ProblemKind(2, 1), 55), (ProblemKind(3, 2), 2000), (ProblemKind(4, 6), 3000)):
        drawn = draw_problems(kind, count, np.random.default_rng(0))
        assert drawn.shape == (count, kind.operands)
        assert len({tuple(row) for row in drawn.tolist()}) == count
        assert {len(str(max(row))) for row in drawn.tolist()} == {kind.digits}


def test_short_problems_are_all_there_and_long_ones_share_the_rest():
    problems = draw_data_set(SumSettings(num_examples=3000, max_digits=2, seed=0))
    kinds = [(len(operands), len(str(max(operands)))) for operands in problems]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        (2, 1): 55,
        (3, 1): 220,
        (2, 2): 1362,
        (3, 2): 1363,
    }


def test_operands_come_in_both_orders():
    problems = draw_data_set(SumSettings(num_examples=1000, max_digits=2, max_operands=2, seed=0))
    ascending = sum(first < second for first, second in problems)
    assert 400 < ascending < 600


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        generate_arithmetic(SumSettings(num_examples=300, seed=seed, output_dir=str(tmp_path / name)))
    a, b, c = ((tmp_path / name / "train.json").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_metadata_say_what_made_the_file(tmp_path):
    text = generate_arithmetic(SumSettings(num_examples=300, max_digits=3, seed=7, output_dir=str(tmp_path)))
    assert "train 240, val 30, test 30" in text
    written = json.loads((tmp_path / "test.json").read_text())
    assert written["metadata"]["part"] == "test"
    assert written["metadata"]["count"] == len(written["examples"]) == 30
    assert written["metadata"]["settings"]["seed"] == 7
    assert written["metadata"]["settings"]["max_digits"] == 3
    assert SumSettings(**written["metadata"]["settings"]) == SumSettings(num_examples=300, max_digits=3, seed=7)


def test_what_is_written_is_read_back(tmp_path):
    generate_arithmetic(SumSettings(num_examples=300, digit_order="reversed", chain=False, output_dir=str(tmp_path)))
    files = read_data_folder(tmp_path)
    assert {part: len(file.examples) for part, file in files.items()} == {"train": 240, "val": 30, "test": 30}
    assert files["test"].digit_order == "reversed"
    assert len({file.fingerprint for file in files.values()}) == 3


def test_a_plain_list_is_a_test_set(tmp_path):
    (tmp_path / "mine.json").write_text('["3+5=8<end>", "12+34=<think>2+4=6 1+3=4</think>46<end>"]')
    assert len(read_sum_file(tmp_path / "mine.json").examples) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_operands": 1}, "max_operands=1: must be at least 2"),
        ({"num_examples": -5}, "num_examples=-5: must be at least 1"),
        ({"max_digits": 0}, "max_digits=0: must be at least 1"),
        ({"max_digits": 30}, "max_digits=30: must be at most 18"),
        (
            {"max_digits": 12},
            "max_digits 12 with max_operands 3 gives examples of up to 184 tokens, but the context",
        ),
        ({"digit_order": "backwards"}, "digit_order='backwards': choose one of normal, reversed"),
        ({"num_examples": 3}, "num_examples 3 leaves the val part empty"),
        ({"num_examples": 176_751}, "there are only 176,750 different problems"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_impossible_data_are_refused_by_name_and_value(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        generate_arithmetic(SumSettings(**settings, output_dir=str(tmp_path / "never")))
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no examples"),
        ('[{"question": "1+1"}]', "is of another format"),
        ('{"a": 1}', "is of another format"),
        ('{"examples": ["3+5=8<end>"]}', "its metadata does not say"),
        (
            '["3+5=8<end>", "3+5=9<end>"]',
            "example 2: '3\\+5=9<end>' breaks the rules, right is '3\\+5=8<end>'",
        ),
        ('["99+21=<think>9+1=10 9+2+1=11 0+1=1 1+0=1</think>110<end>"]', "example 1: .* breaks the rules"),
        ('["3+05=8<end>"]', "breaks the rules"),
        ('["3+5=8"]', "example 1: '3\\+5=8' is not a sum"),
    ],
)
def test_a_data_file_of_another_format_is_named_with_its_place(content, message, tmp_path):
    path = tmp_path / "train.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_sum_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_part_says_how_to_make_it(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"train\.json: make a data folder with 'smollm-trm arithmetic generate"
    ):
        read_data_folder(tmp_path)


def test_a_folder_with_a_leak_is_refused(tmp_path):
    for part, lines in (("train", ["3+5=8<end>"]), ("val", ["1+1=2<end>"]), ("test", ["5+3=8<end>"])):
        (tmp_path / f"{part}.json").write_text(json.dumps(lines))
    with pytest.raises(ValueError, match=r"1 problems stand in both train.json and test.json \(for example 3\+5"):
        read_data_folder(tmp_path)


def test_operand_sets_forget_the_order():
    assert operand_sets(["3+5=8<end>", "5+3=8<end>", "5+5=10<end>"]) == {(3, 5), (5, 5)}
