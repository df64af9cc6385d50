"""The halting head is judged by the grades, and its savings are counted per problem."""

import torch
from twins import ROWS, make_model, make_tokenizer

from smollm_trm.evaluation.halting import halting_probabilities, judge_halting

TOKENIZER = make_tokenizer()
QUESTIONS = [row["question"] for row in ROWS[:6]]


def test_a_head_that_knows_and_one_that_does_not():
    model = make_model("smollm3", TOKENIZER)
    with torch.no_grad():
        model.reasoner.halting_head.weight.normal_(generator=torch.Generator().manual_seed(0))
        model.reasoner.halting_head.bias.zero_()
    last = [steps[-1] for steps in halting_probabilities(model, QUESTIONS, batch_size=4)]
    median = sorted(last)[3]
    grades = [chance >= median for chance in last]
    assert judge_halting(model, ROWS[:6], grades)["auroc"] == 1.0
    assert judge_halting(model, ROWS[:6], [not grade for grade in grades])["auroc"] == 0.0


def test_steps_saved_are_counted_from_the_first_stop():
    model = make_model("smollm3", TOKENIZER)
    for bias, saved in ((-5.0, 0.0), (5.0, 0.5)):
        with torch.no_grad():
            model.reasoner.halting_head.bias.fill_(bias)
        report = judge_halting(model, ROWS[:6], [True] * 6)
        assert report["steps"] == 2 and report["steps_saved"] == saved and report["auroc"] is None


def test_a_reasoner_without_a_head_has_nothing_to_judge():
    for reasoner in ("static", None):
        assert judge_halting(make_model("smollm3", TOKENIZER, reasoner=reasoner), ROWS[:2], [True, False]) is None


def test_every_question_is_judged_whatever_the_batch():
    model = make_model("smollm3", TOKENIZER)
    small, large = (torch.tensor(halting_probabilities(model, QUESTIONS, batch_size=size)) for size in (4, 6))
    assert small.shape == (6, 2) and torch.allclose(small, large, atol=1e-5)
