"""Whole runs of a tiny model: training, resuming, evaluating, talking."""

import csv
import io
import json
import os
import re
import signal
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from processes import ended, started
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from smollm_trm import cli
from smollm_trm.arithmetic import training
from smollm_trm.arithmetic.commands import (
    evaluate_arithmetic,
    generate_arithmetic,
    interactive_arithmetic,
    train_arithmetic,
)
from smollm_trm.arithmetic.data_set import read_sum_file
from smollm_trm.arithmetic.evaluation import complete_sums
from smollm_trm.arithmetic.interactive import converse
from smollm_trm.arithmetic.model import build_arithmetic_model, load_arithmetic_model
from smollm_trm.arithmetic.module import (
    EncodedSums,
    SumModule,
    build_sum_optimizer,
    repeat_one_column_sums,
    warm_up_then_cosine,
    weighted_next_token_loss,
)
from smollm_trm.arithmetic.rules import write_sum
from smollm_trm.arithmetic.settings import SumSettings, SumTrainingSettings
from smollm_trm.training.checkpoints import newest_good_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

SHORT_RUN = {
    "model_size": "tiny", "optimizer": "muon", "batch_size": 16, "learning_rate": 2e-3, "warmup_steps": 3,
    "max_steps": 10,
    "num_workers": 0, "save_steps": 4, "eval_steps": 5, "logging_steps": 2, "no_wandb": True,
}  # fmt: skip
LEARNED = [write_sum([first, second]) for first in (12, 37, 58, 90) for second in (5, 46, 81, 99)]


def train(**options) -> str:
    return train_arithmetic(SumTrainingSettings(**options))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """64 examples: 10 steps of 16 are two epochs and half of the next."""
    folder = tmp_path_factory.mktemp("data")
    generate_arithmetic(SumSettings(num_examples=80, output_dir=str(folder)))
    return str(folder)


@pytest.fixture(scope="module")
def short_run(data_dir, tmp_path_factory):
    """An unbroken run of ten steps."""
    folder = tmp_path_factory.mktemp("short")
    train(**SHORT_RUN, data_dir=data_dir, output_dir=str(folder))
    return folder


@pytest.fixture(scope="module")
def knowing_run(tmp_path_factory):
    """A model that knows the sums of LEARNED by heart."""
    folder = tmp_path_factory.mktemp("knowing")
    for part, lines in (("train", LEARNED), ("val", ["1+1=2<end>"]), ("test", ["2+2=4<end>"])):
        (folder / f"{part}.json").write_text(json.dumps(lines))
    settings = {
        **SHORT_RUN,
        "max_steps": 80,
        "learning_rate": 3e-3,
        "save_steps": 1000,
        "eval_steps": 1000,
        "problem_weight": 0.1,
    }
    train(**settings, data_dir=str(folder), output_dir=str(folder / "run"))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(first: Path, second: Path) -> bool:
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def measured(folder: Path, name: str) -> dict[int, float]:
    """A column of the run's figures by optimizer steps done."""
    with open(folder / "logs" / "metrics.csv", newline="") as file:
        return {int(row["step"]) + 1: float(row[name]) for row in csv.DictReader(file) if row[name]}


def test_a_run_writes_what_the_document_lists(short_run):
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (short_run / name).is_file(), name
    description = json.loads((short_run / "training_config.json").read_text())
    assert (description["batch_size"], description["num_parameters"]) == (16, 395_904)
    assert len(description["test_fingerprint"]) == 64 and description["versions"]["torch"]
    results = json.loads((short_run / "test_results.json").read_text())
    assert results["num_examples"] == 8
    assert 0 <= results["token_accuracy"] <= 1
    log = (short_run / "logs" / "training.log").read_text()
    assert re.search(r"^\d{4}-\d\d-\d\d .* DEBUG step 10 .*val_loss", log, re.MULTILINE)
    assert "INFO test: exact match" in log
    assert list(measured(short_run, "train_loss")) == [2, 4, 6, 8, 10]
    for name in ("val_loss", "val_token_accuracy", "val_exact_match", "seconds"):
        assert list(measured(short_run, name)) == [5, 10]


def test_every_exported_checkpoint_is_a_model(short_run):
    assert sorted(path.name for path in short_run.glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-4",
        "checkpoint-8",
    ]
    for step in (4, 8, 10):
        model = AutoModelForCausalLM.from_pretrained(short_run / f"checkpoint-{step}")
        tokenizer = AutoTokenizer.from_pretrained(short_run / f"checkpoint-{step}")
        batch = tokenizer("3+5=", return_tensors="pt", return_token_type_ids=False)
        assert model.generate(**batch, do_sample=False, max_new_tokens=3).shape == (1, 7)
    assert same_weights(short_run, short_run / "checkpoint-10")
    assert not same_weights(short_run, short_run / "checkpoint-8")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(site: str, data_dir: str, output_dir: str) -> None:
    """What runs in a process of its own."""
    step, save, write = SumModule.training_step, training.save_arithmetic_model, torch.save

    def dying_step(self, batch, batch_idx):
        if self.global_step == 7:
            die()
        return step(self, batch, batch_idx)

    def dying_export(model, folder):
        save(model, folder)
        if "checkpoint-8." in folder.name:
            die()

    def dying_write(checkpoint, path):
        write(checkpoint, path)
        if checkpoint["global_step"] > 5:
            Path(path).write_bytes(Path(path).read_bytes()[:5000])
            die()

    if site == "training":
        SumModule.training_step = dying_step
    elif site == "export":
        training.save_arithmetic_model = dying_export
    else:
        torch.save = dying_write
    train(**SHORT_RUN, data_dir=data_dir, output_dir=output_dir)


SITES = ("training", "export", "checkpoint")


@pytest.fixture(scope="module")
def killed(data_dir, tmp_path_factory) -> Path:
    """A run for every site, killed there."""
    folder = tmp_path_factory.mktemp("killed")
    runs = [((site, data_dir, str(folder / site)), -signal.SIGKILL) for site in SITES]
    assert ended(started("processes", "forked", "test_arithmetic_runs", "train_and_die", runs)) == 0
    return folder


@pytest.mark.parametrize("site", SITES)
def test_a_killed_and_resumed_run_ends_with_the_weights_of_an_unbroken_one(site, data_dir, short_run, killed):
    """Killed between checkpoints, while a model is exported, and while a checkpoint is written, in a later epoch."""
    tmp_path = killed / site
    assert not (tmp_path / "model.safetensors").exists()
    found = newest_good_checkpoint(tmp_path / "checkpoints")
    assert found.name == "step-5.ckpt"
    workers = 2 if site == "export" else 0
    train(**{**SHORT_RUN, "num_workers": workers}, data_dir=data_dir, output_dir=str(tmp_path))
    assert f"going on from {found}" in (tmp_path / "logs" / "training.log").read_text()
    for exported in ("", "checkpoint-8", "checkpoint-10"):
        assert same_weights(tmp_path / exported, short_run / exported)
    assert measured(tmp_path, "train_loss") == measured(short_run, "train_loss")
    assert measured(tmp_path, "val_loss") == measured(short_run, "val_loss")
    assert not [path for path in tmp_path.rglob(".*") if path.name.endswith(".part")]


def cut(content: bytes) -> bytes:
    return content[:5000]


def with_a_flipped_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


@pytest.mark.parametrize("damage", [cut, with_a_flipped_bit])
def test_a_damaged_checkpoint_is_skipped_and_the_one_before_used(damage, data_dir, short_run, tmp_path):
    train(**SHORT_RUN, data_dir=data_dir, output_dir=str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "test_results.json").unlink()
    newest = newest_good_checkpoint(tmp_path / "checkpoints")
    assert newest.name == "step-10.ckpt"
    newest.write_bytes(damage(newest.read_bytes()))
    train(**SHORT_RUN, data_dir=data_dir, output_dir=str(tmp_path))
    log = (tmp_path / "logs" / "training.log").read_text()
    assert f"skipped the damaged checkpoint {newest}" in log
    assert f"going on from {newest.with_name('step-9.ckpt')}" in log
    assert same_weights(tmp_path, short_run)
    assert newest_good_checkpoint(tmp_path / "checkpoints") == newest


def test_a_run_stopped_before_its_test_is_only_tested(data_dir, short_run, tmp_path):
    train(**SHORT_RUN, data_dir=data_dir, output_dir=str(tmp_path))
    (tmp_path / "test_results.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    train(**SHORT_RUN, data_dir=data_dir, output_dir=str(tmp_path))
    assert same_weights(tmp_path, short_run)
    assert (tmp_path / "test_results.json").is_file()


def test_a_finished_run_is_not_trained_again(data_dir, short_run):
    before = (short_run / "model.safetensors").stat().st_mtime_ns
    text = train(**SHORT_RUN, data_dir=data_dir, output_dir=str(short_run))
    assert "Exact Match Accuracy" in text
    assert (short_run / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_with_another_run_is_refused_by_option_and_values(data_dir, short_run, tmp_path):
    with pytest.raises(ValueError, match=r"holds a run with learning_rate=0.002, now it is 0.5: .*resume='never'"):
        train(**{**SHORT_RUN, "learning_rate": 0.5}, data_dir=data_dir, output_dir=str(short_run))
    generate_arithmetic(SumSettings(num_examples=90, output_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="holds a run with train_fingerprint="):
        train(**SHORT_RUN, data_dir=str(tmp_path), output_dir=str(short_run))


def test_a_run_can_be_begun_anew_and_nothing_of_the_earlier_one_stays(data_dir, tmp_path):
    train(**{**SHORT_RUN, "max_steps": 4}, data_dir=data_dir, output_dir=str(tmp_path))
    anew = {**SHORT_RUN, "max_steps": 3, "seed": 7, "resume": "never"}
    train(**anew, data_dir=data_dir, output_dir=str(tmp_path))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert same_weights(tmp_path, tmp_path / "checkpoint-3")


def test_a_folder_with_a_model_of_other_making_is_left_alone(data_dir, short_run, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((short_run / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="holds a model without training_config.json: name another"):
        train(**SHORT_RUN, data_dir=data_dir, output_dir=str(tmp_path))
    assert same_weights(tmp_path, short_run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_size": "giant"}, "model_size='giant': choose one of tiny, small, medium, large"),
        ({"optimizer": "sgd"}, "optimizer='sgd': choose one of adamw, muon"),
        ({"batch_size": 0}, "batch_size=0: must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0: must be above 0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0: must be at least 0"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"eval_examples": 0}, "eval_examples=0: must be at least 1, or -1 to take all"),
        ({"max_length": 20}, "tokens, max_length is 20: raise --max-length"),
        ({"preset": "slow"}, "preset='slow': choose one of fast"),
        ({"seed": 2**44}, "seed=17592186044416: must be at most"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(settings, message, data_dir, tmp_path):
    folder = tmp_path / "never"
    with pytest.raises(ValueError, match=message):
        train(**{**SHORT_RUN, **settings}, data_dir=data_dir, output_dir=str(folder))
    assert not (folder / "training_config.json").exists()


def test_fp16_without_a_gpu_and_a_file_as_folder_are_refused(data_dir, tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="fp16 needs a GPU"):
            train(**SHORT_RUN, fp16=True, data_dir=data_dir, output_dir=str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not write .*choose another output folder"):
        train(**SHORT_RUN, data_dir=data_dir, output_dir=str(tmp_path / "file"))


def test_a_learning_rate_that_breaks_the_weights_ends_the_run_with_advice(data_dir, tmp_path):
    with pytest.raises(FloatingPointError, match=r"gradients of 25 steps .* not finite: lower --learning-rate"):
        train(**{**SHORT_RUN, "learning_rate": 1e30, "max_steps": 40}, data_dir=data_dir, output_dir=str(tmp_path))


def test_validation_can_be_kept_to_a_few_examples(data_dir, short_run, tmp_path):
    train(**{**SHORT_RUN, "eval_examples": 1}, data_dir=data_dir, output_dir=str(tmp_path))
    assert measured(tmp_path, "val_loss")[10] != measured(short_run, "val_loss")[10]
    assert same_weights(tmp_path, short_run)


def test_a_preset_fills_in_what_was_not_given():
    fast = SumTrainingSettings(preset="fast", batch_size=7)
    assert (fast.model_size, fast.batch_size, fast.learning_rate) == ("tiny", 7, 3e-3)


def test_what_was_given_by_hand_wins_over_a_preset_though_it_is_the_default(monkeypatch):
    trained = []
    commands = "smollm_trm.arithmetic.commands."
    monkeypatch.setattr(commands + "train_sums", trained.append)
    monkeypatch.setattr(commands + "format_evaluation", lambda report: "")
    cli.main(["arithmetic", "train", "--preset", "fast", "--model-size", "small", "--max-steps", "-1", "--fp16"])
    cli.main(["arithmetic", "train", "--seed", "7"])
    assert (trained[0].model_size, trained[0].max_steps, trained[0].batch_size) == ("small", -1, 64)
    assert trained[0].fp16 and trained[1] == SumTrainingSettings(seed=7)


def test_the_defaults_are_those_of_the_document():
    s = SumTrainingSettings()
    assert (s.model_size, s.max_length, s.batch_size, s.eval_batch_size) == ("small", 128, 32, 64)
    assert (s.learning_rate, s.weight_decay, s.num_epochs, s.warmup_steps) == (1e-4, 0.01, 10, 500)
    assert (s.data_dir, s.output_dir, s.num_workers) == ("data", "checkpoints", 4)
    assert (s.save_steps, s.eval_steps, s.logging_steps, s.seed) == (1000, 1000, 100, 42)
    assert s.count_steps(80_000) == 25_000


def test_padding_and_problem_digits_weigh_what_they_should():
    batch = EncodedSums(["3+5=8<end>", "12+34=46<end>"], max_length=128, problem_weight=0.25)[[0, 1]]
    assert batch["token_weights"].tolist() == [[0.25] * 4 + [1, 1, 0, 0, 0], [0.25] * 6 + [1, 1, 1]]
    assert batch["is_completion"].tolist() == [
        [False] * 4 + [True] * 2 + [False] * 3,
        [False] * 6 + [True] * 3,
    ]
    logits = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    loss = weighted_next_token_loss(logits, batch["input_ids"], batch["token_weights"])
    by_hand, total = 0.0, 0.0
    for row in range(2):
        for column in range(1, 9):
            weight = float(batch["token_weights"][row, column])
            log_probability = logits[row, column - 1].log_softmax(-1)[batch["input_ids"][row, column]]
            by_hand, total = by_hand - weight * float(log_probability), total + weight
    assert float(loss) == pytest.approx(by_hand / total, rel=1e-5)


def with_muon(learning_rate: float, *, weight_decay: float) -> SumTrainingSettings:
    return SumTrainingSettings(optimizer="muon", learning_rate=learning_rate, weight_decay=weight_decay)


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    model = build_arithmetic_model("tiny")
    names = {id(weight): name for name, weight in model.named_parameters()}
    optimizer = build_sum_optimizer(model, with_muon(0.1, weight_decay=0.0))
    muon, adamw = ({names[id(weight)] for weight in group["params"]} for group in optimizer.param_groups)
    assert len(muon) == 12 and all("_proj" in name for name in muon)
    assert adamw == set(names.values()) - muon
    assert "model.embed_tokens.weight" in adamw


def test_a_saved_optimizer_goes_on_as_if_never_saved():
    def step(model, optimizer):
        optimizer.zero_grad()
        model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
        optimizer.step()

    first, second = build_arithmetic_model("tiny"), build_arithmetic_model("tiny")
    kept = build_sum_optimizer(first, with_muon(0.01, weight_decay=0.1))
    for _ in range(3):
        step(first, kept)
    second.load_state_dict(first.state_dict())
    loaded = build_sum_optimizer(second, with_muon(0.5, weight_decay=0.1))
    loaded.load_state_dict(deepcopy(kept.state_dict()))
    for _ in range(2):
        step(first, kept)
        step(second, loaded)
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), second.parameters(), strict=True))


def test_a_schedule_reaches_both_parts():
    model = build_arithmetic_model("tiny")
    optimizer = build_sum_optimizer(model, with_muon(1.0, weight_decay=0.0))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = [weight.clone() for weight in model.parameters()]
    model(input_ids=torch.arange(12)[None], labels=torch.arange(12)[None]).loss.backward()
    optimizer.step()
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))


def test_sums_of_one_column_are_repeated_only_beside_chains():
    for chain, expected in ((True, 1 + 3 + 1), (False, 3)):
        lines = [write_sum(operands, chain=chain) for operands in ([12, 34], [3, 5], [90, 1])]
        repeated = repeat_one_column_sums(lines, 3)
        assert len(repeated) == expected
        assert repeated.count("3+5=8<end>") == (3 if chain else 1)


def test_the_learning_rate_rises_in_a_line_and_falls_to_zero():
    factors = [warm_up_then_cosine(step, warmup_steps=4, num_steps=12) for step in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5)
    assert factors[12] == pytest.approx(0.0)
    assert warm_up_then_cosine(0, warmup_steps=0, num_steps=1) == 1.0


def test_a_model_that_knows_its_sums_is_found_to_know_them(knowing_run, tmp_path):
    text = evaluate_arithmetic(
        checkpoint=str(knowing_run / "run" / "model.safetensors"),
        data_path=str(knowing_run / "train.json"),
        output_file=str(tmp_path / "results.json"),
        device="cpu",
    )
    assert "Exact Match Accuracy: 100.00%" in text
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["num_examples"] == 16
    assert report["exact_match"] == report["chain_accuracy"] == report["token_accuracy"] == 1.0
    assert report["mistakes"] == report["wrong"] == []
    assert report["by_digits"]["2"]["num_examples"] == 16
    assert sum(row["num_examples"] for row in report["by_carries"].values()) == 16
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_does_not_know_is_found_out(knowing_run, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps([write_sum([21, 64]), write_sum([73, 19])]))
    text = evaluate_arithmetic(
        checkpoint=str(knowing_run / "run"),
        data_path=str(tmp_path / "other.json"),
        device="cpu",
        model_size="tiny",
    )
    assert "Exact Match Accuracy: 0.00%" in text
    assert "first mistake" in text


def test_a_completion_does_not_depend_on_the_batch_it_is_in(knowing_run):
    model = load_arithmetic_model(knowing_run / "run")
    problems = [line[: line.index("=") + 1] for line in [*LEARNED, *read_sum_file(knowing_run / "test.json").examples]]
    together = complete_sums(model, problems, batch_size=64, max_new_tokens=25)
    alone = complete_sums(model, problems, batch_size=1, max_new_tokens=25)
    assert together == alone
    assert together[:16] == LEARNED


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data_path": "none.json"}, FileNotFoundError, "there is no none.json"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
        ({"model_size": "small"}, ValueError, "holds a model of size tiny, not small"),
        ({"device": "quantum"}, ValueError, "device='quantum'"),
        ({"max_length": 5}, ValueError, "tokens, max_length is 5"),
    ],
)
def test_an_impossible_evaluation_is_refused(options, error, message, knowing_run):
    with pytest.raises(error, match=message):
        evaluate_arithmetic(**{"checkpoint": str(knowing_run / "run"), "data_dir": str(knowing_run), **options})


def test_an_output_file_that_cannot_be_written_is_refused_before_anything_is_computed(knowing_run, monkeypatch):
    monkeypatch.setattr("smollm_trm.arithmetic.commands.evaluate_sums", lambda *_, **__: pytest.fail("computed"))
    given = {"checkpoint": str(knowing_run / "run"), "data_dir": str(knowing_run)}
    inside_a_file = str(knowing_run / "train.json" / "results.json")
    with pytest.raises(OSError, match="could not write .*choose another output folder"):
        evaluate_arithmetic(**given, output_file=inside_a_file)
    for no_json in (".", str(knowing_run), str(knowing_run / "results.png")):
        with pytest.raises(ValueError, match="output_file='.*': name a JSON file"):
            evaluate_arithmetic(**given, output_file=no_json)


def test_a_conversation_over_a_pipe_answers_explains_and_ends(knowing_run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("12+46=\n3*5=\n\n58+99=\nquit\n12+5=\n"))
    converse(load_arithmetic_model(knowing_run / "run"), temperature=0.0)
    shown = capsys.readouterr().out
    assert "💭 Generating completion for: 12+46=" in shown
    assert "    2+6=8\n    1+4=5\n  58<end>\n✅ Answer: 12+46=58" in shown
    assert "⚠ only digits, + and = are known, not *" in shown
    assert "⚠ type a sum" in shown
    assert "✅ Answer: 58+99=157" in shown
    assert "12+5=" not in shown and "➤" not in shown
    assert shown.endswith("Goodbye!\n")
    assert "\033[" not in shown


def test_ctrl_c_ends_a_conversation_politely(knowing_run, monkeypatch, capsys):
    class Interrupted(io.StringIO):
        def readline(self, *_):
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Interrupted())
    converse(load_arithmetic_model(knowing_run / "run"))
    assert capsys.readouterr().out == "Goodbye!\n"


def test_a_person_at_a_terminal_is_asked_and_sees_colours(knowing_run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    typed = iter(["12+46="])

    def type_in(prompt: str) -> str:
        assert prompt == "➤ Enter expression: "
        if (text := next(typed, None)) is None:
            raise EOFError
        return text

    monkeypatch.setattr("builtins.input", type_in)
    converse(load_arithmetic_model(knowing_run / "run"), temperature=0.0)
    shown = capsys.readouterr().out
    assert shown.startswith("Type a sum such as 12+34=") and shown.endswith("Goodbye!\n")
    assert "\033[32m✅ Answer: 12+46=58" in shown


def test_the_interactive_command_reads_stdin_and_checks_its_options(knowing_run, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("37+81=\n"))
    interactive_arithmetic(checkpoint=str(knowing_run / "run"), temperature=0.0, device="cpu")
    assert "✅ Answer: 37+81=118" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("37+81=\n"))
    interactive_arithmetic(checkpoint=str(knowing_run / "run"), max_new_tokens=4, device="cpu")
    assert "cut before <end>" in capsys.readouterr().out
    for options, message in (
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            interactive_arithmetic(checkpoint=str(knowing_run / "run"), **options)
