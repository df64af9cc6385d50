"""GSM8K is split reproducibly, leaks nothing from part to part, and bad files are named in one line."""

import json
import os
from pathlib import Path

import pytest

from smollm_trm.data.gsm8k import load_gsm8k, source_name, split_fingerprint, split_gsm8k
from smollm_trm.data.rows import normalize_question, write_jsonl
from smollm_trm.data.word_problems import generate_word_problems
from smollm_trm.records import UserMistake

REAL = Path(os.environ.get("GSM8K_DIR") or Path(__file__).parents[2] / "shared" / "data" / "gsm8k")
needs_gsm8k = pytest.mark.skipif(
    not (REAL / "train.jsonl").is_file(), reason="the real GSM8K is not here; set GSM8K_DIR to its folder"
)


@pytest.fixture
def rows():
    return generate_word_problems(count=60, seed=0)


@pytest.fixture
def folder(tmp_path, rows):
    write_jsonl(tmp_path / "train.jsonl", rows[:50])
    write_jsonl(tmp_path / "test.jsonl", rows[50:])
    return tmp_path


def questions(part):
    return {normalize_question(row["question"]) for row in part}


@needs_gsm8k
def test_the_real_gsm8k_has_the_documents_parts_and_nothing_in_two_of_them():
    splits = load_gsm8k(REAL)
    parts = (splits.gsm8k_train, splits.gsm8k_test, splits.gsm8k_final_test)
    assert [len(part) for part in parts] == [5978, 1495, 1319]
    assert len(set.union(*map(questions, parts))) == 5978 + 1495 + 1319
    assert splits.duplicates == 0
    assert splits.fingerprint.startswith("aa66088eb65b4c05")


def test_same_seed_same_split_and_another_seed_another(folder):
    first, again, other = load_gsm8k(folder), load_gsm8k(folder), load_gsm8k(folder, seed=43)
    assert first == again
    assert first.gsm8k_train != other.gsm8k_train
    assert first.fingerprint != other.fingerprint
    assert questions(first.gsm8k_train) | questions(first.gsm8k_test) == questions(other.gsm8k_train + other.gsm8k_test)


def test_the_training_rows_are_shuffled_and_the_official_test_is_left_as_it_is(folder, rows):
    splits = load_gsm8k(folder)
    assert splits.gsm8k_final_test == rows[50:]
    assert splits.gsm8k_train + splits.gsm8k_test != rows[:50]


def test_a_question_that_stands_twice_in_any_spelling_ends_up_in_one_part(folder, rows, caplog):
    again = [{**row, "question": "  " + row["question"].upper().replace(" ", "  ")} for row in rows]
    write_jsonl(folder / "train.jsonl", rows[:50] + again[:20] + again[50:])
    splits = load_gsm8k(folder)
    parts = (splits.gsm8k_train, splits.gsm8k_test, splits.gsm8k_final_test)
    assert [len(part) for part in parts] == [40, 10, 10]
    assert len(set.union(*map(questions, parts))) == 60
    assert splits.duplicates == 30
    assert "dropped 30 training rows" in caplog.text


def test_problems_that_differ_in_a_sign_only_are_two_problems():
    assert normalize_question("What is 3 + 5?") != normalize_question("What is 3 - 5?")
    assert normalize_question("What is 3-5?") != normalize_question("What is 3 5?")
    assert normalize_question("A 120-page book, isn't it?") == normalize_question("a 120 page book isn t it")


def test_the_fingerprint_knows_every_answer_the_order_and_the_borders_of_the_parts(rows):
    fingerprint = split_fingerprint(rows[:10], rows[10:20])
    assert fingerprint == split_fingerprint(rows[:10], rows[10:20])
    assert len(fingerprint) == 64
    changed = [{**rows[0], "answer": "#### 9999"}, *rows[1:10]]
    for other in ((changed, rows[10:20]), (rows[9::-1], rows[10:20]), (rows[:11], rows[11:20])):
        assert split_fingerprint(*other) != fingerprint


def test_a_split_that_would_leave_a_part_empty_is_refused(rows):
    for too_few in ([], rows[:1], rows[:1] * 3):
        with pytest.raises(UserMistake, match="[01] different problems are too few"):
            split_gsm8k(too_few)
    assert [len(part) for part in split_gsm8k(rows[:2])] == [1, 1]


def test_the_folder_comes_from_the_argument_then_from_the_environment(folder, rows, tmp_path, monkeypatch):
    monkeypatch.setenv("GSM8K_DIR", str(folder))
    assert load_gsm8k().source == str(folder)
    elsewhere = tmp_path / "elsewhere"
    write_jsonl(elsewhere / "train.jsonl", rows[:20])
    write_jsonl(elsewhere / "test.jsonl", rows[20:25])
    splits = load_gsm8k(str(elsewhere))
    assert splits.source == str(elsewhere)
    assert len(splits.gsm8k_train) == 16


def test_results_name_the_folder_without_where_it_lies(folder, tmp_path, monkeypatch):
    splits = load_gsm8k(folder)
    assert splits.source == str(folder) and splits.summary["source"] == folder.name
    monkeypatch.chdir(folder)
    assert load_gsm8k(".").summary["source"] == folder.name
    assert source_name("/gone/since/rows.jsonl") == "rows.jsonl"
    assert source_name("openai/gsm8k (main)") == "openai/gsm8k (main)" and source_name("me/sums") == "me/sums"


def test_without_a_folder_the_hub_is_asked_and_gives_the_same_split(folder, rows, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*arguments, split):
        asked.append((*arguments, split))
        return datasets.Dataset.from_list({"train": rows[:50], "test": rows[50:]}[split])

    monkeypatch.delenv("GSM8K_DIR", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    from_hub = load_gsm8k()
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert from_hub.source == "openai/gsm8k (main)"
    assert from_hub.fingerprint == load_gsm8k(folder).fingerprint


def test_without_a_network_the_message_says_how_to_use_a_folder(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*arguments, split):
        raise ConnectionError("Couldn't reach the Hub\nand a long trace")

    monkeypatch.delenv("GSM8K_DIR", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError) as refusal:
        load_gsm8k()
    assert "Couldn't reach the Hub" in str(refusal.value)
    assert "--data_dir" in str(refusal.value) and "GSM8K_DIR" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_folder_or_file_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder; give a folder .* --data_dir"):
        load_gsm8k(folder / "nowhere")
    (folder / "test.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.jsonl is missing"):
        load_gsm8k(folder)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": "How many?", "answer"', r"line 3: not valid JSON"),
        ('{"question": "How many?"}', r"line 3: the key 'answer' is missing"),
        ('{"answer": "#### 3"}', r"line 3: the key 'question' is missing"),
        (
            '{"question": "How many?", "answer": "three"}',
            r"line 3: the answer does not end in '#### <number>'",
        ),
        (
            '{"question": "How many?", "answer": "#### "}',
            r"line 3: the answer does not end in '#### <number>'",
        ),
        (
            '{"question": "How many?", "answer": "#### a"}',
            r"line 3: the answer does not end in '#### <number>'",
        ),
        ('{"question": "How many?", "answer": 3}', r"line 3: 'answer' must be text, found int"),
        ('{"question": " ", "answer": "#### 3"}', r"line 3: 'question' is empty"),
        ('["How many?", "#### 3"]', r"line 3: a row must be an object, found list"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_reason(folder, line, reason):
    lines = (folder / "train.jsonl").read_text().splitlines()
    (folder / "train.jsonl").write_text("\n".join([lines[0], "", line, *lines[1:]]))
    with pytest.raises(UserMistake, match=r"train\.jsonl, " + reason) as refusal:
        load_gsm8k(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "the file is empty"), (b"\n \n", "the file is empty"), (b"\xff\xfe{", "not UTF-8")],
)
def test_a_file_that_holds_no_rows_is_refused(folder, content, reason):
    (folder / "test.jsonl").write_bytes(content)
    with pytest.raises(UserMistake, match=rf"test\.jsonl: {reason}"):
        load_gsm8k(folder)


def test_windows_line_ends_and_a_byte_order_mark_are_read(folder, rows):
    text = "\r\n".join(json.dumps(row) for row in rows[:50])
    expected = load_gsm8k(folder).fingerprint
    (folder / "train.jsonl").write_text("\ufeff" + text, encoding="utf-8", newline="")
    assert load_gsm8k(folder).fingerprint == expected
