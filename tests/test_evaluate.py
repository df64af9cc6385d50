"""Evaluation: every problem once, in order, graded, on disk, and never mixed with another evaluation."""

import errno
import json
import os
import re
import stat
from types import SimpleNamespace

import datasets
import pytest
import torch
from torch import nn

from smollm_trm.data.reasoning_dataset import create_sample_dataset
from smollm_trm.evaluation.evaluate import evaluate_gsm8k, longest_completion, shuffled_donors
from smollm_trm.evaluation.predictions import graded_prediction, grades_of, load_predictions, model_fingerprint
from smollm_trm.models.configuration import LatentReasoningConfig
from smollm_trm.models.generation import Completion
from smollm_trm.records import UserMistake


class Adder(nn.Module):
    """Answers "Tom has a and b" with a + b of the question its latents come from, if that is small enough."""

    use_trm = True

    def __init__(self, *, limit: int = 10_000, breaks_at: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([float(limit)]))
        self.dropout = nn.Dropout(0.5)
        self.encoder = SimpleNamespace(encode_completion=lambda answer: [*answer.split(), "end"])
        self.encoder.written_steps = lambda answer: ()
        self.config, self.num_latents = SimpleNamespace(think=True, to_dict=dict), 2
        self.calls = []
        self.plan = {"breaks_at": breaks_at}

    def generate_with_thinking(self, prompts, *, return_details, latents_from=None, **options):
        assert return_details
        self.calls.append({"prompts": prompts, "latents_from": latents_from, **options})
        if self.plan["breaks_at"] and len(self.calls) > self.plan["breaks_at"]:
            raise KeyboardInterrupt
        assert not self.training and not torch.is_grad_enabled()
        texts = []
        for question in latents_from or prompts:
            total = sum(map(int, re.findall(r"\d+", question)))
            noise = int(torch.randint(3, ())) if options.get("do_sample") else 0
            right = total < self.weight.item()
            texts.append(f"It is {total + noise}.\n#### {total + noise}" if right else f"The answer is {total}")
        return [Completion(text, n_tokens=len(text.split()) + 1, cut_off=False) for text in texts]


def problems(count: int = 23) -> list[dict]:
    return [
        {
            "question": f"Tom has {index} and {7 * index % 5} apples" + " now" * (index * 3 % 8),
            "answer": f"<<x=1>>It is {index + 7 * index % 5}.\n#### {index + 7 * index % 5}",
        }
        for index in range(1, count + 1)
    ]


def test_every_problem_is_answered_once_and_reported_in_order():
    model, rows = Adder(), problems()
    result = evaluate_gsm8k(model, rows, batch_size=4, progress=False)
    asked = [question for call in model.calls for question in call["prompts"]]
    assert sorted(asked) == sorted(row["question"] for row in rows)
    assert max(len(call["prompts"]) for call in model.calls) == 4
    lengths = [len(question.split()) for question in asked]
    assert lengths == sorted(lengths, reverse=True)
    assert [example["question"] for example in result["examples"]] == [row["question"] for row in rows[:10]]
    assert (result["accuracy"], result["correct"], result["total"]) == (1.0, 23, 23)
    assert result["correct_by_problem"] == [True] * 23 and 0.85 < result["interval"][0] < result["interval"][1] == 1
    json.dumps(result)


def test_grades_stand_in_the_datasets_order_and_strict_ones_need_the_mark():
    rows = problems()
    rows[5] = {**rows[5], "answer": "#### 999"}
    result = evaluate_gsm8k(Adder(limit=12), rows, batch_size=5, progress=False)
    assert [at for at, right in enumerate(result["correct_by_problem"]) if not right] == [5]
    small = sum(index + 7 * index % 5 < 12 for index in range(1, 24) if index != 6)
    assert result["strict_correct"] == small and result["strict_accuracy"] == small / 23


def test_decoding_is_greedy_with_room_for_the_longest_gold_answer():
    model, rows = Adder(), problems()
    rows[7]["answer"] = "word " * 50 + "#### 1"
    evaluate_gsm8k(model, rows, progress=False)
    assert model.calls[0]["do_sample"] is False
    assert model.calls[0]["max_new_tokens"] > 53 and longest_completion(model, rows) == 53
    evaluate_gsm8k(model, rows, max_new_tokens=5, num_beams=2, progress=False)
    assert (model.calls[-1]["max_new_tokens"], model.calls[-1]["num_beams"]) == (5, 2)


def test_the_result_says_on_which_device_in_which_precision_and_on_which_problems():
    result = evaluate_gsm8k(Adder().to(torch.bfloat16), problems(3), progress=False)
    assert (result["device"], result["precision"]) == ("cpu", "bfloat16") and len(result["settings"]["problems"]) == 64


def test_the_sample_dataset_of_the_guide_can_be_evaluated():
    result = evaluate_gsm8k(Adder(), create_sample_dataset(), progress=False)
    assert result["total"] == 10 and [one["gold"] for one in result["examples"]][:2] == ["345", "12"]


def test_max_samples_takes_the_first_and_any_dataset_will_do():
    rows = datasets.Dataset.from_list([{**row, "id": 3} for row in problems()])
    assert evaluate_gsm8k(Adder(), rows, 7, progress=False)["total"] == 7
    assert evaluate_gsm8k(Adder(), rows, max_samples=99, progress=False)["total"] == 23


def test_the_model_is_left_in_the_mode_it_was_in():
    model = Adder()
    model.train()
    model.dropout.eval()
    evaluate_gsm8k(model, problems(3), progress=False)
    assert model.training and not model.dropout.training and torch.is_grad_enabled()


def test_shuffled_latents_always_come_from_another_problem():
    model, rows = Adder(), problems()
    result = evaluate_gsm8k(model, rows, batch_size=4, latents="shuffled", progress=False)
    pairs = [pair for call in model.calls for pair in zip(call["prompts"], call["latents_from"], strict=True)]
    assert all(own != lent for own, lent in pairs) and len({lent for _, lent in pairs}) == 23
    assert result["accuracy"] < 0.3
    assert evaluate_gsm8k(model, rows, batch_size=9, latents="shuffled", progress=False)["correct"] == result["correct"]
    other = shuffled_donors(rows, seed=1)
    assert other != shuffled_donors(rows, seed=0) and other == shuffled_donors(rows, seed=1)


def test_equal_questions_never_lend_each_other():
    rows = [{"question": question} for question in "aabbccde"]
    for seed in range(20):
        assert all(rows[at] != rows[donor] for at, donor in enumerate(shuffled_donors(rows, seed)))


def test_a_vote_counts_the_commonest_answer_and_its_seed_fixes_it():
    model, rows = Adder(), problems()
    state = torch.get_rng_state()
    first = evaluate_gsm8k(model, rows, batch_size=12, samples_per_problem=5, seed=3, progress=False)
    assert torch.equal(state, torch.get_rng_state())
    assert model.calls[0]["do_sample"] and model.calls[0]["temperature"] > 0
    assert max(len(call["prompts"]) for call in model.calls) == 10 and first["settings"]["seed"] == 3
    again = evaluate_gsm8k(model, rows, batch_size=12, samples_per_problem=5, seed=3, progress=False)
    other = evaluate_gsm8k(model, rows, batch_size=12, samples_per_problem=5, seed=4, progress=False)
    assert first["correct_by_problem"] == again["correct_by_problem"] != other["correct_by_problem"]
    assert 0 < first["correct"] < 23


def test_the_majority_wins_and_the_first_of_equals():
    def answer(*texts: str) -> str | None:
        row, written = {"question": "q", "answer": "#### 2"}, [Completion(text, 1, False) for text in texts]
        return graded_prediction(0, row, written, seconds=1.0)["answer"]

    assert answer("#### 1", "#### 2.0", "The answer is 2", "none") == "2"
    assert answer("none", "#### 3", "#### 2", "#### 3", "#### 2") == "3" and answer("none", "") is None


@pytest.mark.parametrize("samples", [1, 3])
def test_a_broken_evaluation_goes_on_where_it_stopped(tmp_path, samples):
    settings = {"batch_size": 6, "samples_per_problem": samples, "progress": False}
    unbroken = evaluate_gsm8k(Adder(), problems(), predictions_path=tmp_path / "unbroken.jsonl", **settings)
    path = tmp_path / "runs" / "broken.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate_gsm8k(Adder(breaks_at=2), problems(), predictions_path=path, **settings)
    model = Adder()
    resumed = evaluate_gsm8k(model, problems(), predictions_path=path, **settings)
    whole = {1: 4, 3: 12}[samples]
    assert len(model.calls) < whole and resumed["correct_by_problem"] == unbroken["correct_by_problem"]
    for result, file in ((resumed, path), (unbroken, tmp_path / "unbroken.jsonl")):
        stored = load_predictions(file)
        assert {**stored, "device": "cpu", "precision": "float32"} == result
    without_time = [
        sorted(re.sub(r'"seconds": [^}]*', "", line) for line in file.read_text().splitlines()[1:])
        for file in (path, tmp_path / "unbroken.jsonl")
    ]
    assert without_time[0] == without_time[1] and len(without_time[0]) == 23


def test_a_finished_file_is_read_not_made_again(tmp_path):
    first = evaluate_gsm8k(Adder(), problems(), predictions_path=tmp_path / "p.jsonl", progress=False)
    model = Adder()
    again = evaluate_gsm8k(model, problems(), predictions_path=tmp_path / "p.jsonl", batch_size=3, progress=False)
    assert not model.calls and again == first


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dataset": problems(22)}, "problems"),
        ({"dataset": problems()[::-1]}, "problems"),
        ({"max_new_tokens": 99}, "generation"),
        ({"latents": "shuffled"}, "latents"),
        ({"samples_per_problem": 3}, "samples_per_problem"),
        ({"model": Adder(limit=5)}, "model"),
    ],
)
def test_other_predictions_are_never_mixed_in(tmp_path, changes, named):
    path = tmp_path / "p.jsonl"
    arguments = {"model": Adder(), "dataset": problems(), "predictions_path": path, "progress": False}
    evaluate_gsm8k(**arguments)
    before = path.read_bytes()
    with pytest.raises(UserMistake, match=rf"p.jsonl was made with other settings \(.*{named}: .* there, .* now"):
        evaluate_gsm8k(**{**arguments, **changes})
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"question,answer\n1,2\n", b"[1]\n", b"# notes", b'{"index": 0}\n', b"\x00\x01"])
def test_a_foreign_file_is_refused_and_kept(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(UserMistake, match="notes.txt"):
        evaluate_gsm8k(Adder(), problems(3), predictions_path=path, progress=False)
    assert path.read_bytes() == content


def test_damage_in_the_middle_is_named_by_its_line(tmp_path):
    path = tmp_path / "p.jsonl"
    evaluate_gsm8k(Adder(), problems(), predictions_path=path, progress=False)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:20], *lines[4:]]) + "\n")
    with pytest.raises(UserMistake, match="p.jsonl, line 4"):
        evaluate_gsm8k(Adder(), problems(), predictions_path=path, progress=False)


def rewrite_line(path, number: int, **changes) -> None:
    lines = path.read_text().splitlines()
    lines[number - 1] = json.dumps({**json.loads(lines[number - 1]), **changes})
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": 23}, "line 4: problem 23 does not fit 23 problems"),
        ({"index": -1}, "line 4: problem -1 does not fit"),
        ({"index": True}, "line 4: not a line of predictions"),
        ({"index": "2"}, "line 4: not a line of predictions"),
        ({"texts": []}, "line 4: problem .* does not fit"),
        ({"texts": [5]}, "line 4: not a line of predictions"),
        ({"tokens": -1}, "line 4: problem .* does not fit"),
        ({"seconds": float("nan")}, "line 4: not a line of predictions"),
        ({"gold": "999"}, "the line of problem .* is of another problem"),
        ({"question": "Another?"}, "the line of problem .* is of another problem"),
    ],
)
def test_a_prediction_that_does_not_fit_is_refused_by_its_line(tmp_path, changes, message):
    path, arguments = tmp_path / "p.jsonl", {"model": Adder(), "dataset": problems(), "progress": False}
    evaluate_gsm8k(**arguments, predictions_path=path)
    rewrite_line(path, 4, **changes)
    with pytest.raises(UserMistake, match=f"p.jsonl(, |: ){message}") as refused:
        evaluate_gsm8k(**arguments, predictions_path=path)
    assert "\n" not in str(refused.value)


def test_a_repeated_prediction_is_refused(tmp_path):
    path, arguments = tmp_path / "p.jsonl", {"model": Adder(), "dataset": problems(), "progress": False}
    evaluate_gsm8k(**arguments, predictions_path=path)
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    with pytest.raises(UserMistake, match="line 25: problem .* is there twice"):
        load_predictions(path)


def test_a_stored_verdict_is_never_believed(tmp_path):
    path, arguments = (
        tmp_path / "p.jsonl",
        {"dataset": problems(), "progress": False, "predictions_path": tmp_path / "p.jsonl"},
    )
    honest = evaluate_gsm8k(Adder(), **arguments)
    for number in range(2, 12):
        rewrite_line(path, number, correct=False, strict_correct=False, answer="1")
    assert evaluate_gsm8k(Adder(), **arguments)["correct"] == honest["correct"] == 23
    assert load_predictions(path)["strict_correct"] == 23
    rewrite_line(path, 2, texts=["#### 12345"])
    assert load_predictions(path)["correct"] == 22


def test_predictions_are_made_anew_where_that_is_asked_for(tmp_path):
    arguments = {"dataset": problems(), "progress": False, "predictions_path": tmp_path / "p.jsonl"}
    evaluate_gsm8k(Adder(), **arguments)
    with pytest.raises(UserMistake, match="model: others there, these now.*overwrite"):
        evaluate_gsm8k(Adder(limit=5), **arguments)
    assert evaluate_gsm8k(Adder(limit=5), **arguments, overwrite=True)["strict_correct"] < 23


def test_worked_examples_stand_before_the_question_of_an_untuned_base():
    model, rows = Adder(), problems(4)
    model.config = SimpleNamespace(think=False, prompt_format="plain", to_dict=dict)
    model.encoder.completion_text = lambda answer: " " + answer
    result = evaluate_gsm8k(model, rows[2:], worked_examples=rows[:2], max_new_tokens=5, progress=False)
    asked = model.calls[0]["prompts"]
    shown = [f"{row['question']}\nAnswer: {row['answer']}\n\nQuestion: " for row in rows[:2]]
    assert sorted(asked) == sorted("".join(shown) + row["question"] for row in rows[2:])
    assert result["settings"]["shots"] == 2 and len(result["settings"]["examples"]) == 64
    model.config.think = True
    with pytest.raises(UserMistake, match="worked examples are for an untuned base"):
        evaluate_gsm8k(model, rows[2:], worked_examples=rows[:2], max_new_tokens=5, progress=False)


def test_every_batch_replaces_the_file_whole_and_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    real, synced = os.fsync, []

    def full_after_two_batches(descriptor):
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return real(descriptor)
        synced.append(descriptor)
        if len(synced) > 3:  # the settings, then a batch each
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full_after_two_batches)
    with pytest.raises(OSError, match="could not write .*p.jsonl: No space left on device; free some disk space"):
        evaluate_gsm8k(Adder(), problems(), batch_size=6, predictions_path=path, progress=False)
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["p.jsonl"] and len(path.read_text().splitlines()) == 13
    model = Adder()
    evaluate_gsm8k(model, problems(), batch_size=6, predictions_path=path, progress=False)
    assert len(model.calls) == 2


def test_an_unfinished_file_has_no_result(tmp_path):
    path = tmp_path / "p.jsonl"
    with pytest.raises(KeyboardInterrupt):
        evaluate_gsm8k(Adder(breaks_at=1), problems(), batch_size=6, predictions_path=path, progress=False)
    with pytest.raises(UserMistake, match="holds 6 of 23 predictions"):
        load_predictions(path)
    with pytest.raises(FileNotFoundError, match="nothing.jsonl"):
        load_predictions(tmp_path / "nothing.jsonl")


def test_bad_settings_get_one_clear_line():
    model, rows = Adder(), problems(3)
    for bad, message in [
        ({"max_samples": 0}, "max_samples=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"latents": "mixed"}, "latents='mixed': choose 'own' or 'shuffled'"),
        ({"samples_per_problem": 2, "do_sample": False}, "needs sampling"),
        ({"num_return_sequences": 2}, "use samples_per_problem"),
        ({"latents": "shuffled", "max_samples": 1}, "too few different questions"),
    ]:
        with pytest.raises(UserMistake, match=re.escape(message)):
            evaluate_gsm8k(model, rows, progress=False, **bad)
    with pytest.raises(UserMistake, match="no problems"):
        evaluate_gsm8k(model, [], progress=False)
    with pytest.raises(UserMistake, match="problem 1 of the dataset"):
        evaluate_gsm8k(model, [rows[0], {"question": "Why?", "answer": "1 or 2"}], progress=False)
    model.use_trm = False
    with pytest.raises(UserMistake, match="no latents"):
        evaluate_gsm8k(model, rows, latents="shuffled", progress=False)
    assert not model.calls


@pytest.mark.parametrize("samples", [1, 3])
def test_tokens_and_texts_cut_off_are_counted_as_the_model_says(tmp_path, samples):
    class Talker(Adder):
        def generate_with_thinking(self, prompts, **_):
            number = [int(question.split()[2]) for question in prompts]
            return [Completion("one " * 50, n_tokens=one, cut_off=one > 5) for one in number]

    options = {"samples_per_problem": samples, "predictions_path": tmp_path / "p.jsonl", "progress": False}
    result = evaluate_gsm8k(Talker(), problems(9), **options)
    for found in (result, load_predictions(tmp_path / "p.jsonl")):
        assert (found["cut_off"], found["tokens"]) == (4 * samples, 45 * samples)
        assert found["tokens_per_second"] == pytest.approx(45 * samples / found["seconds"])


def test_an_unwritable_predictions_file_is_one_line_that_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match="^could not write .*p.jsonl: .*; free some disk space or choose another"
    ) as found:
        evaluate_gsm8k(Adder(), problems(3), predictions_path=tmp_path / "file" / "p.jsonl", progress=False)
    assert found.value.errno is None and "\n" not in str(found.value)


def test_in_half_precision_another_batch_size_is_another_evaluation(tmp_path):
    options = {"predictions_path": tmp_path / "p.jsonl", "progress": False}
    evaluate_gsm8k(Adder().to(torch.bfloat16), problems(), batch_size=4, **options)
    with pytest.raises(UserMistake, match="batch_size: 4 there, 5 now"):
        evaluate_gsm8k(Adder().to(torch.bfloat16), problems(), batch_size=5, **options)


def test_out_of_memory_names_the_settings_that_help():
    class Full(Adder):
        def generate_with_thinking(self, prompts, **options):
            raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError, match="3 texts at once: lower batch_size or max_new_tokens"):
        evaluate_gsm8k(Full(), problems(3), progress=False)


def test_the_bar_is_drawn_seldom_where_no_terminal_is(capsys):
    evaluate_gsm8k(Adder(), problems(), batch_size=1)
    shown = capsys.readouterr().err
    assert shown.count("\r") <= 3 and "23/23" in shown and "100.0% right" in shown


def test_fingerprints_tell_models_apart_and_nothing_else():
    first = Adder()
    assert model_fingerprint(first) == model_fingerprint(Adder()) != model_fingerprint(Adder(limit=5))
    before = model_fingerprint(first)
    first.train(), first.calls.append({})
    assert model_fingerprint(first) == before
    first.requires_grad_(False)
    frozen = model_fingerprint(first)
    first.weight += 1
    assert model_fingerprint(first) != frozen


def test_the_fingerprint_knows_how_a_model_is_asked_but_not_where_it_lies():
    model = Adder()
    prints = []
    for changed in ({}, {"target": "answer"}, {"num_latents": 4}, {"notes": {"a": 1}}, {"base_model": "elsewhere"}):
        model.config = LatentReasoningConfig(**{"reasoner": None, "target": "steps", **changed})
        model.config.num_latents = changed.get("num_latents", 0)
        prints.append(model_fingerprint(model))
    assert len(set(prints[:3])) == 3 and prints[3] == prints[4] == prints[0]


def test_answers_in_words_are_graded_by_what_they_say():
    row = {"question": "Which river?", "answer": "It flows north.\n#### The Nile"}
    texts = ["#### nile.", "It is the Rhine", "The answer is the Nile."]
    line = graded_prediction(0, row, [Completion(text, 3, False) for text in texts], seconds=1.0)
    assert (line["gold"], line["answer"], line["correct"]) == ("The Nile", "nile", True)
    assert line["strict_correct"] and grades_of({**line, "texts": texts[1:2]})["correct"] is False
