"""The command line: one override per command, one clear line per mistake."""

import io
import json
import re
import subprocess
import sys
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import PreTrainedConfig
from twins import ROWS, make_base, make_tokenizer

from smollm_trm import cli, commands
from smollm_trm.data.gsm8k import load_gsm8k, split_fingerprint, split_gsm8k
from smollm_trm.data.prompts import PromptEncoder
from smollm_trm.data.rows import write_jsonl
from smollm_trm.evaluation.loading import load_for_evaluation, problems_of
from smollm_trm.evaluation.predictions import model_fingerprint
from smollm_trm.models.configuration import LatentReasoningConfig
from smollm_trm.records import UserMistake
from smollm_trm.training.settings import HELP_GROUPS, TrainSettings

TINY_RUN = {
    "model_name": "tiny",
    "num_latents": 4,
    "trm_kwargs": {"n_supervision_steps": 1, "n_latent_steps": 1},
    "batch_size": 8,
    "accumulate_grad_batches": 1,
    "max_steps": 2,
    "target": "answer",
    "progress": False,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gsm8k")
    write_jsonl(folder / "train.jsonl", ROWS[:50])
    write_jsonl(folder / "test.jsonl", ROWS[50:])
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    """A trained run, by the command itself, its settings from a YAML file."""
    folder = tmp_path_factory.mktemp("run")
    settings = folder / "settings.yaml"
    settings.write_text(yaml.safe_dump({**TINY_RUN, "data_dir": str(data), "output_dir": str(folder / "out")}))
    cli.main(["train", "--config", str(settings), "--lora_kwargs.r", "4"])
    return folder / "out"


def refusal(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, f"more than one line: {error}"
    return error


def test_training_leaves_its_figures_with_seed_split_versions_and_command(run):
    results = json.loads((run / "results.json").read_text())
    assert results["optimizer_steps"] == 2 and results["settings"]["lora_kwargs"] == {"r": 4}
    assert len(results["split"]["fingerprint"]) == 64 and results["split"]["seed"] == 42
    assert {"torch", "transformers", "smollm-trm"} <= set(results["versions"]) and results["command"]


def test_evaluate_ask_and_compare_use_the_trained_run(run, data, tmp_path, capsys):
    cli.main(["evaluate", str(run), "--part", "test", "--data_dir", str(data), "--max_new_tokens", "4"])
    report = json.loads((run / "evaluation" / "test-4-tokens.json").read_text())
    assert report["total"] == 10 and report["part"] == "test" and len(report["correct_by_problem"]) == 10
    assert len(report["split"]["fingerprint"]) == 64 and (report["device"], report["precision"]) == ("cpu", "float32")
    assert "test: " in capsys.readouterr().out
    cli.main(["ask", str(run), "What is 1 + 1?", "--max_new_tokens", "3"])
    out = tmp_path / "compared"
    arguments = ["--data_dir", str(data), "--max_samples", "5", "--output_dir", str(out), "--models.trained", str(run)]
    cli.main(["compare", *arguments, "--models.again", str(run)])
    assert "too few problems to tell" in capsys.readouterr().out
    assert {"comparison.png", "comparison.md", "comparison.json"} <= {path.name for path in out.iterdir()}
    compared = json.loads((out / "comparison.json").read_text())
    assert compared["split"] == report["split"] and len(compared["problems"]) == 64
    assert compared["device_and_precision"]["again"] == ["cpu", "float32"]


def test_dev_problems_are_never_training_problems(run, data, tmp_path, capsys):
    trained = {row["question"] for row in load_gsm8k(data, seed=42).gsm8k_train}
    dev, _ = problems_of("dev", data_dir=str(data), dataset_path=None, seed=1, models=[str(run)])
    assert dev and not trained & {row["question"] for row in dev}, "the model's split counts, not the seed"
    write_jsonl(tmp_path / "train.jsonl", ROWS[:40])
    write_jsonl(tmp_path / "test.jsonl", ROWS[50:])
    error = refusal(["evaluate", str(run), "--data_dir", str(tmp_path)], capsys)
    assert "this dev part may hold its training problems" in error


def trained_on_own_rows(folder: Path, rows: list[dict], *, seed: int, source: str = "rows.jsonl") -> str:
    """A saved model's folder as far as `problems_of` looks at it."""
    train, dev = split_gsm8k(rows, seed=seed)
    split = {"source": source, "seed": seed, "fingerprint": split_fingerprint(train, dev)}
    LatentReasoningConfig(reasoner=None, notes={"training": {"split": split}}).save_pretrained(folder)
    return str(folder)


def own_dev(path: Path | str, *models: str, part: str = "dev") -> list[dict]:
    return problems_of(part, data_dir=None, dataset_path=str(path), seed=42, models=models)[0]


def test_own_rows_that_were_trained_on_are_known_wherever_they_lie(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "rows.jsonl", ROWS[:30])
    model = trained_on_own_rows(tmp_path / "one", ROWS[:30], seed=7)
    other = trained_on_own_rows(tmp_path / "two", ROWS[30:], seed=8, source="elsewhere.jsonl")
    expected = split_gsm8k(ROWS[:30], seed=7)[1]
    monkeypatch.chdir(tmp_path)
    for path in ("rows.jsonl", "./rows.jsonl", tmp_path / "rows.jsonl", "../" + tmp_path.name + "/rows.jsonl"):
        assert own_dev(path, model, other) == expected
        with pytest.raises(UserMistake, match="was trained on: evaluate its dev part"):
            own_dev(path, model, part="test")
    with pytest.raises(UserMistake, match="was trained on: evaluate its dev part"):
        own_dev(tmp_path / "rows.jsonl", model, trained_on_own_rows(tmp_path / "three", ROWS[:30], seed=9))
    write_jsonl(tmp_path / "others.jsonl", ROWS[40:])
    assert own_dev("others.jsonl", model) == own_dev("others.jsonl", model, part="test") == ROWS[40:]
    write_jsonl(tmp_path / "single.jsonl", ROWS[:1])
    assert len(own_dev("single.jsonl", other)) == 1
    write_jsonl(tmp_path / "rows.jsonl", ROWS[:31])
    with pytest.raises(UserMistake, match="was trained on rows.jsonl, which holds other problems now"):
        own_dev("rows.jsonl", model)


def test_a_model_on_the_hub_says_what_it_was_trained_on(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "rows.jsonl", ROWS[:30])
    folder = trained_on_own_rows(tmp_path / "snapshot", ROWS[:30], seed=7)
    kinds = {"me/model": "latent_reasoning", "a/base": "smollm3"}
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda name: ({"model_type": kinds[name]}, {}))
    monkeypatch.setattr("smollm_trm.models.storage.snapshot_download", lambda name, **_: folder)
    dev = split_gsm8k(ROWS[:30], seed=7)[1]
    assert own_dev(tmp_path / "rows.jsonl", "me/model") == dev and len(own_dev(tmp_path / "rows.jsonl", "a/base")) == 30


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """The folder of an untuned base, whose tokenizer has a chat template."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    make_base("smollm3", tokenizer).save_pretrained(folder), tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_precision_that_is_none_is_refused_by_python_too(base):
    with pytest.raises(UserMistake, match="precision='half': choose one of auto, fp32, bf16, fp16"):
        load_for_evaluation(base, precision="half")


@pytest.mark.parametrize(
    ("prompt_format", "prompt"),
    [("plain", "<s>Question: Why 1?\nAnswer:"), ("chat", "<user>Why 1?<assistant>")],
)
def test_an_untuned_base_is_asked_in_its_own_way_without_a_think_block(base, prompt_format, prompt):
    model = load_for_evaluation(base, target="answer", prompt_format=prompt_format)
    assert not model.use_trm and not any(parameter.requires_grad for parameter in model.parameters())
    asked = model.encoder.prompt_text("Why 1?")
    assert asked.removeprefix("<s>") == prompt.removeprefix("<s>") and "think" not in asked
    assert model.tokenizer.decode(model.encoder.encode_prompt("Why 1?")).endswith(prompt[-10:])
    assert isinstance(model.generate_with_thinking("Why 1?", max_new_tokens=3), str)


def test_the_format_that_was_named_reaches_the_base(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        "smollm_trm.evaluation.loading.load_for_evaluation",
        lambda *_, **how: asked.append(how) or SimpleNamespace(generate_with_thinking=lambda *_, **__: ""),
    )
    cli.main(["ask", "a model", "Why?", "--prompt_format", "chat"])
    assert len(asked) == 1 and asked[0].items() >= {"prompt_format": "chat", "precision": "auto"}.items()


def test_a_run_its_saved_model_and_a_base_are_all_loaded_by_their_folders(run, base, tmp_path):
    trained, saved = load_for_evaluation(str(run)), load_for_evaluation(str(run / "model"))
    assert trained.num_latents == saved.num_latents == 4 and trained.config.target == "answer"
    assert "<think>" in trained.encoder.prompt_text("Why?")
    assert model_fingerprint(trained) == model_fingerprint(saved)
    saved.save_pretrained(tmp_path / "again")
    assert model_fingerprint(load_for_evaluation(str(tmp_path / "again"))) == model_fingerprint(saved)
    assert load_for_evaluation(base).num_latents == 0


def test_results_hold_no_absolute_path(run, base, data, tmp_path):
    folder, here = tmp_path / "results", ["--data_dir", str(data), "--max_new_tokens", "3"]
    write_jsonl(tmp_path / "own.jsonl", ROWS[:6])
    own = ["--dataset_path", str(tmp_path / "own.jsonl"), "--output_dir", str(folder)]
    cli.main(["evaluate", str(run), *here, "--output_dir", str(folder)])
    cli.main(["evaluate", base, *own, "--max_new_tokens", "3"])
    cli.main(["compare", *own, f"--models.base={base}", f"--models.trained={run}", "--batch_size", "6"])
    written = [file for file in folder.iterdir() if file.suffix in (".json", ".jsonl", ".md")]
    assert {"dev-3-tokens.json", "own-3-tokens.json", "comparison.json", "comparison.md", "trained.jsonl"} <= {
        f.name for f in written
    }
    for file in written:
        assert str(tmp_path.parent) not in file.read_text() and str(Path.home()) not in file.read_text(), file
    report, compared = (json.loads((folder / name).read_text()) for name in ("own-3-tokens.json", "comparison.json"))
    assert report["split"]["source"] == compared["split"]["source"] == "own.jsonl"
    assert compared["models"] == {"base": Path(base).name, "trained": "out"}


@pytest.mark.parametrize(("target", "trained_on_losses"), [("steps", True), ("answer", False)])
def test_the_halting_heads_figure_says_what_it_is_of(target, trained_on_losses, data, tmp_path, monkeypatch, capsys):
    model = SimpleNamespace(config=SimpleNamespace(target=target))
    result = {"accuracy": 0.5, "total": 10, "interval": [0.2, 0.8], "strict_accuracy": 0.5, "correct_by_problem": []}
    halting = {"auroc": 0.75, "base_rate": 0.5, "mean_steps": 2.0, "steps": 4}
    monkeypatch.setattr("smollm_trm.evaluation.loading.load_for_evaluation", lambda *_, **__: model)
    monkeypatch.setattr("smollm_trm.evaluation.evaluate.evaluate_gsm8k", lambda *_, **__: result)
    monkeypatch.setattr("smollm_trm.evaluation.halting.judge_halting", lambda *_: halting)
    cli.main(["evaluate", str(tmp_path), "--data_dir", str(data), "--output_dir", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "AUROC 0.75 for right answers" in shown and ("trained on losses" in shown) is trained_on_losses


def test_push_dry_run_writes_a_card_with_what_was_measured(run, capsys):
    cli.main(["push", str(run), "someone/model", "--dry_run", "true"])
    assert "would push to someone/model" in capsys.readouterr().out
    card = (run / "model" / "README.md").read_text()
    assert "2 optimizer steps" in card and "dev loss" in card and "test-4-tokens: " in card


def test_the_help_of_training_is_in_groups_and_shows_the_fields_of_its_parts(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = capsys.readouterr().out
    headings = [line for line in shown.splitlines() if line.endswith(":") and line[0].isalpha()]
    assert headings[1:] == [
        *(f"{one}:" for one in HELP_GROUPS[0].values()),
        *(f"fields of --{n}:" for n in HELP_GROUPS[1]),
    ]
    for name in [*TrainSettings.__dataclass_fields__, "trm_kwargs.gain", "trm_kwargs.n_layers", "lora_kwargs.r"]:
        assert shown.count(f"  --{name} ") == 1, name
    assert shown.index("Data:") < shown.index("--dev_path") < shown.index("Model:") < shown.index("--num_latents")


def test_every_training_option_can_be_given_and_is_read():
    parser = cli.command_parser("train")
    parsed = parser.parse_args(["--num_latents", "5", "--trm_kwargs.n_layers", "1", "--use_trm", "false"])
    assert (parsed.num_latents, parsed.trm_kwargs, parsed.use_trm) == (5, {"n_layers": 1}, False)
    assert set(TrainSettings.__dataclass_fields__) <= set(parsed.keys())


def test_print_config_prints_yaml_that_loads_again(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--num_latents", "7", "--print_config"])
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["num_latents"] == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["arithmetic", "generat"], "did you mean 'arithmetic generate'?"),
        (["train", "--num_latnets", "5"], "did you mean --num_latents?"),
        (["train", "--num_latent", "5"], "did you mean --num_latents?"),
        (["train", "--trm_kwargs.n_layer", "5"], "trm_kwargs: unknown setting 'n_layer'; did you mean 'n_layers'?"),
        (["train", "--num_latents", "0"], "num_latents=0: must be at least 1"),
        (["train", "--num_latents", "-3"], "num_latents=-3: must be at least 1"),
        (["train", "--num_latents", "many"], "num_latents"),
        (["train", "--batch_size", "0"], "smollm-trm: --batch_size=0: must be at least 1"),
        (
            ["train", "--load_model_path", "x", "--trust_remote_code"],
            "for --model_name: leave it or --load_model_path out",
        ),
        (["train", "--trm_kwargs.n_layers", "two"], "trm_kwargs: n_layers='two' must be int, found str"),
        (["train", "--trm_kwargs.n_heads", "0"], "n_heads=0: must be at least 1"),
        (["train", "--trm_kwargs.preset", "papre"], "trm_kwargs: preset='papre': choose one of paper"),
        (["train", "--target", "step"], "target='step': choose one of steps, answer"),
        (["train", "--precision", "half"], "precision='half': choose one of auto"),
        (["train", "--learning_rate", "3"], "learning_rate=3.0"),
        (["train", "--model_name", "tiny", "--data_dir", "nowhere"], "nowhere: no such folder"),
        (["train", "--model_name", "tiny", "--dataset_path", "nowhere.json"], "nowhere.json"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["evaluate"], "model"),
        (["evaluate", "x", "--part", "train"], "part='train': choose 'dev' or 'test'"),
        (["ask", "nowhere/at/all", " "], "question: it is empty"),
        (["evaluate", "x", "--part"], "argument --part: expected one argument\n"),
        (["compare"], "models"),
        (["push", "nowhere", "a/b"], "no config.json there"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(arguments, message, capsys):
    assert message in refusal(arguments, capsys)


def test_an_unwritable_output_folder_is_one_clear_line(data, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "run")
    arguments = [
        f"--{name}={json.dumps(value) if isinstance(value, dict) else value}" for name, value in TINY_RUN.items()
    ]
    error = refusal(["train", *arguments, "--data_dir", str(data), "--output_dir", out], capsys)
    assert "could not write" in error and "another output folder" in error


def test_usage_names_every_command(capsys):
    cli.main([])
    usage = capsys.readouterr().out
    assert all(f"  {name} " in usage for name in cli.COMMANDS)


def test_hyphens_and_bare_switches_work_as_in_the_documents(tmp_path, capsys):
    out = str(tmp_path / "data")
    cli.main(["arithmetic", "generate", "--num-examples", "200", "--max-digits=1", "--output-dir", out])
    assert (tmp_path / "data" / "train.json").is_file()
    parser = cli.command_parser("arithmetic train")
    given = cli.tidy_arguments(parser, ["--fp16", "--no-wandb", "--model-size", "medium", "--max-length", "64"])
    parsed = parser.parse_args(given)
    assert (parsed.fp16, parsed.no_wandb, parsed.model_size, parsed.max_length) == (True, True, "medium", 64)


@pytest.mark.parametrize("command", ["generate", "train", "evaluate", "interactive"])
def test_arithmetic_commands_refuse_unknown_options_in_one_line(command, capsys):
    assert "--sed" in refusal(["arithmetic", command, "--sed", "1"], capsys)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "stopped; the same command goes on from what was kept"),
        (KeyboardInterrupt("stopped; step 3 is kept"), 130, "stopped; step 3 is kept"),
        (RuntimeError("out of memory: lower batch_size"), 2, "lower batch_size"),
        (
            RuntimeError("can't allocate memory: you tried to allocate 51200000000 bytes."),
            2,
            "too large: 47.7 GiB were",
        ),
        (MemoryError(), 2, "MemoryError"),
        (FloatingPointError("the loss is not a number"), 2, "the loss is not a number"),
        (UserMistake("num_latents=0: must be at least 1\nmore"), 2, "num_latents=0: must be at least 1\n"),
        (FileNotFoundError("nowhere: no such folder; give another"), 2, "nowhere: no such folder"),
        (PermissionError(13, "Permission denied", "rows.jsonl"), 2, "Permission denied: 'rows.jsonl'"),
    ],
)
def test_what_stops_a_command_is_one_line_with_its_exit_code(error, code, message, monkeypatch, capsys):
    def stopped(*_):
        raise error

    monkeypatch.setattr(cli, "run_command", stopped)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train"])
    written = capsys.readouterr().err
    assert stop.value.code == code and message in written and written.count("\n") == 1
    for arguments in (["--debug", "train"], ["train", "--num_latents", "4", "--debug"]):
        with pytest.raises(type(error)):
            cli.main(arguments)


@pytest.mark.parametrize("bug", [ValueError("too many values to unpack"), KeyError("a"), BrokenPipeError(32, "pipe")])
def test_a_bug_of_ours_keeps_its_traceback(bug, monkeypatch):
    def broken(*_):
        raise bug

    monkeypatch.setattr(cli, "run_command", broken)
    with pytest.raises(type(bug)):
        cli.main(["train"])
    monkeypatch.setattr(cli, "run_command", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        cli.main(["train"])


def test_debug_shows_where_an_option_was_refused():
    with pytest.raises(UserMistake, match="did you mean --num_latents") as found:
        cli.main(["train", "--num_latnets", "5", "--debug"])
    assert found.traceback[-1].name == "error"


def test_version_names_the_packages_that_decide_a_result(capsys):
    for arguments in (["--version"], ["train", "--version"]):
        cli.main(arguments)
        shown = capsys.readouterr().out
        assert shown.startswith("smollm-trm ") and f"torch {torch.__version__}" in shown and shown.count("\n") == 1


@pytest.mark.parametrize("arguments", [["arithmetic"], ["arithmetic", "--help"], ["arithmetic", "-h"]])
def test_a_group_of_commands_has_its_help(arguments, capsys):
    cli.main(arguments)
    shown = capsys.readouterr().out
    of_group = [name for name in cli.COMMANDS if name.startswith("arithmetic ")]
    assert "smollm-trm arithmetic <command>" in shown and len(of_group) == 4
    assert [name for name in cli.COMMANDS if f"  {name} " in shown] == of_group


def test_a_new_group_of_commands_needs_only_its_lines(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "gardens dig", cli.Command("commands:demo", "The holes."))
    cli.main(["gardens"])
    assert "  gardens dig  The holes." in capsys.readouterr().out
    assert "did you mean 'gardens dig'?" in refusal(["gardens", "dgi"], capsys)
    assert "did you mean 'gardens'?" in refusal(["garden"], capsys)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_a_typed_function_with_help(name, capsys):
    function = cli.imported(cli.COMMANDS[name].function)
    assert function.__doc__ and all(one.annotation is not one.empty for one in signature(function).parameters.values())
    with pytest.raises(SystemExit) as stop:
        cli.main([*name.split(), "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and cli.COMMANDS[name].line in " ".join(shown.split())


def test_the_list_of_commands_needs_no_heavy_library():
    command = [sys.executable, "-X", "importtime", "-m", "smollm_trm"]
    imported = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "jsonargparse" in imported and not re.search(r"\| +(torch|transformers|datasets)$", imported, re.MULTILINE)


def test_every_setting_that_is_not_the_default_is_in_the_name_of_the_results():
    def name(**given) -> str:
        return commands.EvaluateSettings(model="m", **given).file_name

    assert name() == "dev" and name(dataset_path="a/rows.jsonl") == "rows"
    assert (
        name(part="test", prompt_format="chat", max_samples=200, latents="shuffled") == "test-chat-first-200-shuffled"
    )
    assert name(target="answer", shots=8, seed=1, max_new_tokens=9) == "dev-answer-8-shot-9-tokens-seed-1"
    assert name(samples_per_problem=5, precision="bf16") == "dev-5-votes-bf16"


def test_an_untuned_base_is_evaluated_beside_itself_and_shown_examples(base, data, tmp_path, capsys):
    command = ["evaluate", base, "--data_dir", str(data), "--max_samples", "2", "--max_new_tokens", "2"]
    out = ["--output_dir", str(tmp_path)]
    for more in ([], ["--prompt_format", "chat"], ["--shots", "3"], ["--precision", "bf16"]):
        cli.main([*command, *out, *more])
    names = {path.name for path in tmp_path.glob("*.json")}
    assert len(names) == 4 and "dev-3-shot-first-2-2-tokens.json" in names
    report = json.loads((tmp_path / "dev-3-shot-first-2-2-tokens.json").read_text())
    assert report["settings"]["shots"] == 3 and "dev, 3 shots: " in capsys.readouterr().out
    assert json.loads((tmp_path / "dev-first-2-2-tokens-bf16.json").read_text())["precision"] == "bfloat16"


def test_ask_without_a_question_answers_what_is_typed(base, monkeypatch, capsys):
    asked: list = []
    encode = PromptEncoder.encode_prompt
    monkeypatch.setattr(PromptEncoder, "encode_prompt", lambda self, one: asked.append(one[:]) or encode(self, one))
    for prompt_format, n_messages in (("plain", 1), ("chat", 3)):
        monkeypatch.setattr("sys.stdin", io.StringIO("What is 1 + 1?\n\nAnd 2 + 2?\n"))
        cli.main(["ask", base, "--max_new_tokens", "3", "--prompt_format", prompt_format])
        shown = capsys.readouterr().out
        assert shown.count("\n") == 2
        assert len(asked[-1]) == n_messages and asked[-1][-1] == {"role": "user", "content": "And 2 + 2?"}
    assert asked[-1][0]["content"] == "What is 1 + 1?" and asked[-1][1]["content"] == shown.split("\n")[0].strip()


@pytest.mark.parametrize(("temperature", "sampling"), [("0", {}), ("0.7", {"do_sample": True, "temperature": 0.7})])
def test_ask_is_greedy_unless_a_temperature_is_given(temperature, sampling, monkeypatch, capsys):
    asked = []
    model = SimpleNamespace(generate_with_thinking=lambda question, **options: asked.append(options) or " 4 ")
    monkeypatch.setattr("smollm_trm.evaluation.loading.load_for_evaluation", lambda *_, **__: model)
    cli.main(["ask", "a model", "What is 2 + 2?", "--max_new_tokens", "5", "--temperature", temperature])
    assert capsys.readouterr().out == "4\n" and asked == [{"max_new_tokens": 5, **sampling}]


def test_evaluate_hands_its_options_on(monkeypatch, capsys):
    asked = {}

    def evaluated(model, rows, max_samples, batch_size, **options):
        asked.update(options, part=rows, max_samples=max_samples, batch_size=batch_size)
        raise UserMistake("enough")

    loading = "smollm_trm.evaluation.loading."
    monkeypatch.setattr(loading + "problems_of", lambda part, **_: (part, {}))
    monkeypatch.setattr(loading + "load_for_evaluation", lambda *_, **__: None)
    monkeypatch.setattr("smollm_trm.evaluation.evaluate.evaluate_gsm8k", evaluated)
    given = {"part": "test", "max_samples": 9, "batch_size": 7, "max_new_tokens": 5, "latents": "shuffled"}
    given |= {"samples_per_problem": 3, "seed": 4}
    arguments = [f"--{name}={value}" for name, value in given.items()]
    assert "enough" in refusal(["evaluate", "a model", *arguments], capsys)
    assert given.items() <= asked.items()
