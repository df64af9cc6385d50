"""Every reasoner through the real `train_gsm8k`: what it trains, logs and leaves."""

import csv
import json
import os
from pathlib import Path

import pytest
import torch
from runs import DEV_ROWS, ROWS, TINY_TRM, TRAIN_ROWS, first_difference, save_tiny_base, train_tiny, trainable_weights

from smollm_trm.data.rows import write_jsonl
from smollm_trm.evaluation.loading import problems_of
from smollm_trm.models.reasoners.compressor import CompressedReader
from smollm_trm.models.reasoners.known import REASONERS
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.training.ema import AverageWeights
from smollm_trm.training.settings import TrainSettings

OF_SEQUENCE = {"d_compressed": 16, "n_layers": 1, "n_heads": 2, "n_latent_steps": 1, "n_supervision_steps": 2}
OWN_SETTINGS = {"trm": TINY_TRM, "compressor": {"compression_heads": 2, "dim": 16}, "sequence_trm": OF_SEQUENCE}
SAME_EVERYWHERE = {"static", "pause"}
"""Their latents are meant to be the same for every problem."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def train(base: str, folder: Path, reasoner: str, **changes):
    settings = {"reasoner": reasoner, "trm_kwargs": OWN_SETTINGS.get(reasoner, {}), "max_steps": 2, **changes}
    settings |= {"num_latents": 1} if reasoner == "sequence_trm" else {}
    return train_tiny(base, folder, **settings)


def logged(folder: Path) -> set[str]:
    with open(folder / "logs" / "metrics.csv", newline="") as file:
        return set(next(csv.reader(file)))


@pytest.mark.parametrize("reasoner", REASONERS)
def test_every_reasoner_trains_and_its_saved_model_is_what_was_returned(base, tmp_path, reasoner):
    trainer, module = train(base, tmp_path, reasoner, save_every_n_steps=1)
    assert trainer.global_step == 2 and (tmp_path / "results.json").is_file()
    assert ("latent_variation" in logged(tmp_path)) is (reasoner not in SAME_EVERYWHERE)
    reloaded = SmolLMv3WithTRM.from_pretrained(tmp_path / "model", device="cpu")
    assert first_difference(trainable_weights(reloaded), trainable_weights(module.model)) is None
    question = ROWS[40]["question"]
    texts = [one.generate_with_thinking(question, max_new_tokens=5) for one in (reloaded, module.model)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("reasoner", REASONERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_trainable_tensor_moves_under_bf16(base, tmp_path, monkeypatch, reasoner, checkpointing):
    start, on_fit_start = {}, AverageWeights.on_fit_start

    def see(self, trainer, pl_module):
        start.update(trainable_weights(pl_module))
        on_fit_start(self, trainer, pl_module)

    monkeypatch.setattr(AverageWeights, "on_fit_start", see)
    options = {"precision": "bf16-mixed", "gradient_checkpointing": checkpointing, "max_steps": 4, "ema_decay": 0.0}
    _, module = train(base, tmp_path, reasoner, target="answer", num_epochs=4, **options)
    base_dtype = torch.float32 if reasoner == "coconut" else torch.bfloat16  # half-precision weights hurt Coconut
    assert module.model.base_model.language_model.embed_tokens.weight.dtype == base_dtype
    end = trainable_weights(module)
    still = [name for name, weight in end.items() if torch.equal(weight, start[name])]
    assert end.keys() == start.keys() and still == []
    assert all(weight.dtype == torch.float32 and torch.isfinite(weight).all() for weight in end.values())


@pytest.mark.parametrize("reasoner", ["static", "pause", "coconut"])
def test_settings_of_another_reasoner_are_refused_by_name(reasoner):
    with pytest.raises(ValueError, match="trm_kwargs of the reasoner '.*': unknown setting 'n_layers'"):
        TrainSettings(reasoner=reasoner, trm_kwargs={"n_layers": 1})


def local_paths_in(folder: Path, *places: str) -> list[str]:
    """Files of a folder, apart from config.json's `base_model`, in which one of these places is named."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        if path.name == "config.json" and path.parent == folder:
            config = json.loads(content)
            del config["base_model"]
            content = json.dumps(config).encode()
        found += [f"{path.relative_to(folder)}: {place}" for place in places if place.encode() in content]
    return found


@pytest.mark.parametrize("training", ["lora", "full"])
@pytest.mark.parametrize("given", ["data_dir", "dataset_path"])
def test_a_saved_model_names_no_place_on_this_machine(base, tmp_path, monkeypatch, training, given):
    data = tmp_path / "private" / "problems"
    write_jsonl(data / "train.jsonl", ROWS[:25])
    write_jsonl(data / "test.jsonl", DEV_ROWS[:2])
    place = data if given == "data_dir" else data / "train.jsonl"
    folder = tmp_path / "private" / "run"
    options = {"train_dataset": None, "test_dataset": None, given: str(place), "base_training": training}
    train(base, folder, "static", **options)
    private = [str(tmp_path), os.path.expanduser("~") + "/", "private"]
    assert local_paths_in(folder / "model", *private) == []
    notes = json.loads((folder / "model" / "config.json").read_text())["notes"]["training"]
    assert notes["split"]["source"] == place.name
    monkeypatch.chdir(data)  # and the problems are known all the same
    for spelling in (str(place), os.path.relpath(place)):
        rows, split = problems_of(
            "dev", **{"data_dir": None, "dataset_path": None, given: spelling}, seed=1, models=[str(folder)]
        )
        assert len(rows) == notes["dev_rows"] and split == notes["split"]


def test_a_fresh_reasoner_measures_the_training_questions_once(base, tmp_path, monkeypatch):
    asked, dropout, fit, measure = [], [], SmolLMv3WithTRM.fit_reasoner, CompressedReader.fit

    def see(self, questions):
        asked.append(list(questions))
        fit(self, questions)

    def see_mode(self, prompt):
        dropout.append(prompt.decoder.training)
        measure(self, prompt)

    monkeypatch.setattr(SmolLMv3WithTRM, "fit_reasoner", see)
    monkeypatch.setattr(CompressedReader, "fit", see_mode)
    _, module = train(base, tmp_path, "trm", num_epochs=1)
    assert asked == [[row["question"] for row in TRAIN_ROWS]] and dropout == [False]
    measured = {name: buffer.clone() for name, buffer in module.named_buffers() if "standardize" in name}
    assert len(measured) == 2
    _, resumed = train(base, tmp_path, "trm", num_epochs=1)
    assert len(asked) == 1, "a finished run is measured again"
    again = dict(resumed.named_buffers())
    assert all(torch.equal(buffer, again[name]) for name, buffer in measured.items())
