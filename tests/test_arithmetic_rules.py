"""The carry rules, against an independent schoolbook addition on strings."""

import random

import pytest

from smollm_trm.arithmetic.rules import (
    column_steps,
    count_carries,
    count_tokens,
    longest_example,
    read_sum,
    write_sum,
)

WRITTEN_BY_HAND = [
    ([3, 5], "3+5=8<end>"),
    ([9, 9], "9+9=18<end>"),
    ([0, 0], "0+0=0<end>"),
    ([9, 9, 9], "9+9+9=27<end>"),
    ([658, 189], "658+189=<think>8+9=17 5+8+1=14 6+1+1=8</think>847<end>"),
    ([99, 21], "99+21=<think>9+1=10 9+2+1=12</think>120<end>"),
    ([12, 345], "12+345=<think>2+5=7 1+4=5 0+3=3</think>357<end>"),
    ([58, 67, 96], "58+67+96=<think>8+7+6=21 5+6+9+2=22</think>221<end>"),
    ([999, 1], "999+1=<think>9+1=10 9+0+1=10 9+0+1=10</think>1000<end>"),
    ([20, 30], "20+30=<think>0+0=0 2+3=5</think>50<end>"),
    (
        [99] * 12,
        f"{'+'.join(['99'] * 12)}=<think>{'+'.join('9' * 12)}=108 {'+'.join('9' * 12)}+10=118</think>1188<end>",
    ),
]


def schoolbook(operands: list[int]) -> tuple[list[str], str, int]:
    """Steps, answer and carries by string columns, as written on paper: shares no code with the rules."""
    width = max(len(str(number)) for number in operands)
    rows = [str(number).zfill(width) for number in operands]
    steps, answer, carry, carries = [], "", "0", 0
    for column in range(width - 1, -1, -1):
        terms = [row[column] for row in rows] + ([carry] if carry != "0" else [])
        total = str(sum(map(int, terms)))
        steps.append("+".join(terms) + "=" + total)
        answer, carry = total[-1] + answer, total[:-1] or "0"
        carries += carry != "0"
    answer = (carry if carry != "0" else "") + answer
    return steps, answer, carries


@pytest.mark.parametrize(("operands", "written"), WRITTEN_BY_HAND)
def test_the_examples_of_the_rules_come_out_as_written_by_hand(operands, written):
    assert write_sum(operands) == written


def test_every_chain_agrees_with_addition_on_paper():
    rng = random.Random(0)
    for _ in range(3000):
        operands = [rng.randrange(10 ** rng.randint(1, 6)) for _ in range(rng.randint(2, 13))]
        steps, answer, carries = schoolbook(operands)
        assert column_steps(operands) == steps
        assert answer == str(sum(operands))
        assert count_carries(operands) == carries
        written = write_sum(operands)
        read = read_sum(written)
        assert read.operands == tuple(operands)
        assert read.answer == answer
        assert read.chain == (" ".join(steps) if len(steps) > 1 else None)


def test_without_chain_and_with_reversed_digits():
    assert write_sum([658, 189], chain=False) == "658+189=847<end>"
    assert write_sum([658, 189], chain=False, digit_order="reversed") == "658+189=748<end>"
    assert write_sum([15, 5], digit_order="reversed") == "15+5=<think>5+5=10 1+0+1=2</think>02<end>"


def test_a_space_and_a_mark_are_one_token_each():
    assert count_tokens("99+21=<think>9+1=10 9+2+1=12</think>120<end>") == 6 + 1 + 6 + 1 + 8 + 1 + 3 + 1


def test_no_example_is_longer_than_the_longest():
    rng = random.Random(1)
    for digits, operands in ((1, 2), (2, 3), (3, 2), (4, 12)):
        limit = longest_example(digits, operands)
        for _ in range(500):
            count = rng.randint(2, operands)
            example = write_sum([rng.randrange(10**digits) for _ in range(count)])
            assert count_tokens(example) <= limit


@pytest.mark.parametrize(
    "text", ["", "3+5=8", "3-5=8<end>", "3=3<end>", "3+5=<think>3+5=8 </think><end>", "3+5=8<end> "]
)
def test_a_text_of_another_form_is_refused_with_the_right_form(text):
    with pytest.raises(ValueError, match="is not a sum of the form"):
        read_sum(text)
