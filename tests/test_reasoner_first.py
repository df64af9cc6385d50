"""The reasoner trained alone on results: what it reads, what it leaves as it was, and what goes on from it."""

import json
from pathlib import Path

import pytest
import torch
from runs import DEV_ROWS, TINY_RUN, TRAIN_ROWS, save_tiny_base
from twins import ROWS, make_model, make_tokenizer

from smollm_trm.cli import main
from smollm_trm.finetune import train_gsm8k
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.records import UserMistake
from smollm_trm.training.module import SmolLMTRMLightningModule
from smollm_trm.training.reasoner_first import KeptStates, ReasonerFirstModule

RUN = {**TINY_RUN, "train_dataset": TRAIN_ROWS, "test_dataset": DEV_ROWS, "target": "answer", "latents_per_step": 2}
FIRST = {**RUN, "reasoner_steps": 6, "save_every_n_steps": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


class Watched(SmolLMTRMLightningModule):
    """Keeps what the reasoner is when the training of both begins."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.began_with = {name: one.clone() for name, one in self.model.model.state_dict().items()}


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return train_gsm8k(**FIRST, model_name=base, output_dir=str(folder), module_class=Watched), folder


def alone_in(folder: Path) -> SmolLMv3WithTRM:
    """The model that the reasoner's own training left."""
    return SmolLMv3WithTRM.from_pretrained(folder / "reasoner")


def reasoner_weights(model: SmolLMv3WithTRM) -> dict[str, torch.Tensor]:
    return {f"reasoner.{name}": one for name, one in model.reasoner.state_dict().items()}


def assert_equal_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_kept_states_are_those_that_a_read_pass_gives():
    model = make_model("smollm3", make_tokenizer(), num_latents=3).eval()
    rows = [model.encoder.encode(row) for row in ROWS[:5]]
    questions = [tuple(row.prompt[: len(row.prompt) - row.n_behind]) for row in rows]
    kept = KeptStates(model, [*questions, questions[0]])
    for question in questions:
        ids = torch.tensor([[*question, model.config.slot_token_id, 1]])
        prompt = model.model.prompt_before(ids, torch.ones_like(ids), ids == model.config.slot_token_id)
        expected = torch.cat(prompt.hidden_states(model.reasoner.read_depths), -1)[0]
        torch.testing.assert_close(kept.states[kept.places[question]].float(), expected, rtol=1e-2, atol=1e-2)


def test_the_reasoner_alone_learns_and_the_base_stays_as_it_is(run, base):
    (_, module), folder = run
    assert json.loads((folder / "reasoner" / "results.json").read_text())["optimizer_steps"] == 6
    untouched = SmolLMv3WithTRM.from_base(base, **{"reasoner": None, "num_latents": 0, "base_training": "frozen"})
    for name, weight in untouched.model.language_model.state_dict().items():
        of_layer = name.replace("_proj.weight", "_proj.base_layer.weight")
        found = module.began_with.get(f"language_model.{of_layer}", module.began_with.get(f"language_model.{name}"))
        assert torch.equal(found[: len(weight)], weight), name
    fresh = SmolLMv3WithTRM.from_base(base, num_latents=3, reasoner_settings=TINY_RUN["trm_kwargs"])
    moved = dict(alone_in(folder).reasoner.named_parameters())
    for name, weight in fresh.reasoner.named_parameters():
        assert torch.equal(moved[name], weight) is ("halting" in name), name  # nothing is asked of the halting head


def test_both_are_trained_on_from_it(run):
    (_, module), folder = run
    expected = reasoner_weights(alone_in(folder))
    assert_equal_weights(module.began_with, expected)
    after = reasoner_weights(module.model)
    assert any(not torch.equal(after[name], weight) for name, weight in expected.items())
    assert module.model.config.base_training == "lora" and module.model.config.base_model


def test_a_finished_run_reads_nothing_again(run, base, monkeypatch):
    (_, first), folder = run
    monkeypatch.setattr(KeptStates, "_read", lambda *_: pytest.fail("read again"))
    _, module = train_gsm8k(**FIRST, model_name=base, output_dir=str(folder))
    assert_equal_weights(reasoner_weights(module.model), reasoner_weights(first.model))


def test_its_results_get_better(base, tmp_path):
    settings = {**FIRST, "reasoner_steps": 40, "max_steps": 1, "trm_learning_rate": 2.5e-2, "ema_decay": 0.5}
    train_gsm8k(**settings, model_name=base, output_dir=str(tmp_path))
    lines = (tmp_path / "reasoner" / "logs" / "metrics.csv").read_text().splitlines()
    at = lines[0].split(",").index("train_loss")
    losses = [float(line.split(",")[at]) for line in lines[1:] if line.split(",")[at]]
    assert losses[-1] < 0.7 * losses[0]


def test_soft_words_say_the_last_result_to_the_end(base, tmp_path):
    settings = {**FIRST, "model_name": base, "output_dir": str(tmp_path), "reasoner_steps": 1, "max_steps": 1}
    settings |= {"num_latents": 6, "trm_kwargs": {**TINY_RUN["trm_kwargs"], "soft_words": True}}
    trainer, _ = train_gsm8k(**settings)
    data = trainer.datamodule.dev_set
    one_step = [at for at, row in enumerate(data.rows) if row["answer"].count("<<") == 1]
    labels = data[one_step]["latent_labels"]
    assert one_step and torch.equal(labels[:, :2], labels[:, 2:4]) and torch.equal(labels[:, :2], labels[:, 4:])


@pytest.mark.parametrize("broken_in", [ReasonerFirstModule, SmolLMTRMLightningModule])
def test_a_run_broken_off_in_either_part_ends_as_an_unbroken_one(run, base, tmp_path, broken_in):
    (_, unbroken), _ = run
    step = broken_in.training_step

    class Broken(Exception):
        pass

    def stop(self, batch, batch_idx):
        if type(self) is broken_in and self.trainer.global_step == 4:
            raise Broken
        return step(self, batch, batch_idx)

    settings = {**FIRST, "model_name": base, "output_dir": str(tmp_path)}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Broken):
        patch.setattr(broken_in, "training_step", stop)
        train_gsm8k(**settings)
    _, resumed = train_gsm8k(**settings)
    assert_equal_weights(resumed.model.state_dict(), unbroken.model.state_dict())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target": "steps"}, "needs target='answer'"),
        ({"latents_per_step": 0}, "latents_per_step above 0"),
        ({"load_model_path": "elsewhere"}, "neither mode, load_model_path"),
        ({"reasoner_steps": -1}, "must be at least 0"),
        ({"reasoner": "static", "trm_kwargs": {}}, "a reasoner 'trm' or 'compressor'"),
        ({"base_training": "full"}, "base_training='full'"),
    ],
)
def test_what_cannot_be_is_refused(base, tmp_path, changes, told):
    with pytest.raises(UserMistake, match=told):
        train_gsm8k(**{**FIRST, "model_name": base, "output_dir": str(tmp_path), **changes})


BARE = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(6)]


@pytest.mark.parametrize("part", ["train_dataset", "test_dataset"])
def test_where_rows_have_no_results_the_reasoner_is_not_trained_alone(base, tmp_path, part, caplog):
    trainer, _ = train_gsm8k(**{**FIRST, "model_name": base, "output_dir": str(tmp_path), "max_steps": 1, part: BARE})
    assert trainer.global_step == 1 and not (tmp_path / "reasoner").exists()
    assert "no results to learn alone" in caplog.text


def test_a_full_disk_is_told_with_the_place_and_the_size(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    model = make_model("smollm3", make_tokenizer(), num_latents=3).eval()
    with pytest.raises(OSError, match="GiB in .*TMPDIR"):
        KeptStates(model, [(1, 2, 3)])


def test_lora_alone_does_not_mind(base, tmp_path):
    train_gsm8k(**{**FIRST, "model_name": base, "output_dir": str(tmp_path), "use_trm": False, "max_steps": 1})
    assert not (tmp_path / "reasoner").exists()


def test_the_command_line_has_it(base, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in TRAIN_ROWS))
    options = ["--model_name", base, "--dataset_path", str(rows), "--num_latents", "3", "--max_steps", "1"]
    options += ["--trm_kwargs", json.dumps(TINY_RUN["trm_kwargs"]), "--progress", "false", "--latents_per_step", "2"]
    main(["train", *options, "--target", "answer", "--reasoner_steps", "1", "--output_dir", str(tmp_path / "run")])
    assert (tmp_path / "run" / "reasoner" / "model").is_dir()
