"""Sharing a model: the card states what was measured, the upload holds what loads, a refusal is one line."""

import os
from functools import partial
from inspect import signature
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import filter_repo_objects
from twins import ROWS, SMALL_TRM, make_base, make_model, make_tokenizer, nameless_base

from smollm_trm import commands
from smollm_trm.models import hub, storage
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.records import UserMistake

TRAINING = {
    "train_rows": 40,
    "dev_rows": 10,
    "optimizer_steps": 7,
    "dev_loss": 1.25,
    "split": {"source": "openai/gsm8k (main)", "seed": 42, "fingerprint": "ab" * 32},
}
RESULT = {"accuracy": 0.25, "correct": 5, "total": 20, "interval": [0.11, 0.47], "examples": ["left out"]}
QUESTION = ROWS[0]["question"]


def save(folder: Path, *, training: dict | None = None, **config) -> SmolLMv3WithTRM:
    model = make_model("smollm3", make_tokenizer(), **config)
    if training:
        model.config.notes["training"] = training
    model.save_pretrained(folder)
    return model


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


class StandIn:
    """A Hub that takes uploads into a folder, as the real one filters them."""

    calls: dict = {}

    def create_repo(self, repo_id, **options):
        self.calls["repo"] = (repo_id, options)

    def upload_folder(self, *, repo_id, folder_path, allow_patterns):
        folder = Path(folder_path)
        chosen = filter_repo_objects(sorted(files_in(folder)), allow_patterns=allow_patterns)
        self.calls["upload"] = {name: (folder / name).read_bytes() for name in chosen}


@pytest.fixture
def stand_in(monkeypatch) -> dict:
    monkeypatch.setattr(hub, "HfApi", StandIn)
    StandIn.calls = {}
    return StandIn.calls


@pytest.fixture
def folder(tmp_path):
    save(tmp_path / "model", training=TRAINING)
    return tmp_path / "model"


def test_the_card_states_what_was_measured_and_nothing_else(folder):
    hub.add_evaluation(folder, "dev", RESULT)
    config = storage.read_config(folder)
    card = hub.model_card(config)
    assert "dev: 25.0% of 20 problems (95% interval 11.0 to 47.0)" in card
    assert "40 problems of openai/gsm8k (main)" in card and "dev loss 1.2500" in card
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == "twins/smollm3" and header["datasets"] == ["openai/gsm8k"]
    [index] = model_index_to_eval_results(header["model-index"])[1]
    assert (index.dataset_name, index.metric_type, index.metric_value) == ("dev", "accuracy", 0.25)
    assert "left out" not in (folder / "config.json").read_text()


@pytest.mark.parametrize(
    ("front", "license"),
    [("license: apache-2.0", "apache-2.0"), ("license: other", "other"), ("tags: [x]", "other"), (None, "other")],
)
def test_the_card_has_the_license_of_the_base_or_says_that_it_is_unknown(front, license, tmp_path, monkeypatch):
    base, tokenizer = nameless_base("smollm3", make_tokenizer()), make_tokenizer()
    base.save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    if front:
        (tmp_path / "base" / "README.md").write_text(f"---\n{front}\n---\n# A base\n")
    model = SmolLMv3WithTRM.from_base(str(tmp_path / "base"), num_latents=2, reasoner_settings=SMALL_TRM)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    save(tmp_path / "named")
    monkeypatch.setattr(ModelCard, "load", lambda name, **_: ModelCard(f"---\n{front}\n---\n") if front else 1 / 0)
    hub.push_model(tmp_path / "named", "me/model", dry_run=True)
    for folder in ("merged", "named"):
        header = yaml.safe_load((tmp_path / folder / "README.md").read_text().split("---")[1])
        assert header["license"] == license, folder
        assert header.get("license_name") == ("unspecified" if license == "other" else None)


def test_a_card_of_an_unmeasured_model_says_so(tmp_path):
    save(tmp_path)
    assert "- nothing was measured yet" in (tmp_path / "README.md").read_text()


def test_the_upload_holds_exactly_what_loads(folder, stand_in, tmp_path, monkeypatch):
    (folder / "notes.ckpt").write_text("not for the Hub")
    files = hub.push_model(folder, "me/model", private=False)
    assert set(files) == files_in(folder) - {"notes.ckpt"} == set(stand_in["upload"])
    assert {"config.json", "model.safetensors", "adapter/adapter_model.safetensors", "README.md"} <= set(files)
    assert stand_in["repo"] == ("me/model", {"private": False, "exist_ok": True})
    assert 'from_pretrained("me/model")' in stand_in["upload"]["README.md"].decode()
    asked = []

    def download(name: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        for path in filter_repo_objects(list(stand_in["upload"]), allow_patterns=allow_patterns):
            (tmp_path / "hub" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "hub" / path).write_bytes(stand_in["upload"][path])
        return str(tmp_path / "hub")

    monkeypatch.setattr(storage, "snapshot_download", download)
    tokenizer = make_tokenizer()
    base = make_base("smollm3", tokenizer), tokenizer
    loaded = SmolLMv3WithTRM.from_pretrained("me/model", model_name=base, revision="v1")
    assert asked == [("me/model", "v1")]
    original = make_model("smollm3", tokenizer)
    assert loaded.generate_with_thinking(QUESTION, max_new_tokens=6) == original.generate_with_thinking(
        QUESTION, max_new_tokens=6
    )


def test_a_model_pushes_itself(stand_in):
    model = make_model("smollm3", make_tokenizer())
    files = model.push_to_hub("me/model")
    assert set(files) == set(stand_in["upload"]) and stand_in["repo"] == (
        "me/model",
        {"private": True, "exist_ok": True},
    )


def test_a_dry_run_uploads_nothing(folder, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", lambda **_: pytest.fail("a dry run must not reach the Hub"))
    assert "README.md" in hub.push_model(folder, "me/model", dry_run=True)


def test_an_unreachable_hub_is_one_clear_line(folder, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", partial(hub.HfApi, "http://127.0.0.1:9"))
    with pytest.raises(UserMistake, match="could not push to me/model: .*set HF_TOKEN") as refused:
        hub.push_model(folder, "me/model")
    assert "\n" not in str(refused.value)


def test_a_name_that_the_hub_does_not_know_is_one_clear_line(monkeypatch):
    def unknown(*_, **__):
        raise OSError("404 Client Error.\nmore about it")

    monkeypatch.setattr(storage, "snapshot_download", unknown)
    with pytest.raises(UserMistake, match="me/nothing: no such folder, and the Hub did not give it") as refused:
        SmolLMv3WithTRM.from_pretrained("me/nothing")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("prompt_format", ["plain", "chat"])
def test_everything_that_is_saved_is_uploaded_and_privately_unless_told_otherwise(tmp_path, prompt_format):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    make_model("smollm3", tokenizer, prompt_format=prompt_format).save_pretrained(tmp_path)
    assert set(hub.push_model(tmp_path, "me/model", dry_run=True)) == files_in(tmp_path) >= {"chat_template.jinja"}
    pushes = (hub.push_model, commands.push, SmolLMv3WithTRM.push_to_hub)
    assert all(signature(push).parameters["private"].default is True for push in pushes)


def test_a_model_on_a_base_that_lies_here_only_is_refused_until_it_is_merged(tmp_path):
    base, tokenizer = nameless_base("smollm3", make_tokenizer()), make_tokenizer()
    base.save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    model = SmolLMv3WithTRM.from_base(str(tmp_path / "base"), num_latents=2, reasoner_settings=SMALL_TRM)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserMistake, match="its base lies on this machine only.*merge_and_unload") as refused:
        hub.push_model(tmp_path / "model", "me/model", dry_run=True)
    assert "\n" not in str(refused.value)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert set(hub.push_model(tmp_path / "merged", "me/model", dry_run=True)) == files_in(tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert str(tmp_path) not in card and "base_model" not in card and "a base of its own" in card


def test_a_base_that_is_saved_with_the_model_goes_with_it(tmp_path):
    texts = [row["question"] for row in ROWS]
    config = {"num_latents": 2, "reasoner_settings": SMALL_TRM, "tiny_texts": texts}
    SmolLMv3WithTRM.from_base("tiny", **config).save_pretrained(tmp_path)
    files = hub.push_model(tmp_path, "me/model", dry_run=True)
    assert set(files) == files_in(tmp_path) >= {"model.safetensors", "adapter/adapter_model.safetensors"}


def test_a_run_folder_may_be_pushed(tmp_path):
    save(tmp_path / "model")
    assert "config.json" in hub.push_model(tmp_path, "me/model", dry_run=True)


def test_a_card_names_no_data_it_does_not_know(tmp_path):
    save(tmp_path, training={**TRAINING, "split": {**TRAINING["split"], "source": "rows.json"}})
    assert "openai/gsm8k" not in (tmp_path / "README.md").read_text()


def test_a_card_is_whole_or_the_one_before_stays(folder, monkeypatch):
    hub.push_model(folder, "me/model", dry_run=True)
    before = (folder / "README.md").read_bytes()
    hub.add_evaluation(folder, "dev", RESULT)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        hub.push_model(folder, "me/model", dry_run=True)
    assert (folder / "README.md").read_bytes() == before
