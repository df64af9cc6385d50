"""The reasoner trained alone on results: what it reads, what it leaves as it was, and what goes on from it."""

import json

import pytest
import torch
from runs import DEV_ROWS, TINY_RUN, TRAIN_ROWS, save_tiny_base, train_tiny
from twins import ROWS, make_model, make_tokenizer

from smollm_trm.cli import main
from smollm_trm.finetune import train_gsm8k, train_reasoner
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.records import UserMistake
from smollm_trm.training.module import SmolLMTRMLightningModule
from smollm_trm.training.reasoner_first import KeptStates

ALONE = {**TINY_RUN, "train_dataset": TRAIN_ROWS, "test_dataset": DEV_ROWS, "latents_per_step": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return train_reasoner(**ALONE, model_name=base, output_dir=str(folder)), folder


def test_kept_states_are_those_that_a_read_pass_gives(tmp_path):
    model = make_model("smollm3", make_tokenizer(), num_latents=3).eval()
    rows = [model.encoder.encode(row) for row in ROWS[:5]]
    questions = [tuple(row.prompt[: len(row.prompt) - row.n_behind]) for row in rows]
    kept = KeptStates(model, [*questions, questions[0]], tmp_path / "states.bin")
    for question in questions:
        ids = torch.tensor([[*question, model.config.slot_token_id, 1]])
        prompt = model.model.prompt_before(ids, torch.ones_like(ids), ids == model.config.slot_token_id)
        expected = torch.cat(prompt.hidden_states(model.reasoner.read_depths), -1)[0]
        torch.testing.assert_close(kept.states[kept.places[question]].float(), expected, rtol=1e-2, atol=1e-2)


def test_the_reasoner_alone_learns_and_the_base_stays_as_it_is(alone, base):
    (trainer, module), folder = alone
    assert trainer.global_step == 6
    assert not list(folder.glob("states*")), "of no use any more"
    untouched = SmolLMv3WithTRM.from_base(base, **{"reasoner": None, "num_latents": 0, "base_training": "frozen"})
    weights = module.model.model.language_model.state_dict()
    for name, weight in untouched.model.language_model.state_dict().items():
        assert torch.equal(weights[name][: len(weight)], weight), name
    fresh = SmolLMv3WithTRM.from_base(base, num_latents=3, reasoner_settings=TINY_RUN["trm_kwargs"])
    moved = dict(module.model.reasoner.named_parameters())
    for name, weight in fresh.reasoner.named_parameters():
        assert torch.equal(moved[name], weight) is ("halting" in name), name  # nothing is asked of the halting head


def test_a_finished_run_reads_nothing_again(alone, base, monkeypatch):
    (_, first), folder = alone
    monkeypatch.setattr(KeptStates, "_read", lambda *_: pytest.fail("read again"))
    trainer, module = train_reasoner(**ALONE, model_name=base, output_dir=str(folder))
    assert trainer.global_step == 6
    for name, weight in first.model.reasoner.state_dict().items():
        assert torch.equal(module.model.reasoner.state_dict()[name], weight), name


def test_its_results_get_better(base, tmp_path):
    settings = {**ALONE, "num_epochs": 8, "trm_learning_rate": 5e-2, "ema_decay": 0.5, "patience": None}
    train_reasoner(**settings, model_name=base, output_dir=str(tmp_path))
    lines = (tmp_path / "logs" / "metrics.csv").read_text().splitlines()
    at = lines[0].split(",").index("train_loss")
    losses = [float(line.split(",")[at]) for line in lines[1:] if line.split(",")[at]]
    assert losses[-1] < 0.7 * losses[0]


def test_an_adapter_is_trained_on_from_it(alone, tmp_path):
    (_, first), folder = alone
    seen = []

    class Watched(SmolLMTRMLightningModule):
        def on_fit_start(self) -> None:
            super().on_fit_start()
            seen.append({name: one.clone() for name, one in self.model.reasoner.state_dict().items()})

    settings = {**ALONE, "target": "answer", "load_model_path": str(folder), "output_dir": str(tmp_path)}
    _, module = train_gsm8k(**settings, module_class=Watched)
    for name, weight in first.model.reasoner.state_dict().items():
        assert torch.equal(seen[0][name], weight), name
    assert module.model.config.base_training == "lora"


def test_soft_words_say_the_last_result_to_the_end(base, tmp_path):
    settings = {**ALONE, "model_name": base, "output_dir": str(tmp_path), "max_steps": 1}
    settings |= {"num_latents": 6, "trm_kwargs": {**TINY_RUN["trm_kwargs"], "soft_words": True}}
    trainer, _ = train_reasoner(**settings)
    data = trainer.datamodule.dev_set
    one_step = [at for at, row in enumerate(data.rows) if row["answer"].count("<<") == 1]
    labels = data[one_step]["latent_labels"]
    assert one_step and torch.equal(labels[:, :2], labels[:, 2:4]) and torch.equal(labels[:, :2], labels[:, 4:])


def test_a_resumed_run_is_an_unbroken_one(alone, base, tmp_path):
    (_, unbroken), _ = alone

    class Broken(Exception):
        pass

    def stop(self, batch, batch_idx):
        if self.trainer.global_step == 4:
            raise Broken
        return step(self, batch, batch_idx)

    from smollm_trm.training.reasoner_first import ReasonerFirstModule

    step = ReasonerFirstModule.training_step
    settings = {**ALONE, "model_name": base, "output_dir": str(tmp_path), "save_every_n_steps": 2}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Broken):
        patch.setattr(ReasonerFirstModule, "training_step", stop)
        train_reasoner(**settings)
    _, resumed = train_reasoner(**settings)
    for name, weight in unbroken.model.reasoner.state_dict().items():
        assert torch.equal(resumed.model.reasoner.state_dict()[name], weight), name


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target": "steps"}, "target is 'answer' here"),
        ({"latents_per_step": 0}, "leave latents_per_step=0"),
        ({"reasoner": "static", "trm_kwargs": {}}, "reads nothing"),
        ({"train_dataset": [{"question": "What is 1 + 1?", "answer": "#### 2"}] * 2}, "no row has a calculator"),
    ],
)
def test_what_cannot_be_is_refused(base, tmp_path, changes, told):
    with pytest.raises(UserMistake, match=told):
        train_reasoner(**{**ALONE, "model_name": base, "output_dir": str(tmp_path), **changes})


def test_training_tells_both_parts_apart(base, tmp_path):
    with pytest.raises(UserMistake, match="base_training"):
        train_reasoner(**ALONE, model_name=base, output_dir=str(tmp_path))
        train_tiny(base, tmp_path, latents_per_step=2, target="answer")


def test_the_command_line_has_it(base, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in TRAIN_ROWS))
    options = ["--model_name", base, "--dataset_path", str(rows), "--num_latents", "3", "--max_steps", "1"]
    options += ["--trm_kwargs", json.dumps(TINY_RUN["trm_kwargs"]), "--progress", "false", "--latents_per_step", "2"]
    main(["pretrain", *options, "--output_dir", str(tmp_path / "run")])
    assert f"--load_model_path {tmp_path}/run/model" in capsys.readouterr().out
