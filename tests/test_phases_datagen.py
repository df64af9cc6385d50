"""Thinking states: the right states, none twice and none lost, whatever kills the run; what does not fit is refused."""

import json
import random
import signal
from pathlib import Path

import pytest
import torch
from processes import ended, started
from safetensors.torch import load_file
from thinkers import FIXTURES, MIX, generate, save_thinker
from twins import make_base, make_model, make_tokenizer

from smollm_trm.data.batching import pad_left
from smollm_trm.evaluation.loading import load_for_evaluation
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.phases.datagen import (
    load_hidden_pairs,
    load_thinker,
    read_index,
    read_shards,
    think_in_text,
    thinking_encoder,
)
from smollm_trm.phases.problems import PROBLEM_SOURCES, mixed_problems
from smollm_trm.phases.settings import DatagenSettings
from smollm_trm.records import UserMistake


@pytest.fixture(scope="module")
def thinker(tmp_path_factory) -> str:
    return save_thinker(tmp_path_factory.mktemp("thinker") / "base")


@pytest.fixture(scope="module")
def unbroken(thinker, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    index = generate(thinker, str(folder))
    assert 0 < index["not_closed"] < index["n_problems"] == 20
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("pairs-*")}


@pytest.mark.parametrize("name", PROBLEM_SOURCES)
def test_every_dataset_is_read_by_its_own_field_names(name):
    found = mixed_problems([name], str(FIXTURES), 2)
    assert len(found) == 2 and all(one["problem"] and one["dataset"] == name for one in found)
    numbered = name in ("gsm8k", "aime")
    assert all(("####" in one["answer"]) is numbered for one in found)


@pytest.mark.parametrize("name", PROBLEM_SOURCES)
def test_without_a_folder_the_hub_is_asked_by_the_right_name(name, monkeypatch):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: asked.append((args, options)) or [])
    mixed_problems([name], None, 2)
    [(args, options)] = asked
    source = PROBLEM_SOURCES[name]
    if source.file is None:
        assert args == (source.name, source.config) and options == {"split": source.split}
    else:  # its loading script is not run
        assert args[0] == "json" and options["data_files"] == f"hf://datasets/{source.name}/{source.file}"


def test_a_mix_takes_a_problem_of_each_in_turn_and_none_twice():
    found = mixed_problems(["gsm8k", "aime", "gsm8k"], str(FIXTURES), 100)
    assert [one["dataset"] for one in found[:6]] == ["gsm8k", "aime"] * 3
    assert len({one["problem"] for one in found}) == len(found) == 17


def test_a_row_without_its_field_is_refused_by_its_line(tmp_path):
    (tmp_path / "mbpp.jsonl").write_text(json.dumps({"question": "x"}) + "\n")
    with pytest.raises(UserMistake, match="mbpp.jsonl, line 1: the key 'text' is missing"):
        mixed_problems(["mbpp"], str(tmp_path), 1)


def test_states_are_those_of_the_model_alone_with_the_problem(thinker, unbroken):
    model = load_for_evaluation(thinker)
    encoder, closes = thinking_encoder(model)
    for before, after, plain in read_shards(unbroken, read_index(unbroken)):
        prompt = encoder.encode_prompt(plain["problems"])
        assert model.tokenizer.decode(prompt[-1:]) == "<think>" and len(before) == len(prompt) - 1
        ids = torch.tensor([prompt])
        for _ in range(plain["num_thinking_tokens"] + 1):  # greedy, by itself, without batch, cache or padding
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert int(ids[0, -1]) == closes
        states = model.model.language_model(ids).last_hidden_state[0]
        torch.testing.assert_close(before, states[: len(before)], atol=2e-5, rtol=0)
        torch.testing.assert_close(after, states[-1], atol=2e-5, rtol=0)


def test_the_target_is_not_in_the_input(thinker):
    """States before `<think>` are the same whatever is thought behind it."""
    model = load_for_evaluation(thinker)
    problems = [one["problem"] for one in mixed_problems(["gsm8k"], str(FIXTURES), 6)]
    kept = [pair for pair in think_in_text(model, problems, max_new_tokens=8)]
    encoder, _ = thinking_encoder(model)
    for problem, pair in zip(problems, kept, strict=True):
        if pair is not None:
            ids, _ = pad_left([encoder.encode_prompt(problem)[:-1]], 0)
            alone = model.model.language_model(ids).last_hidden_state[0]
            torch.testing.assert_close(pair["hidden_pre"], alone, atol=2e-5, rtol=0)


def test_a_run_killed_ten_times_leaves_the_pairs_of_an_unbroken_one(thinker, unbroken, tmp_path):
    draw = random.Random(7)
    deaths = [(draw.randint(1, 3), draw.random() < 0.4) for _ in range(10)]
    runs = [((thinker, str(tmp_path), death), -signal.SIGKILL) for death in deaths]
    runs.append(((thinker, str(tmp_path), None), 0))
    assert ended(started("processes", "forked", "thinkers", "session", runs)) == 0
    assert contents(tmp_path) == contents(unbroken)
    assert not list(tmp_path.glob(".*")), "something half-written was left"
    problems = load_hidden_pairs(tmp_path)["problems"]
    assert len(set(problems)) == len(problems) == read_index(unbroken)["n_pairs"]


def test_several_processes_share_the_problems(thinker, unbroken, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert generate(thinker, str(tmp_path)) is None
    assert {path.name for path in tmp_path.glob("pairs-*")} == {"pairs-00001.safetensors", "pairs-00003.safetensors"}
    monkeypatch.setenv("RANK", "0")
    assert generate(thinker, str(tmp_path)) is not None
    assert contents(tmp_path) == contents(unbroken)


def test_several_processes_start_anew_whichever_of_them_comes_first(thinker, unbroken, tmp_path, monkeypatch):
    generate(thinker, str(tmp_path), max_new_tokens=3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        index = generate(thinker, str(tmp_path), no_auto_resume=True)
    assert index is not None and contents(tmp_path) == contents(unbroken)


def test_other_settings_are_refused_until_told_to_start_anew(thinker, unbroken, tmp_path):
    generate(thinker, str(tmp_path), num_samples=4)
    with pytest.raises(
        UserMistake, match="holds a run with num_samples=4, now it is 8: choose another output_dir, or --no_auto_resume"
    ):
        generate(thinker, str(tmp_path), num_samples=8)
    assert generate(thinker, str(tmp_path), num_samples=8, no_auto_resume=True)["n_problems"] == 8


def test_the_pairs_have_the_guides_form(unbroken):
    pairs = load_hidden_pairs(unbroken)
    n, size = len(pairs["problems"]), pairs["hidden_size"]
    assert pairs["hidden_post"].shape == (n, size) and len(pairs["hidden_pre"]) == n
    assert [len(one) for one in pairs["hidden_pre"]] == pairs["seq_lengths"]
    assert {path.suffix for path in unbroken.iterdir()} == {".safetensors", ".json"}
    assert set(load_file(unbroken / "pairs-00000.safetensors")) == {"hidden_pre", "hidden_post"}


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_shard_that_is_missing_or_damaged_is_one_line(unbroken, tmp_path, damage):
    for path in unbroken.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "pairs-00001.safetensors"
    content = bytearray(shard.read_bytes())
    if damage == "missing":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(content[: len(content) // 2])
    else:
        content[-9] ^= 1
        shard.write_bytes(content)
    with pytest.raises(UserMistake, match="pairs-00001.safetensors: this shard is (missing|damaged)") as refused:
        load_hidden_pairs(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_shard_cut_off_by_a_crash_of_the_machine_is_made_again(thinker, unbroken, tmp_path):
    generate(thinker, str(tmp_path))
    shard = tmp_path / "pairs-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-50])
    generate(thinker, str(tmp_path))
    assert contents(tmp_path) == contents(unbroken)


def test_pairs_of_another_base_are_refused(unbroken):
    with pytest.raises(UserMistake, match="was made with another base, 32 wide: it does not fit me/base"):
        read_index(unbroken, fingerprint="another", here="me/base")


def test_a_run_that_is_not_done_says_so(thinker, tmp_path, monkeypatch):
    with pytest.raises(UserMistake, match="no index.json there: run `phases datagen`"):
        load_hidden_pairs(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    generate(thinker, str(tmp_path))
    with pytest.raises(UserMistake, match="is not done; run the same command again"):
        load_hidden_pairs(tmp_path)


def test_a_model_that_cannot_think_in_text_is_refused():
    tokenizer = make_tokenizer()
    with pytest.raises(UserMistake, match="thinks in latents"):
        thinking_encoder(make_model("smollm3", tokenizer))
    base = make_base("llama", tokenizer)
    model = SmolLMv3WithTRM.from_base((base, tokenizer), base_training="frozen", reasoner=None)
    model.tokenizer.convert_tokens_to_ids = lambda token: None if token == "<think>" else 3
    with pytest.raises(UserMistake, match="no thinking token <think> in the model's vocabulary"):
        thinking_encoder(model)


def test_an_untuned_base_is_asked_by_its_chat_template_where_it_has_one(tmp_path):
    tokenizer = make_tokenizer()
    base = make_base("llama", tokenizer)
    for name, template in (("plain", None), ("chat", "{% for one in messages %}{{ one.content }}{% endfor %}")):
        tokenizer.chat_template = template
        base.save_pretrained(tmp_path / name), tokenizer.save_pretrained(tmp_path / name)
        model = load_thinker(str(tmp_path / name), prompt_format=None, precision="auto")
        encoder, _ = thinking_encoder(model)
        assert encoder.prompt_format == name and encoder.prompt_text("Why?").endswith("<think>")


def test_a_saved_model_is_asked_as_it_was_trained(thinker):
    with pytest.raises(UserMistake, match="prompt_format='chat': .* was trained on 'plain'"):
        load_thinker(thinker, prompt_format="chat", precision="auto")


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(thinker, unbroken, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("smollm_trm.phases.datagen.save_file", full)
        with pytest.raises(OSError, match="No space left on device; free some disk space"):
            generate(thinker, str(tmp_path))
    generate(thinker, str(tmp_path))
    assert contents(tmp_path) == contents(unbroken)


@pytest.mark.parametrize(
    ("change", "line"),
    [({"dataset": "gsm8k,svamp"}, "'svamp' is none of gsm8k, aime"), ({"num_samples": 0}, "num_samples=0"),
     ({"output_dir": " "}, "output_dir: it is empty")],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused(change, line):
    with pytest.raises(UserMistake, match=line):
        DatagenSettings(**{**MIX, **change})


def test_rows_on_the_hub_say_what_to_do_without_a_network(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(FileNotFoundError, match="give a folder with apps.jsonl by --data_dir"):
        mixed_problems(["apps"], None, 1)
