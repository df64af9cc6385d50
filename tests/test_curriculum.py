"""The curriculum: the rows of every mode and stage, a staged run and its resume, the YAML keys, step-only data."""

import json
from pathlib import Path

import pytest
import torch
from runs import TINY_RUN, first_difference, newest_checkpoint, save_tiny_base, train_tiny
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from twins import ROWS, SMALL_TRM

from smollm_trm.cli import main
from smollm_trm.data.curriculum import Curriculum
from smollm_trm.data.datamodule import GSM8KDataset
from smollm_trm.data.prompts import PromptEncoder, add_markers
from smollm_trm.evaluation.evaluate import evaluate_gsm8k
from smollm_trm.evaluation.predictions import writes_steps
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.records import UserMistake
from smollm_trm.training.module import SmolLMTRMLightningModule
from smollm_trm.training.reference_keys import own_settings
from smollm_trm.training.settings import TrainSettings

WORDS = {"Q": 0, "\n": 1, "<<": 2, ">>": 3, "+": 4, "=": 5, "### ": 6, "unused": 7, "u": 8, "E": 9}
WORDS |= {str(digit): 10 + digit for digit in range(10)}
LONG = {"question": "Q", "answer": "so <<1+1=2>>2\nand <<2+2=4>>4\nthen <<4+4=8>>8\n#### 8"}
SHORT = {"question": "QQ", "answer": "so <<1+1=2>>2\n#### 2"}
STEP_1 = [2, 11, 4, 11, 5, 12, 3, 1]  # <<1+1=2>> and a line break
STEP_2 = [2, 12, 4, 12, 5, 14, 3, 1]
STEP_3 = [2, 14, 4, 14, 5, 18, 3, 1]
LONG_END, SHORT_END = [6, 18, 9], [6, 12, 9]
START, END, Z = 20, 21, 22


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token a sign, and ids that can be written by hand."""
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="u"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<<|>>|### |.|\n"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="E", unk_token="u")


def make_encoder(mode: str, num_latents: int, **changes) -> PromptEncoder:
    tokenizer = word_tokenizer()
    if num_latents:
        assert add_markers(tokenizer) == [START, END, Z]
    options = {"prompt_format": "coconut", "steps_from": "annotations", "think": num_latents > 0, **changes}
    return PromptEncoder(tokenizer=tokenizer, num_latents=num_latents, **options)


COCONUT = {"mode": "coconut", "c_thought": 2, "epochs_per_stage": 1, "max_latent_stage": 2}
PADDED, UNPADDED = {"pad_latent_to_max": True}, {"pad_latent_to_max": False}
TABLE = [  # curriculum, epoch, what the long row is, what the short row is: ids before and behind the loss begins
    (COCONUT, 0, ([0, 1, START, END], [*STEP_1, *STEP_2, *STEP_3, *LONG_END]),
                 ([0, 0, 1, START, END], [*STEP_1, *SHORT_END])),
    (COCONUT, 1, ([0, 1, START, Z, Z, END], [*STEP_2, *STEP_3, *LONG_END]), ([0, 0, 1, START, Z, Z, END], SHORT_END)),
    (COCONUT, 2, ([0, 1, START, Z, Z, Z, Z, END], [*STEP_3, *LONG_END]),  # as published: the short row has them too
                 ([0, 0, 1, START, Z, Z, Z, Z, END], SHORT_END)),
    ({**COCONUT, **PADDED}, 3, ([0, 1, START, Z, Z, Z, Z, END], LONG_END),
                               ([0, 0, 1, START, Z, Z, Z, Z, END], SHORT_END)),
    ({**COCONUT, **UNPADDED}, 9, ([0, 1, START, Z, Z, Z, Z, END], LONG_END), ([0, 0, 1, START, Z, Z, END], SHORT_END)),
    ({**COCONUT, "c_thought": 1}, 1, ([0, 1, START, Z, END], [*STEP_2, *STEP_3, *LONG_END]),
                                     ([0, 0, 1, START, Z, END], SHORT_END)),
    ({**COCONUT, "epochs_per_stage": 3}, 5, ([0, 1, START, Z, Z, END], [*STEP_2, *STEP_3, *LONG_END]),
                                            ([0, 0, 1, START, Z, Z, END], SHORT_END)),
    ({**COCONUT, "first_stage": 2}, 0, ([0, 1, START, Z, Z, Z, Z, END], [*STEP_3, *LONG_END]),
                                       ([0, 0, 1, START, Z, Z, Z, Z, END], SHORT_END)),
    ({**COCONUT, "mode": "pause"}, 1, ([0, 1, START, Z, Z, END], [*STEP_2, *STEP_3, *LONG_END]),
                                      ([0, 0, 1, START, Z, Z, END], SHORT_END)),
    ({**COCONUT, "mode": "cot"}, 7, ([0, 1], [*STEP_1, *STEP_2, *STEP_3, *LONG_END]),
                                    ([0, 0, 1], [*STEP_1, *SHORT_END])),
    ({**COCONUT, "mode": "no_cot"}, 0, ([0, 1], LONG_END), ([0, 0, 1], SHORT_END)),
    ({**COCONUT, "mode": "no_thoughts"}, 1, ([0, 1], [*STEP_2, *STEP_3, *LONG_END]), ([0, 0, 1], SHORT_END)),
    ({**COCONUT, "mode": "no_thoughts", "max_latent_stage": 1}, 2, ([0, 1], LONG_END), ([0, 0, 1], SHORT_END)),
    ({**COCONUT, "mode": "icot", "max_latent_stage": 1}, 2, ([0, 1], [*STEP_3, *LONG_END]), ([0, 0, 1], SHORT_END)),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "epoch", "long", "short"), TABLE)
def test_a_stages_rows_are_the_references(settings, epoch, long, short):
    curriculum = Curriculum(**settings)
    encoder = make_encoder(curriculum.mode, curriculum.longest_span)
    dataset = GSM8KDataset([LONG, SHORT], encoder=encoder, curriculum=curriculum, seed=3)
    dataset.enter_stage(curriculum.stage_of(epoch), epoch=epoch)
    found = [(example.prompt, example.completion) for example in dataset.examples]
    assert found == [long, short]
    assert dataset.lengths == [len(prompt) + len(completion) for prompt, completion in found]


def test_the_spans_of_a_batch_begin_in_one_column_and_only_what_is_behind_them_is_supervised():
    curriculum = Curriculum(**COCONUT | UNPADDED)
    dataset = GSM8KDataset([LONG, SHORT], encoder=make_encoder("coconut", 4), curriculum=curriculum)
    dataset.enter_stage(3, epoch=0)
    batch = dataset[[0, 1]]
    pad = dataset.encoder.tokenizer.eos_token_id
    assert batch["input_ids"].tolist() == [
        [pad, 0, 1, START, Z, Z, Z, Z, END, 6, 18, 9],
        [0, 0, 1, START, Z, Z, END, 6, 12, 9, pad, pad],
    ]
    assert batch["attention_mask"].tolist() == [[0, *[1] * 11], [*[1] * 10, 0, 0]]
    assert batch["labels"].tolist() == [[*[-100] * 9, 6, 18, 9], [*[-100] * 7, 6, 12, 9, -100, -100]]


def test_uniform_prob_shows_each_row_in_a_stage_of_its_own_drawn_by_seed_and_epoch():
    curriculum = Curriculum(**COCONUT | UNPADDED, uniform_prob=1.0)
    dataset = GSM8KDataset([LONG] * 200, encoder=make_encoder("coconut", 4), curriculum=curriculum, seed=1)
    stages = [[0, 1, START, *[Z] * 2 * min(k, 2), END] for k in range(4)]
    drawn = [[stages.index(example.prompt) for example in dataset.examples] for _ in [dataset.enter_stage(0, epoch=0)]]
    assert {0, 1, 2} == set(drawn[0])  # stages 2 and 3 have the same latents
    lengths = {len(example.completion) for example in dataset.examples if example.prompt == stages[2]}
    assert lengths == {len(STEP_3) + 3, 3}  # stage 3 writes none of the steps
    first = list(dataset.lengths)
    dataset.enter_stage(0, epoch=1)
    assert dataset.lengths != first
    dataset.enter_stage(0, epoch=0)
    assert dataset.lengths == first
    dev = GSM8KDataset([LONG] * 9, encoder=make_encoder("coconut", 4), curriculum=curriculum)
    assert {tuple(example.prompt) for example in dev.examples} == {tuple(stages[0])}


def test_the_steps_of_a_plain_prompt_are_the_lines_of_its_solution():
    encoder = make_encoder("coconut", 4, prompt_format="plain", steps_from="lines", think=True)
    texts = ["".join(encoder.completion_parts(LONG["answer"], skip)) for skip in (0, 1, 2, 3, 9)]
    assert texts[0] == " so 2\nand 4\nthen 8\n#### 8"
    assert texts[1:3] == [" and 4\nthen 8\n#### 8", " then 8\n#### 8"]
    assert texts[3] == texts[4] == " #### 8"


def test_a_curriculum_beyond_the_data_and_rows_without_annotations_are_told(caplog):
    with pytest.raises(UserMistake, match="max_latent_stage=4: the longest solution of the training rows has 3 steps"):
        Curriculum(mode="coconut", max_latent_stage=4).check_steps(3)
    Curriculum(mode="icot", max_latent_stage=4).check_steps(3)
    bare = {"question": "Q", "answer": "4 apples.\n#### 4"}
    with pytest.raises(UserMistake, match="none of 1 rows has a calculator annotation .*: set steps_from='lines'"):
        GSM8KDataset([bare], encoder=make_encoder("coconut", 4))
    assert len(GSM8KDataset([bare, LONG], encoder=make_encoder("coconut", 4))) == 1
    assert "dropped 1 of 2 rows without calculator annotations" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "coconot"}, "mode='coconot': choose one of cot, no_cot, coconut, pause, no_thoughts, icot"),
        ({"mode": "coconut", "c_thought": 0}, "c_thought=0: must be at least 1"),
        ({"mode": "coconut", "uniform_prob": 2.0}, "uniform_prob=2.0: must be at most 1"),
        ({"mode": "coconut", "first_stage": -1}, "first_stage=-1: must be at least 0"),
        ({"mode": "pause"}, "mode='pause' with reasoner='trm': set reasoner='pause'"),
        ({"mode": "coconut", "use_trm": False}, "mode='coconut' needs latents: leave use_trm=False out"),
        ({"mode": "cot", "target": "answer"}, "mode='cot': it decides what is written; leave target out"),
        ({"optimizer": "adamw_8bit"}, "optimizer='adamw_8bit' needs bitsandbytes"),
        ({"dev_path": "a.json"}, "dev_path='a.json': give dataset_path too"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(changes, message):
    with pytest.raises(UserMistake, match=message):
        TrainSettings(**changes)


STAGED = {
    "mode": "coconut",
    "c_thought": 1,
    "epochs_per_stage": 1,
    "max_latent_stage": 2,
    "num_epochs": 4,
    "uniform_prob": 0.3,
    "reset_optimizer": True,
    "prompt_format": "coconut",
    "steps_from": "annotations",
    "save_every_n_steps": 1,
    "trm_kwargs": {},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def staged(base, tmp_path_factory):
    """A run of Coconut through all its stages, 3 optimizer steps each."""
    folder = tmp_path_factory.mktemp("staged")
    return folder, *train_tiny(base, folder, reasoner="coconut", base_training="full", **STAGED)


def without_clock(folder: Path) -> dict:
    checkpoint = newest_checkpoint(folder)
    del checkpoint["callbacks"]["Speedometer"]
    return checkpoint


@pytest.mark.parametrize(("batch", "stage"), [(13, 2), (11, 1)])  # of 5 an epoch: in stage 2, and where it begins
def test_a_run_killed_in_stage_2_ends_as_an_unbroken_one(base, staged, tmp_path, monkeypatch, batch, stage):
    folder, trainer, module = staged
    step, left = SmolLMTRMLightningModule.training_step, [batch]

    def break_off(self, batch, batch_idx):
        left[0] -= 1
        if left[0] == 0:
            raise KeyError("power cut")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SmolLMTRMLightningModule, "training_step", break_off)
    given = {"reasoner": "coconut", "base_training": "full", **STAGED}
    with pytest.raises(KeyError, match="power cut"):
        train_tiny(base, tmp_path, **given)
    assert without_clock(tmp_path)["callbacks"]["Stages"]["stage"] == stage
    monkeypatch.undo()
    train_tiny(base, tmp_path, **given)
    assert first_difference(without_clock(tmp_path), without_clock(folder)) is None
    if stage == 1:
        return
    with pytest.raises(UserMistake, match="holds a run with epochs_per_stage=1, now it is 2"):
        train_tiny(base, tmp_path, **given | {"epochs_per_stage": 2})
    foreign = str(max((tmp_path / "checkpoints").glob("*.ckpt")))
    with pytest.raises(UserMistake, match="the checkpoint belongs to a curriculum with c_thought=1, now it is 2"):
        train_tiny(base, tmp_path / "other", **given | {"c_thought": 2, "resume": foreign})


def test_the_stage_is_logged_and_stays_with_the_model_and_its_best_checkpoint_is_of_the_last_one(staged):
    folder, trainer, module = staged
    rows = (folder / "logs" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("stage")
    assert sorted({float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]}) == [0.0, 1.0, 2.0, 3.0]
    assert trainer.checkpoint_callback.best_step > 9, "losses of other stages cannot be compared"
    model = SmolLMv3WithTRM.from_pretrained(folder)
    assert (model.config.num_slots, model.config.target, model.num_latents) == (2, "answer", 2)
    assert model.encoder.prompt_text("Why?").endswith("Why?\n<|start-latent|><|latent|><|latent|><|end-latent|>")
    assert model.encoder.completion_text(ROWS[0]["answer"]).startswith("### ")
    questions = [row["question"] for row in ROWS[:3]]
    assert model.generate_with_thinking(questions) == module.model.generate_with_thinking(questions)
    result = evaluate_gsm8k(model, ROWS[:6], latents="shuffled", progress=False)
    assert result["total"] == 6 and result["cot_match"] is None


def test_a_finished_staged_run_is_read_in_its_last_stage(base, staged):
    folder = staged[0]
    _, module = train_tiny(base, folder, reasoner="coconut", base_training="full", **STAGED)
    assert module.model.encoder.num_latents == 2 and module.model.encoder.target == "answer"
    with pytest.raises(UserMistake, match="max_latent_stage=9: the longest solution of the training rows has"):
        train_tiny(base, folder / "beyond", reasoner="coconut", **STAGED | {"max_latent_stage": 9})


@pytest.mark.parametrize("reasoner", ["trm", "pause"])
def test_other_reasoners_go_through_the_same_stages(base, tmp_path, reasoner):
    changes = {"prompt_format": "plain", "steps_from": "lines", "max_steps": 5, "val_check_interval": 100.0}
    settings = {"trm_kwargs": SMALL_TRM} if reasoner == "trm" else {"mode": "pause"}
    _, module = train_tiny(base, tmp_path, reasoner=reasoner, **{**STAGED, **changes, **settings})
    model = module.model
    assert (model.config.num_slots, model.config.skip_steps, model.config.target) == (1, 1, "steps")
    gold = model.encoder.written_steps(ROWS[0]["answer"])
    assert len(gold) == len(model.encoder.steps(ROWS[0]["answer"])) - 1
    assert evaluate_gsm8k(model, ROWS[:4], progress=False, max_new_tokens=4)["cot_match"] == 0.0


def test_an_earlier_run_starts_the_next_one(base, staged, tmp_path):
    given = {"prompt_format": "coconut", "steps_from": "annotations", "max_steps": 1, "learning_rate": 1e-8}
    _, first = train_tiny(base, tmp_path / "cot", mode="cot", base_training="full", **given)
    given |= {"load_model_path": str(tmp_path / "cot"), "base_training": "full"}
    names = ("mode", "c_thought", "epochs_per_stage", "max_latent_stage", "trm_kwargs")
    given |= {name: STAGED[name] for name in names}
    _, second = train_tiny("no/such-base", tmp_path / "next", reasoner="coconut", first_stage=1, **given)
    old, new = (one.model.get_input_embeddings().weight for one in (first, second))
    assert torch.allclose(old, new[: len(old)], atol=1e-6) and len(new) == len(old) + 3
    opens = first.model.tokenizer("<<", add_special_tokens=False)["input_ids"][0]
    assert torch.allclose(new[-3:], new[opens].expand(3, -1), atol=1e-6), "new markers begin as <<"
    assert second.model.config.num_slots == 1
    lora = {**TINY_RUN, "max_steps": 1}
    _, third = train_tiny("x/y", tmp_path / "lora", **lora | {"load_model_path": str(staged[0])})
    assert third.model.config.reasoner == "trm" and third.model.config.base_training == "lora"
    _, fourth = train_tiny("x/y", tmp_path / "again", **lora | {"load_model_path": str(tmp_path / "lora")})
    for name, weight in third.model.named_parameters():
        assert torch.allclose(weight, fourth.model.get_parameter(name), atol=5e-2), name
    with pytest.raises(UserMistake, match="its reasoner has other settings or another number of latents"):
        train_tiny("x/y", tmp_path / "other", **lora | {"load_model_path": str(tmp_path / "lora"), "num_latents": 5})


def test_published_yaml_keys_are_read_as_ours():
    reference = {
        "project": "coconut", "save_path": "runs", "name": "gsm", "only_eval": False, "coconut": True, "cot": False,
        "no_thoughts": False, "no_cot": False, "c_thought": 2, "epochs_per_stage": 3, "max_latent_stage": 3,
        "pad_latent_to_max": True, "save_only_improve": False, "uniform_prob": 0.0, "model_id": "openai-community/gpt2",
        "load_model_path": "runs/cot", "seed": 0, "resume": 3, "bf16": False, "train_path": "a.json",
        "val_path": "b.json", "reset_optimizer": True, "batch_size_training": 32, "debug": False,
        "gradient_accumulation_steps": 4, "num_epochs": 25, "lr": 1e-4, "weight_decay": 0.01,
    }  # fmt: skip
    found = TrainSettings(**own_settings(reference))
    expected = {
        "wandb_project": "coconut", "output_dir": "runs/gsm", "wandb_name": "gsm", "mode": "coconut",
        "reasoner": "coconut", "model_name": "openai-community/gpt2", "load_model_path": "runs/cot", "first_stage": 1,
        "num_epochs": 22, "resume": "auto", "precision": "32-true", "dataset_path": "a.json", "dev_path": "b.json",
        "steps_from": "lines", "keep_annotations": True, "batch_size": 32, "accumulate_grad_batches": 4,
        "learning_rate": 1e-4, "prompt_format": "coconut", "base_training": "full", "reset_optimizer": True,
    }  # fmt: skip
    assert {name: getattr(found, name) for name in expected} == expected
    assert own_settings({"cot": True})["mode"] == "cot"
    pause = own_settings({"coconut": False, "cot": False, "no_cot": False, "no_thoughts": False})
    assert (pause["mode"], pause["reasoner"]) == ("pause", "pause")
    assert own_settings({"load_model_path": "None", "lr": 1e-3})["load_model_path"] is None
    own = {"mode": "cot", "learning_rate": 1e-3}
    assert own_settings(own) == own
    for wrong, message in (
        ({"only_eval": True}, "only_eval: .* `smollm-trm evaluate FOLDER`"),
        ({"debug": True}, "debug: .* set max_samples and max_dev_samples"),
        ({"cot": True, "coconut": True}, "coconut and cot are both true"),
        ({"lr": 1e-3, "learning_rate": 1e-3}, "lr and learning_rate are one setting"),
        ({"resume": 3, "lr": 1e-3}, "resume: 3 .* load_model_path"),
        ({"resume": 4, "lr": 1e-3, "load_model_path": "a", "num_epochs": 9}, "resume: 4 must be a multiple"),
    ):
        with pytest.raises(UserMistake, match=message):
            own_settings(wrong)


CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(scope="module")
def word_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    for part, rows in (("train", ROWS[:40]), ("test", ROWS[40:44])):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("config", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_every_yaml_trains_as_it_stands(config, word_folder, tmp_path, capsys):
    small = ["--model_name", "tiny", "--max_steps", "2", "--batch_size", "2", "--accumulate_grad_batches", "1"]
    places = ["--data_dir", str(word_folder), "--output_dir", str(tmp_path), "--progress", "false"]
    main(["train", "--config", str(CONFIGS / f"{config}.yaml"), *small, *places])
    assert "the model is in" in capsys.readouterr().out
    noted = json.loads((tmp_path / "settings.json").read_text())
    assert noted["mode"] == {"gsm_cot_qwen": "cot", "gsm_trm": "coconut"}.get(config, config.removeprefix("gsm_"))


def test_the_published_data_and_yaml_train_as_they_are(tmp_path, capsys):
    rows = [
        {"question": f"What is {n} and {n}, doubled?", "answer": f"{4 * n}",
         "steps": [f"<<{n}+{n}={2 * n}>>", f"<<{2 * n}*2={4 * n}>>"]}
        for n in range(1, 13)
    ]  # fmt: skip
    for name, part in (("train", rows[:9]), ("valid", rows[9:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    (tmp_path / "run.yaml").write_text(
        f"save_path: {tmp_path}\nname: gsm-coconut\nonly_eval: False\ncoconut: True\ncot: False\nno_thoughts: False\n"
        "no_cot: False\nc_thought: 2\nepochs_per_stage: 1\nmax_latent_stage: 1\npad_latent_to_max: True\n"
        'save_only_improve: False\nuniform_prob: 0.0\nmodel_id: tiny\nload_model_path: "None"\nseed: 0\nresume: 0\n'
        f"bf16: False\ntrain_path: {tmp_path / 'train.json'}\nval_path: {tmp_path / 'valid.json'}\ndebug: False\n"
        "reset_optimizer: True\nbatch_size_training: 5\ngradient_accumulation_steps: 1\nnum_epochs: 2\n"
        'lr: !!float "1e-4"\nweight_decay: 0.01\nprogress: false\n'
    )
    main(["train", "--config", str(tmp_path / "run.yaml")])
    assert "the model is in" in capsys.readouterr().out
    result = json.loads((tmp_path / "gsm-coconut" / "results.json").read_text())
    assert (result["train_rows"], result["dev_rows"], result["optimizer_steps"]) == (9, 3, 4)
    model = SmolLMv3WithTRM.from_pretrained(tmp_path / "gsm-coconut")
    row = {"question": "Q?", "answer": "<<1+1=2>>\n<<2*2=4>>\n#### 4"}
    slots = model.tokenizer.decode(model.encoder.encode(row).prompt).count("<|latent|>")
    assert (slots, model.encoder.completion_text(row["answer"])) == (2, "<<2*2=4>>\n### 4")


def test_a_wrong_yaml_is_one_line(tmp_path, capsys):
    for text, message in (
        ("cot: [", "line 1: not a YAML file that can be read"),
        ("- cot\n", "expected settings, one `name: value` a line, found list"),
        ("cot: true\nepochs_per_stages: 3\n", "epochs_per_stages"),
        ("cot: true\nlr: fast\n", "learning_rate"),
    ):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(SystemExit, match="2"):
            main(["train", "--config", str(tmp_path / "a.yaml")])
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1, told


def test_a_queue_goes_on_after_a_run_that_fails(tmp_path, capsys, monkeypatch):
    began = []

    class Done:
        def __init__(self, command, check):
            began.append(command[3:])
            self.returncode = 2 if "bad.yaml" in command else 0

    monkeypatch.setattr("smollm_trm.commands.subprocess.run", Done)
    with pytest.raises(SystemExit, match="2"):
        main(["queue", "bad.yaml", "good.yaml", "--max_steps", "3"])
    told = capsys.readouterr()
    assert began == [["train", "--config", name, "--max_steps", "3"] for name in ("bad.yaml", "good.yaml")]
    assert "bad.yaml: failed (exit code 2)" in told.out and "good.yaml: trained" in told.out
    assert told.err == "smollm-trm: 1 of 2 runs failed; the others are done, the same command repeats it\n"
    main(["queue", "good.yaml"])
    with pytest.raises(SystemExit, match="2"):
        main(["queue"])


def test_step_only_data_is_written_from_annotations_and_from_the_published_text(tmp_path, capsys):
    rows = [LONG, {"question": "Bare?", "answer": "just 4\n#### 4"}]
    for part in ("train", "test"):
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["prepare", "icot", "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")])
    told = capsys.readouterr().out
    assert "train: 1 rows, 1 without annotations left out\ntest: 2 rows, 1 without annotations kept" in told
    steps = {"question": "Q", "answer": "<<1+1=2>>\n<<2+2=4>>\n<<4+4=8>>\n#### 8"}
    written = [json.loads(line) for line in (tmp_path / "out" / "test.jsonl").read_text().splitlines()]
    assert written == [steps, {"question": "Bare?", "answer": "#### 4"}]
    text = tmp_path / "text"
    text.mkdir()
    (text / "train.txt").write_text("Q||<<1+1=2>> <<2+2=4>> <<4+4=8>> #### 8\n")
    main(["prepare", "icot", "--data_dir", str(text), "--output_dir", str(tmp_path / "from_text")])
    assert json.loads((tmp_path / "from_text" / "train.jsonl").read_text()) == steps
    (text / "train.txt").write_text("Q||<<1+1=2>> #### 2\nno bars\n")
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", "icot", "--data_dir", str(text)])
    assert "iCoT text, `question||step step #### answer`; line 2 is not" in capsys.readouterr().err


def test_cot_match_compares_the_steps_that_were_written():
    steps = ["<<1+1=2>>", "<<2+2=4>>"]
    assert writes_steps("<<1+1=2>>\n<<2+2=4>>\n### 4", steps) and writes_steps(" <<1+1=2>>\n<<2+2=4>> ", steps)
    assert not writes_steps("<<1+1=2>>\n### 4", steps) and not writes_steps("<<2+2=4>>\n<<1+1=2>>\n### 4", steps)
