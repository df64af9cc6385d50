"""Sharing a model: the card states what was measured, the upload holds what loads, a refusal is one line."""

import json
import os
from dataclasses import replace
from inspect import signature

import pytest
from huggingface_hub.utils import filter_repo_objects
from twins import make_model, make_tokenizer

from smollm_trm import commands, hub
from smollm_trm.models import assembly

TRAINING = {
    "train_rows": 40,
    "dev_rows": 10,
    "optimizer_steps": 7,
    "dev_loss": 1.25,
    "split": {"source": "openai/gsm8k (main)", "seed": 42, "fingerprint": "ab" * 32},
}
RESULT = {"accuracy": 0.25, "correct": 5, "total": 20, "interval": [0.11, 0.47], "examples": ["left out"]}


@pytest.fixture
def folder(tmp_path):
    make_model("smollm3", make_tokenizer()).save_pretrained(tmp_path, training=TRAINING)
    return tmp_path


def test_the_card_states_what_was_measured_and_nothing_else(folder):
    hub.add_evaluation(folder, "dev", RESULT)
    card = hub.model_card(folder)
    assert "dev: 25.0% of 20 problems (95% interval 11.0 to 47.0)" in card
    assert "40 problems of openai/gsm8k (main)" in card and "dev loss 1.2500" in card
    assert "left out" not in json.dumps(json.loads((folder / "smollm_trm.json").read_text()))


def test_a_card_of_an_unmeasured_model_says_so(tmp_path):
    make_model("smollm3", make_tokenizer()).save_pretrained(tmp_path)
    assert "- nothing was measured yet" in hub.model_card(tmp_path)


def test_the_upload_holds_exactly_what_loads(folder, monkeypatch):
    calls = {}

    class StandIn:
        def __init__(self, endpoint=None):
            calls["endpoint"] = endpoint

        def create_repo(self, repo_id, **options):
            calls["repo"] = (repo_id, options)

        def upload_folder(self, **options):
            calls["upload"] = options

    monkeypatch.setattr(hub, "HfApi", StandIn)
    (folder / "notes.ckpt").write_text("not for the Hub")
    files = hub.push_model(folder, "me/model", private=False)
    assert {"adapter_model.safetensors", "reasoner.safetensors", "smollm_trm.json", "README.md"} <= set(files)
    assert "notes.ckpt" not in files and calls["upload"]["allow_patterns"] == list(hub.UPLOADED)
    assert calls["repo"] == ("me/model", {"private": False, "exist_ok": True})


def test_a_dry_run_uploads_nothing(folder, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", lambda **_: pytest.fail("a dry run must not reach the Hub"))
    assert "README.md" in hub.push_model(folder, "me/model", dry_run=True)


def test_an_unreachable_hub_is_one_clear_line(folder):
    with pytest.raises(ValueError, match="could not push to me/model: .*set HF_TOKEN") as refused:
        hub.push_model(folder, "me/model", endpoint="http://127.0.0.1:9")
    assert "\n" not in str(refused.value)


def test_everything_that_is_saved_is_uploaded_and_privately_unless_told_otherwise(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    make_model("smollm3", tokenizer).save_pretrained(tmp_path)
    files = hub.push_model(tmp_path, "me/model", dry_run=True)
    assert set(files) == {path.name for path in tmp_path.iterdir()} and "chat_template.jinja" in files
    assert all(signature(push).parameters["private"].default is True for push in (hub.push_model, commands.push))


def test_a_card_names_neither_a_local_folder_nor_data_it_does_not_know(tmp_path):
    model = make_model("smollm3", make_tokenizer())
    model.settings = replace(model.settings, base="/somewhere/base")
    model.save_pretrained(tmp_path, training={**TRAINING, "split": {**TRAINING["split"], "source": "rows.json"}})
    card = hub.model_card(tmp_path)
    assert "/somewhere" not in card and "base_model" not in card and "openai/gsm8k" not in card


def test_a_base_that_is_saved_with_the_model_goes_with_it(tmp_path, monkeypatch):
    make_model("smollm3", make_tokenizer(), base_training="full").save_pretrained(tmp_path)
    (tmp_path / "base" / "tokenizer.model").write_bytes(b"pieces")
    files = hub.push_model(tmp_path, "me/model", dry_run=True)
    everything = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert set(files) == everything >= {"base/model.safetensors", "base/tokenizer.model"}
    assert set(filter_repo_objects(everything, allow_patterns=list(hub.UPLOADED))) == everything
    asked = {}
    monkeypatch.setattr(assembly, "snapshot_download", lambda name, **how: asked.update(how) or str(tmp_path))
    assembly.local_folder("me/model")
    assert set(filter_repo_objects(everything, **asked)) >= everything - {"README.md"}


def test_a_card_is_whole_or_the_one_before_stays(folder, monkeypatch):
    hub.push_model(folder, "me/model", dry_run=True)
    before = (folder / "README.md").read_bytes()
    hub.add_evaluation(folder, "dev", RESULT)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        hub.push_model(folder, "me/model", dry_run=True)
    assert (folder / "README.md").read_bytes() == before
