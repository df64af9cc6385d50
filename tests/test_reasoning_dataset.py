"""Own data is read from every format alike, and a bad row is named by file, line and reason."""

import csv
import json

import pytest
from torch.utils.data import DataLoader

from smollm_trm.data.answers import gold_answer
from smollm_trm.data.reasoning_dataset import ReasoningDataset, create_sample_dataset
from smollm_trm.records import UserMistake

ROWS = [
    {
        "id": "a",
        "question": 'Ann says "3 bags of 5 nuts".\nHow many nuts?',
        "answer": "3*5=<<3*5=15>>15\n#### 15",
    },
    {"id": "b", "question": "What is 2 + 2?", "answer": "4"},
    {"id": "c", "question": "Wie viele Äpfel sind 7 − 9?", "answer": "-2"},
]
EXPECTED = [
    {"question": ROWS[0]["question"], "answer": "3*5=<<3*5=15>>15\n#### 15"},
    {"question": ROWS[1]["question"], "answer": "#### 4"},
    {"question": ROWS[2]["question"], "answer": "#### -2"},
]


def write_json(path, rows):
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


WRITERS = {"json": write_json, "jsonl": write_lines, "csv": write_csv}


@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_the_same_rows(tmp_path, ending):
    dataset = ReasoningDataset(WRITERS[ending](tmp_path / f"own.{ending}", ROWS))
    assert [dataset[index] for index in range(len(dataset))] == EXPECTED


def test_rows_in_memory_are_read_and_left_unchanged():
    before = json.dumps(ROWS)
    assert ReasoningDataset(ROWS).rows == EXPECTED
    assert json.dumps(ROWS) == before


def test_a_hub_name_is_loaded_with_its_configuration_and_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert ReasoningDataset("someone/sums", hub_config="main", hub_split="test").rows == EXPECTED
    assert asked == [("someone/sums", "main", "test")]


def test_without_a_network_the_message_names_the_set_and_the_way_out(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*arguments, **named):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match="someone/sums: .*Couldn't reach the Hub.*name a local file"):
        ReasoningDataset("someone/sums")


@pytest.mark.parametrize(
    "bare", ["345", " 345 ", "1,234", "-5", "$18", "-$5", "3.75", ".5", "20%", "1/2", "18.", "\u22125"]
)
def test_a_bare_number_becomes_the_final_answer(bare):
    (row,) = ReasoningDataset([{"question": "How many?", "answer": bare}])
    assert row["answer"] == f"#### {bare.strip()}"
    assert gold_answer(row["answer"])


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("Paris", "Paris"),
        (" The  Nile. ", "The Nile."),
        ("It flows.\n#### the Nile", "the Nile"),
        ("#### A3 paper", "A3 paper"),
    ],
)
def test_an_answer_may_be_in_words(answer, gold):
    (row,) = ReasoningDataset([{"question": "Which?", "answer": answer}])
    assert gold_answer(row["answer"]) == gold


def test_columns_may_have_other_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"problem": "Which river?", "question": "left alone", "target": "Nile"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    columns = {"question_column": "problem", "answer_column": "target"}
    for source in (rows, tmp_path / "rows.parquet"):
        assert ReasoningDataset(source, **columns).rows == [{"question": "Which river?", "answer": "#### Nile"}]
    with pytest.raises(
        UserMistake, match="row 1: the key 'answer' is missing.*question_column and.*found 'problem', 'q"
    ):
        ReasoningDataset(rows)


@pytest.mark.parametrize("number", [345, -2, 3.75])
def test_a_json_number_becomes_the_final_answer(number):
    assert ReasoningDataset([{"question": "How many?", "answer": number}])[0]["answer"] == f"#### {number}"


@pytest.mark.parametrize(
    "answer",
    [
        "5 apples",
        "five\nor six",
        "x = 5",
        "3 4",
        "25% of 80 is 20",
        "####",
        "",
        "1-2",
        "--3",
        "nan",
        float("nan"),
        "1,,",
        "5/",
    ],
)
def test_any_other_answer_without_a_final_number_is_refused(answer):
    with pytest.raises(UserMistake, match=r"rows, row 1: (the answer does not end in '#### <number>'|'answer' is)"):
        ReasoningDataset([{"question": "How many?", "answer": answer}])


@pytest.mark.parametrize("answer", [None, True, ["5"]])
def test_an_answer_that_is_neither_text_nor_a_number_is_refused(answer):
    with pytest.raises(UserMistake, match=r"rows, row 1: 'answer' must be text"):
        ReasoningDataset([{"question": "How many?", "answer": answer}])


@pytest.mark.parametrize(("ending", "line"), [("json", 12), ("jsonl", 3), ("csv", 6)])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answer": "5 nuts"}, "the answer does not end in '#### <number>'"),
        ({"question": ""}, "'question' is empty"),
        ({"id": "a"}, r"the id 'a' is already that of .*own\.\w+, line (1|2)"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_reason(tmp_path, ending, line, change, reason):
    path = WRITERS[ending](tmp_path / f"own.{ending}", [*ROWS[:2], {**ROWS[2], **change}])
    with pytest.raises(UserMistake, match=rf"own\.{ending}, line {line}: {reason}") as refusal:
        ReasoningDataset(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("ending", WRITERS)
def test_a_missing_column_is_refused(tmp_path, ending):
    rows = [{"question": row["question"], "solution": row["answer"]} for row in ROWS]
    path = WRITERS[ending](tmp_path / f"own.{ending}", rows)
    with pytest.raises(UserMistake, match=rf"own\.{ending}, line \d: the key 'answer' is missing"):
        ReasoningDataset(path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("own.json", "", "own.json: the file is empty"),
        ("own.json", "[]", "own.json: there are no rows"),
        ("own.json", '{"data": []}', "own.json: expected a JSON list; .* must be named .jsonl"),
        ("own.json", "[\nROW,\n{,}]", "own.json, line 3: not valid JSON"),
        ("own.json", "[\nROW\nROW]", "own.json, line 3: not valid JSON .Expecting ','"),
        ("own.json", "[ROW,\n", "own.json, line 2: not valid JSON"),
        ("own.json", "[ROW\n", "own.json, line 2: not valid JSON"),
        ("own.json", "[ROW,\n]", "own.json, line [12]: not valid JSON"),
        ("own.json", "[ROW]\n]", "own.json, line 2: not valid JSON .Extra data"),
        ("own.jsonl", '{"question"}', "own.jsonl, line 1: not valid JSON"),
        ("own.csv", "question,answer\n", "own.csv: there are no rows"),
        ("own.csv", "question,answer\na,1\nb\n", "own.csv, line 3: the number of fields differs"),
        ("own.csv", "question,answer\na,1,2\n", "own.csv, line 2: the number of fields differs"),
        ("own.csv", 'question,answer\n"a,1\n', "own.csv, line 2: not valid CSV"),
        ("own.txt", "x", "own.txt: expected a .json, .jsonl, .csv or .parquet file"),
    ],
)
def test_a_file_of_another_shape_is_refused(tmp_path, name, content, reason):
    (tmp_path / name).write_text(content.replace("ROW", json.dumps(ROWS[1])))
    with pytest.raises(UserMistake, match=reason) as refusal:
        ReasoningDataset(tmp_path / name)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"own\.json: no such file"):
        ReasoningDataset(tmp_path / "own.json")


def test_an_empty_list_is_refused():
    with pytest.raises(UserMistake, match="rows: there are no rows"):
        ReasoningDataset([])


def test_the_sample_problems_are_ten_and_load_as_own_data():
    dataset = ReasoningDataset(create_sample_dataset())
    assert len(dataset) == 10
    assert dataset[0] == {"question": "What is 15 × 23?", "answer": "#### 345"}
    assert gold_answer(dataset[0]["answer"]) == str(15 * 23)


def test_it_is_a_torch_dataset():
    (batch,) = DataLoader(ReasoningDataset(ROWS), batch_size=3)
    assert batch["answer"] == [row["answer"] for row in EXPECTED]


def test_chat_and_completion_rows_are_rows(tmp_path):
    from datasets import Dataset

    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
    rows = [
        {"messages": [*chat, {"role": "assistant", "content": "2"}]},
        {"prompt": "2 + 2?", "completion": "2+2 = 4\n#### 4"},
    ]
    expected = [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "2 + 2?", "answer": "2+2 = 4\n#### 4"}]
    assert list(ReasoningDataset(rows)) == expected
    for at, row in enumerate(rows):
        Dataset.from_list([row]).to_parquet(path := tmp_path / "rows.parquet")
        assert list(ReasoningDataset(path)) == expected[at : at + 1]
    with pytest.raises(UserMistake, match="row 1: the key 'question' is missing; .* found 'messages'"):
        ReasoningDataset([{"messages": [*rows[0]["messages"], chat[1]]}])
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(UserMistake, match="rows.parquet: not a Parquet file"):
        ReasoningDataset(path)
    with pytest.raises(FileNotFoundError, match="none.parquet: no such file"):
        ReasoningDataset(tmp_path / "none.parquet")
