"""GRPO: what is rewarded, which problems are drawn, what is trained, and runs that stop and go on."""

import csv
import json
from pathlib import Path

import pytest
import torch
from runs import save_tiny_base
from twins import ROWS, SMALL_TRM, make_model, make_tokenizer

from smollm_trm import cli
from smollm_trm.data.rows import write_jsonl
from smollm_trm.grpo import train_grpo
from smollm_trm.models.hub import model_card
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.records import UserMistake
from smollm_trm.training import grpo_trainer
from smollm_trm.training.checkpoints import newest_good_checkpoint
from smollm_trm.training.grpo_settings import GRPOSettings
from smollm_trm.training.grpo_trainer import EasyToHard, LatentGRPOTrainer, RightAnswer, choose_trained, grpo_damage_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
TRAIN, DEV = ROWS[:20], ROWS[20:24]
TINY = {"max_steps": 2, "problems_per_step": 3, "samples_per_problem": 2, "batch_size": 6, "save_every_n_steps": 1}
TINY |= {"learning_rate": 1e-2, "precision": "fp32", "progress": False, "open_next_at": 0.0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model with an adapter and a reasoner, saved beside its base."""
    folder = tmp_path_factory.mktemp("saved")
    options = {"reasoner_settings": SMALL_TRM, "num_latents": 3, "target": "answer"}
    model = SmolLMv3WithTRM.from_base(save_tiny_base(folder / "base"), **options)
    model.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def graded_by_length(monkeypatch):
    """An untrained twin is never right: reward texts of an even length."""
    monkeypatch.setattr(grpo_trainer, "is_correct", lambda text, gold: len(text) % 2 == 0)


def trained(saved: Path, folder: Path, **changes):
    return train_grpo(saved, train_dataset=TRAIN, test_dataset=DEV, output_dir=str(folder), **{**TINY, **changes})


def logged_steps(folder: Path) -> list[int]:
    return [int(row["step"]) for row in csv.DictReader((folder / "logs" / "metrics.csv").read_text().splitlines())]


def test_the_command_trains_adapter_and_reasoner_and_leaves_what_every_run_does(
    saved, tmp_path, graded_by_length, capsys
):
    write_jsonl(tmp_path / "train.jsonl", TRAIN)
    write_jsonl(tmp_path / "dev.jsonl", DEV)
    data = ["--dataset_path", str(tmp_path / "train.jsonl"), "--dev_path", str(tmp_path / "dev.jsonl")]
    options = [f"--{name}={value}" for name, value in TINY.items()]
    out = tmp_path / "out"
    cli.main(["grpo", str(saved), *data, *options, "--output_dir", str(out)])
    assert "| before" in (shown := capsys.readouterr().out) and "rewards.png" in shown
    results = json.loads((out / "results.json").read_text())
    assert results["before"]["total"] == 4 and results["samples"] == 12 and "trl" in results["versions"]
    assert results["difference"]["p_value"] <= 1
    assert {"comparison.md", "rewards.png", "settings.json"} <= {path.name for path in out.iterdir()}
    assert logged_steps(out) == [0, 1] and not list(out.rglob("*.bin"))
    before, after = (SmolLMv3WithTRM.from_pretrained(place) for place in (saved, out))
    own = dict(before.named_parameters())
    moved = {name for name, p in after.named_parameters() if not torch.equal(p, own[name])}
    assert any("lora_" in name for name in moved) and any("recursion" in name for name in moved)
    assert all("lora_" in name or ".reasoner." in name for name in moved)
    assert after.generation_config == before.generation_config and "steps of GRPO" in model_card(after.config)
    cli.main(["grpo", str(saved), *data, *options, "--output_dir", str(out)])  # a run that has ended is not repeated
    assert logged_steps(out) == [0, 1]


@pytest.mark.parametrize("part", ["reasoner", "lora"])
def test_what_is_trained_is_a_choice(part):
    model = make_model("smollm3", make_tokenizer())
    choose_trained(model, part, "it")
    chosen = {name for name, p in model.named_parameters() if p.requires_grad}
    assert chosen and all((".reasoner." in name) == (part == "reasoner") for name in chosen)


def test_a_part_that_is_not_there_is_refused_by_name():
    frozen = make_model("smollm3", make_tokenizer(), base_training="frozen")
    with pytest.raises(UserMistake, match="train='lora': runs/1 has no LoRA adapter; choose train='reasoner'"):
        choose_trained(frozen, "lora", "runs/1")


def test_a_stopped_run_goes_on_where_it_was(saved, tmp_path, graded_by_length, monkeypatch):
    def stop(self, args, state, control, **_):
        if state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(grpo_trainer.RunLogs, "on_step_begin", stop, raising=False)
        trained(saved, tmp_path, max_steps=3)
    newest = newest_good_checkpoint(tmp_path / "checkpoints", grpo_damage_of)
    kept, rates = torch.load(newest / "weights.pt", weights_only=True), grpo_trainer.read_state(newest)
    assert newest.name == "step-2.ckpt" and rates["stateful_callbacks"]["EasyToHard"]
    seen = []
    load = LatentGRPOTrainer._load_from_checkpoint

    def loaded(self, checkpoint, model=None):
        load(self, checkpoint)
        own = dict(self.model.named_parameters())
        seen.append(self.curriculum.step == 2 and all(torch.equal(own[name], one) for name, one in kept.items()))

    monkeypatch.setattr(LatentGRPOTrainer, "_load_from_checkpoint", loaded)
    with pytest.raises(UserMistake, match="temperature"):
        trained(saved, tmp_path, max_steps=3, temperature=0.5)
    trained(saved, tmp_path, max_steps=3)
    assert seen == [True] and logged_steps(tmp_path) == [0, 1, 2]
    finished = SmolLMv3WithTRM.from_pretrained(tmp_path).state_dict()
    (tmp_path / "results.json").unlink()  # as if killed before the last file
    again, _ = trained(saved, tmp_path, max_steps=3)
    assert all(torch.equal(finished[name], one) for name, one in again.state_dict().items())
    assert logged_steps(tmp_path) == [0, 1, 2]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-2.ckpt", "step-3.ckpt"]


def test_a_checkpoint_that_would_run_code_is_skipped_with_a_message(tmp_path, caplog):
    state = {"global_step": 1, "stateful_callbacks": {"EasyToHard": {"1": 0.5}}}
    for step in (1, 2):
        folder = tmp_path / f"step-{step}.ckpt"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps(state))
        for name in grpo_trainer.TENSOR_FILES:
            torch.save({"weight": torch.ones(2)}, folder / name)
    assert grpo_damage_of(folder) is None
    torch.save(Malice(), folder / "rng_state.pth")
    assert newest_good_checkpoint(tmp_path, grpo_damage_of).name == "step-1.ckpt"
    assert "more than tensors and plain values" in caplog.text and not Malice.ran


class Malice:
    ran = False

    def __reduce__(self):
        return exec, ("import test_grpo; test_grpo.Malice.ran = True",)


def test_fewer_rows_and_one_reading_of_a_prompt_change_nothing(saved, tmp_path, graded_by_length, monkeypatch):
    """The gradient is that of all samples, and what is sampled has the probability that the loss gives it."""
    base, own, gradients = LatentGRPOTrainer.__mro__[1]._compute_loss, LatentGRPOTrainer._compute_loss, []

    def both(self, model, inputs):
        inputs["advantages"][:2] = 0.0
        inputs["completion_ids"][2] = inputs["completion_ids"][3]
        inputs["completion_mask"][2] = inputs["completion_mask"][3]
        inputs["prompt_ids"][2], inputs["prompt_mask"][2] = inputs["prompt_ids"][3], inputs["prompt_mask"][3]
        inputs["advantages"][2:4] = torch.tensor([1.0, 0.5])
        trained = [p for p in model.parameters() if p.requires_grad]
        for loss in (base, own):
            gradients.append(torch.autograd.grad(loss(self, model, inputs), trained, allow_unused=True))
        return own(self, model, inputs)

    monkeypatch.setattr(LatentGRPOTrainer, "_compute_loss", both)
    trained(saved, tmp_path, max_steps=1)
    whole, fewer = gradients
    for one, other in zip(whole, fewer, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, atol=1e-6)
    assert any(one is not None and one.abs().max() > 1e-4 for one in whole)


def test_greedy_samples_are_what_the_model_generates(saved, tmp_path, graded_by_length, monkeypatch):
    single, pairs = LatentGRPOTrainer._generate_single_turn, []

    def greedy(self, prompt_ids, images, fields, n, *_):
        self.generation_kwargs |= {"do_sample": False, "top_k": None, "temperature": None, "top_p": None}
        ids, none = single(self, prompt_ids, images, fields, n)
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        pairs.extend(zip(self.tokenizer_questions(prompt_ids), texts, strict=True))
        return ids, none

    def questions(self, prompt_ids):
        return [self._tokenizer.decode(ids).split("Question: ")[1].split("\nAnswer:")[0] for ids in prompt_ids]

    monkeypatch.setattr(LatentGRPOTrainer, "tokenizer_questions", questions, raising=False)
    monkeypatch.setattr(LatentGRPOTrainer, "_generate_single_turn", greedy)
    model, _ = trained(saved, tmp_path, max_steps=1)
    fresh = SmolLMv3WithTRM.from_pretrained(saved)
    limit = fresh.encoder.encode_completion(DEV[0]["answer"])
    assert len(pairs) == 6
    for question, text in pairs:
        again = fresh.generate_with_thinking(question, max_new_tokens=len(limit) + 40)
        assert again.startswith(text)


def curriculum(**changes) -> EasyToHard:
    options = {"problems": 4, "samples": 2, "repeats": 1, "open_next_at": 0.5, "seed": 0, **changes}
    return EasyToHard([1] * 10 + [2] * 10 + [4] * 10, **options)


def test_the_easy_problems_come_first_and_harder_ones_as_they_are_solved():
    drawn = curriculum()
    drawn.steps = 1
    assert set(drawn) <= set(range(10)) and len(list(drawn)) == 8
    drawn.note({1: [1.0, 1.0, 1.0, 0.0]})
    weights = drawn.weights()
    assert weights[2] > weights[1] > weights[4] == 0, "what is half unknown teaches more than what is nearly solved"
    drawn.note({2: [1.0, 0.0]})
    assert drawn.weights()[4] > 0
    assert all(weight > 0 for weight in curriculum(open_next_at=0.0).weights().values())


def test_no_problem_is_drawn_twice_in_a_step_unless_too_few_are_open():
    drawn = curriculum(problems=10)
    drawn.steps = 1
    assert len(set(drawn)) == 10
    few = curriculum(problems=12)
    few.steps = 1
    assert len(list(few)) == 24 and len(set(few)) == 10


def test_a_reward_that_never_differs_ends_the_run_after_a_limit(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo_trainer, "is_correct", lambda text, gold: False)
    with pytest.raises(UserMistake, match="the reward of all samples was 0 in 2 steps in a row.*easier problems"):
        trained(saved, tmp_path, max_steps=9, constant_limit=2)


def test_the_reward_is_the_grade_of_the_answer():
    reward = RightAnswer(curriculum(), constant_limit=2)
    completions = [[{"content": text}] for text in (" 4*6=24\n#### 24", " #### 5", "24")]
    assert reward(completions, answer=["24"] * 3, steps=[1, 1, 2], log_metric=lambda *_: None) == [1.0, 0.0, 1.0]
    assert reward.curriculum.rates == {1: 0.5, 2: 1.0}


def test_other_problems_than_those_of_its_split_are_refused(saved, tmp_path):
    model = SmolLMv3WithTRM.from_pretrained(saved)
    split = {"source": "gsm8k", "seed": 3, "fingerprint": "a" * 64}
    model.config.notes = {
        "training": {"split": split, "train_rows": 9, "dev_rows": 2, "optimizer_steps": 5, "dev_loss": None}
    }
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserMistake, match="may hold its training problems"):
        train_grpo(tmp_path / "model", train_dataset=ROWS[:40], output_dir=str(tmp_path / "out"), **TINY)


def test_without_trl_the_line_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr("smollm_trm.commands.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        cli.main(["grpo", "a model"])
    assert capsys.readouterr().err.endswith("pip install 'smollm-trm[grpo]'\n")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"train": "base"}, "choose one of reasoner, lora, both"),
        ({"samples_per_problem": 1}, "samples_per_problem=1: must be at least 2"),
        ({"batch_size": 7}, "batch_size=7: must divide the 128 samples"),
        ({"temperature": 0.0}, "must be above 0"),
        ({"resume": "step-3.ckpt"}, "resume='step-3.ckpt': choose one of auto, never"),
        ({"seed": 2**32}, "seed=4294967296: must be at most 4294967295"),
        ({"precision": "half"}, "precision='half': choose one of auto, fp32, bf16, fp16"),
        ({"open_next_at": 2.0}, "open_next_at=2.0: must be at most 1"),
        ({"learning_rate": 3.0}, "learning_rate=3.0"),
        ({"output_dir": " "}, "output_dir: it is empty"),
        ({"batch_size": 256, "max_steps": 0}, "max_steps=0: must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(given, message):
    with pytest.raises(UserMistake, match=message):
        GRPOSettings("a model", **given)
