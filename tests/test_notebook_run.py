"""The notebook as its reader meets it: run top to bottom in an empty folder, without the library and without a network.

The long tests are marked `notebook` (`pytest -m notebook`); they share one smoke run of a few minutes.
"""

import ast
import csv
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
import types
import warnings
from pathlib import Path

import nbformat
import pytest
import torch
from executed_notebook import FEWER, NOTEBOOK, ROOT, ExecutedNotebook
from transformers import AutoModel, AutoModelForCausalLM

from smollm_trm.evaluation.arms import evaluate_arm
from smollm_trm.evaluation.loading import problems_of
from smollm_trm.finetune import train_gsm8k
from smollm_trm.models.configuration import LatentReasoningConfig, registered_config
from smollm_trm.models.modeling import LatentReasoningModel, registered_for
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.training.settings import TrainSettings

GUIDES = ("COLAB_NOTEBOOK_GUIDE.md", "GSM8K_NOTEBOOK_README.md")
LONGEST_RUN = 360  # CPU seconds that the smoke run, which has one thread, may take: other work on a machine adds none


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> ExecutedNotebook:
    """The notebook's smoke run, exactly as committed."""
    return ExecutedNotebook(tmp_path_factory.mktemp("notebook"))


def logged(path: Path, column: str) -> list[float]:
    """One column of a run's metrics.csv."""
    with open(path, newline="", encoding="utf-8") as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


@pytest.mark.notebook
@pytest.mark.timeout(1800)
def test_it_runs_top_to_bottom_in_time_with_the_library_hidden_and_the_network_off(smoke):
    guard = smoke.output("192.0.2.1")
    assert "the library is hidden" in guard and "the network is off" in guard
    code = [cell for cell in smoke.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code if cell.source.strip())
    assert "this is RUN = 'smoke' instead" in smoke.output("def gpu_memory")
    assert 10 < smoke.cpu_seconds < LONGEST_RUN


@pytest.mark.notebook
@pytest.mark.timeout(1800)
def test_it_really_trains(smoke):
    for run in ("base", "lora", "lora_trm"):
        losses = logged(smoke.folder / "outputs/smoke" / run / "logs/metrics.csv", "train_loss")
        tenth = max(1, len(losses) // 10)
        assert sum(losses[-tenth:]) < 0.8 * sum(losses[:tenth]), run


@pytest.mark.notebook
@pytest.mark.timeout(1800)
def test_its_table_holds_all_arms_and_says_whether_shuffling_the_latents_hurts(smoke):
    table = re.sub(" +[|]", " |", smoke.output("report_comparison("))
    for arm in ("| base |", "| LoRA |", "| LoRA + TRM |", "| LoRA + TRM, latents shuffled |"):
        assert arm in table
    saved = json.loads((smoke.folder / "outputs/smoke/comparison.json").read_text())
    verdict = {arm["name"]: arm["latents_verdict"] for arm in saved["arms"]}["LoRA + TRM"]
    assert verdict in ("latents used", "latents ignored", "too few problems to tell") and verdict in table
    assert "dev accuracy" in smoke.output('judge("LoRA", model.model)')
    assert "test accuracy" in smoke.output("OFFICIAL_TEST or RUN")


@pytest.mark.notebook
@pytest.mark.timeout(1800)
def test_it_shows_what_it_promises(smoke):
    assert "#### " in smoke.output("load_gsm8k(data_dir")
    example = smoke.output("masked:")
    assert "[slot x 8]" in example and "supervised: ' ####" in example and "<|im_end|>" in example
    assert "trainable params" in smoke.output("print_trainable_parameters")
    assert "before:" in smoke.output("before:   {was.strip") and "after:" in smoke.output("before:   {was.strip")
    assert "step 4:" in smoke.output("halting_logit[0]")
    assert "and the same answer again" in smoke.output("from_pretrained(saved")
    assert "not pushed" in smoke.output("PUSH_TO and os")
    pictures = [one for cell in smoke.cells for one in cell.get("outputs", []) if "image/png" in one.get("data", {})]
    assert len(pictures) == 2


@pytest.mark.notebook
@pytest.mark.timeout(1800)
def test_run_all_may_be_pressed_again_and_every_cell_stays_usable(tmp_path):
    cells = {inside: cell_source(inside) for inside in ("OFFICIAL_TEST or RUN", "halting_logit[0]", "my_question = ")}
    last = cell_source("PUSH_TO and os")
    run = ExecutedNotebook(tmp_path, {**FEWER, last: "\n\n".join([last, *cells.values()])}, twice=True)
    for inside in ("print_trainable_parameters", "report_comparison(", "from_pretrained(saved"):
        assert run.output(inside, again=True) == run.output(inside)


@pytest.mark.notebook
@pytest.mark.timeout(1800)
def test_the_same_seed_gives_the_library_s_losses_generations_and_accuracy(smoke, tmp_path, monkeypatch):
    monkeypatch.chdir(smoke.folder)  # the notebook's paths are relative
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = smoke.folder / "outputs/smoke"
    noted = json.loads((run / "lora_trm/settings.json").read_text())
    settings = {name: value for name, value in noted.items() if name != "split"}
    rows, _ = problems_of("dev", data_dir=settings["data_dir"], dataset_path=None, seed=0, models=[str(run / "model")])
    try:
        _, module = train_gsm8k(
            **{**settings, "output_dir": str(tmp_path / "again"), "resume": "never", "progress": False}
        )
        theirs = [json.loads(line) for line in (run / "predictions/lora_and_trm.jsonl").read_text().splitlines()]
        ours = evaluate_arm(
            "LoRA + TRM", module.model, rows, tmp_path, max_samples=len(theirs) - 1, batch_size=128,
            progress=False,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for column in ("train_loss", "dev_loss"):
        metrics = "logs/metrics.csv"
        assert logged(tmp_path / "again" / metrics, column) == logged(run / "lora_trm" / metrics, column)
    again = [json.loads(line) for line in (tmp_path / "lora_and_trm.jsonl").read_text().splitlines()]
    assert [line["texts"] for line in again[1:]] == [line["texts"] for line in theirs[1:]]
    accuracy = {arm["name"]: arm["accuracy"] for arm in json.loads((run / "comparison.json").read_text())["arms"]}
    assert ours["LoRA + TRM"]["accuracy"] == accuracy["LoRA + TRM"]


# ---- the guides' recipes -----------------------------------------------------------------------


def recipes() -> list[tuple[str, str]]:
    """(guide and title, code) of every recipe: a python block below a line `<!-- recipe: title -->`."""
    found = []
    for guide in GUIDES:
        path = ROOT / guide
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        found += [
            (f"{path.stem}: {match[1]}", textwrap.dedent(match[2]))
            for match in re.finditer(r"<!-- recipe: (.+?) -->\n+```python\n(.+?)```", text, re.DOTALL)
        ]
    return found


@pytest.mark.parametrize(("title", "code"), recipes(), ids=[title for title, _ in recipes()])
def test_every_recipe_of_the_guides_trains(title, code, tmp_path, monkeypatch, tiny_problems):
    monkeypatch.chdir(tmp_path)
    form = form_fields()
    given: dict = {}
    exec(code, given)  # our own guide
    fields = {name: value for name, value in given.items() if not name.startswith("__")}
    assert set(fields) <= form, "a recipe sets what the form does not have"
    changes = {name: value for name, value in fields.items() if name in TrainSettings.__dataclass_fields__}
    small = {
        "model_name": "tiny", "max_steps": 2, "num_epochs": 1, "accumulate_grad_batches": 1, "batch_size": 2,
        "patience": None, "progress": False, "num_latents": 4, "max_length": 2048, "output_dir": "run",
    }  # fmt: skip
    shrunk = {name: min(value, 16) if name == "num_latents" else value for name, value in changes.items()}
    if "dataset_path" not in fields:
        small |= {"train_dataset": tiny_problems[:12], "test_dataset": tiny_problems[12:16]}
    trainer, module = train_gsm8k(**{**small, **shrunk, "max_steps": 2, "model_name": "tiny"})
    assert trainer.global_step >= 1
    assert module.model.use_trm is changes.get("use_trm", True)


@pytest.fixture(scope="module")
def inlined() -> types.ModuleType:
    """What the notebook's imports and library cells define."""
    module = types.ModuleType("inlined_notebook")
    sys.modules[module.__name__] = module  # dataclasses look there
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            imports = all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(cell.source).body)
            if imports or "library" in cell.metadata.get("tags", []):
                exec(cell.source, vars(module))
    yield module
    del sys.modules[module.__name__]
    registered_config(LatentReasoningConfig)  # the notebook's own classes had taken their place
    registered_for(AutoModel)(LatentReasoningModel)
    registered_for(AutoModelForCausalLM)(SmolLMv3WithTRM)


def test_own_problems_of_the_guide_take_gsm8k_s_place_in_the_notebook_s_cells(
    inlined, tmp_path, monkeypatch, tiny_problems, capsys
):
    guide = (ROOT / GUIDES[0]).read_text(encoding="utf-8")
    [(problems, recipe)] = re.findall(r"```json\n(.+?)```\n+```python\n(dataset_path = .+?)```", guide, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {**vars(inlined), "FOLDER": Path("outputs"), "RESUME": True, "data_dir": None}
    names |= {"gsm8k_train": tiny_problems[:12], "gsm8k_test": tiny_problems[12:]}
    for inside in ("@title Settings", "RUNS = "):
        exec(cell_source(inside).replace('RUN = "quick"', 'RUN = "smoke"'), names)
    exec(recipe, names)  # our own guide
    Path(names["dataset_path"]).write_text(problems, encoding="utf-8")
    exec(cell_source("if dataset_path:"), names)
    own = {row["question"] for row in json.loads(problems)}
    assert {row["question"] for part in ("gsm8k_train", "gsm8k_test") for row in names[part]} == own
    assert f"problems.json: {len(own) - 1} train, 1 dev" in capsys.readouterr().out
    exec(cell_source("checked = TrainSettings"), names)
    few = {"max_steps": 1, "val_check_interval": 1, "save_every_n_steps": 1, "progress": False}
    trainer, module = names["train_gsm8k"](**{**names["config"], **few})
    noted = json.loads(Path("outputs/lora_trm/results.json").read_text())
    assert (noted["train_rows"], noted["dev_rows"]) == (len(own) - 1, 1) and trainer.global_step == 1


def configured(inlined: types.ModuleType, **form: object) -> dict:
    """The names that there are after the configuration cell of a smoke run with these fields of the form."""
    names = {**vars(inlined), "FOLDER": Path("outputs/smoke"), "RESUME": True}
    for inside in ("@title Settings", "RUNS = "):
        exec(cell_source(inside).replace('RUN = "quick"', 'RUN = "smoke"'), names)
        names |= form
    names["around"] |= {"word_problems": 40, "dev": 5}
    for inside in ("write_word_problems(data_dir", "if dataset_path:", "checked = TrainSettings"):
        exec(cell_source(inside), names)
    return names


def test_settings_that_no_model_can_have_are_refused_in_the_configuration_cell(inlined, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configured(inlined, trm_kwargs={"n_heads": 8}, trm_learning_rate=1e-3)["checked"].trm_learning_rate == 1e-3
    with pytest.raises(ValueError, match="n_heads"):
        configured(inlined, trm_kwargs={"n_heads": 7})
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("source", ["outputs/smoke/data", "gsm8k"])
def test_the_split_that_the_notebook_trains_on_is_the_one_it_shows_and_the_library_evaluates(
    source, inlined, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    names = configured(inlined)
    Path("outputs/smoke/data").rename("gsm8k")
    if source == "gsm8k":  # as in the other runs, where the notebook gives no folder
        monkeypatch.setenv("GSM8K_DIR", source)
        names["RUN"], names["data_dir"] = "quick", None
        for inside in ("write_word_problems(data_dir", "checked = TrainSettings"):
            exec(cell_source(inside), names)
    else:
        Path("gsm8k").rename(source)
    few = {"max_steps": 1, "val_check_interval": 1, "save_every_n_steps": 1, "progress": False, "use_trm": False}
    names["trainer"], names["model"] = names["train_gsm8k"](**{**names["config"], **few})
    assert names["trainer"].datamodule.splits.gsm8k_test == names["gsm8k_test"]
    assert len(names["trainer"].datamodule.dev_set) == 5 < len(names["gsm8k_test"])
    saving = cell_source("from_pretrained(saved").partition("trainer = model = tuned = None")[0]
    tuned, run_folder = names["model"].model, Path(names["trainer"].default_root_dir)
    exec(saving, {**names, "tuned": tuned, "run_folder": run_folder})
    given = None if source == "gsm8k" else source
    rows, split = problems_of("dev", data_dir=given, dataset_path=None, seed=0, models=["outputs/smoke/model"])
    assert rows == names["gsm8k_test"] and split == names["splits"].summary
    card = Path("outputs/smoke/model/README.md").read_text(encoding="utf-8")
    assert f"trained on 32 problems of {Path(source).name} (split seed 42" in card
    assert ("openai/gsm8k" in card) is (source == "gsm8k")


def test_a_base_that_overflows_is_refused_before_it_answers(inlined, tmp_path, monkeypatch, tiny_problems):
    monkeypatch.chdir(tmp_path)
    asked = {"reasoner": None, "base_training": "frozen", "tiny_texts": ["Question: Answer: #### 1"]}
    base = inlined.SmolLMv3WithTRM.from_base("tiny", **asked)
    base.model.language_model.norm.weight.data.fill_(1e38)
    answering = []
    judged = types.SimpleNamespace(from_base=lambda *_, **__: base)
    monkeypatch.setattr(type(base), "generate_with_thinking", lambda *_, **__: answering.append(1))
    names = {**vars(inlined), "config": {"model_name": "a base"}, "shown": tiny_problems[:1], "SmolLMv3WithTRM": judged}
    names |= {"chosen": names["config"], "checked": TrainSettings(), "device": torch.device("cpu"), "gpu_memory": str}
    with pytest.raises(FloatingPointError, match="a base overflows in 32-true: .* Choose a GPU with bf16"):
        exec(cell_source("base = SmolLMv3WithTRM.from_base("), names)
    assert not answering


def form_fields() -> set[str]:
    """Names of the settings form, as the built notebook has them."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    [form] = [cell.source for cell in notebook.cells if "@title Settings" in cell.source]
    return set(re.findall(r"^(\w+) = .*# ?@param", form, re.MULTILINE))


@pytest.fixture(scope="module")
def tiny_problems() -> list[dict[str, str]]:
    """A few word problems."""
    from smollm_trm.data.word_problems import generate_word_problems

    return generate_word_problems(count=16, seed=1)


def test_the_form_offers_the_documents_configuration_keys():
    documents = {
        "model_name", "batch_size", "num_epochs", "learning_rate", "num_latents", "accumulate_grad_batches",
        "precision", "devices", "wandb_project", "wandb_name", "trm_kwargs", "dataset_path", "max_length",
        "max_samples", "val_check_interval", "use_trm",
    }  # fmt: skip
    assert documents | {"trm_learning_rate"} <= form_fields()


def test_the_notebook_never_asks_for_anything():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == "code":
            assert not re.search(r"\binput\(|getpass|wandb\.login|notebook_login", cell.source)


# ---- cells that need Colab, the Hub or the network, with stand-ins ----------------------------------


def cell_source(inside: str) -> str:
    """The one code cell with this text."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    [source] = [cell.source for cell in cells if cell.cell_type == "code" and inside in cell.source]
    return source


@pytest.fixture
def colab(monkeypatch):
    """A stand-in for `google.colab`: secrets that are there, and a Drive that remembers where it was mounted."""
    mounted = []

    def get(name):
        if name != "HF_TOKEN":
            raise LookupError(name)
        return "hf_stand_in"

    module = types.ModuleType("google.colab")
    module.userdata = types.SimpleNamespace(get=get)
    module.drive = types.SimpleNamespace(mount=mounted.append)
    google = types.ModuleType("google")
    google.colab = module
    monkeypatch.setitem(sys.modules, "google", google)
    monkeypatch.setitem(sys.modules, "google.colab", module)
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "")
    return mounted


def test_on_colab_only_what_is_missing_is_installed_and_torch_and_numpy_stay(monkeypatch, capsys):
    versions = {"torch": "2.11.0+cu128", "numpy": "2.1.0", "transformers": "5.15.0", "peft": "0.20.0",
                "datasets": "4.0.0", "matplotlib": "3.10.0", "scipy": "1.16.0", "torchao": "0.10.0"}  # fmt: skip
    commands, kept = [], []

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    def run(command, check):
        commands.append(command[3:])
        if "-c" in command:
            kept.append(Path(command[command.index("-c") + 1]).read_text())

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(subprocess, "run", run)
    with warnings.catch_warnings():
        exec(cell_source("NEEDED = "), {})
    [installing, removing] = commands
    assert installing[0] == "install" and installing[-1] == "pytorch-lightning>=2.6" and ">=" not in installing[-2]
    assert kept == ["torch==2.11.0+cu128\nnumpy==2.1.0"]
    assert removing == ["uninstall", "-q", "-y", "torchao"]


def test_secrets_are_found_without_asking_and_never_printed(colab, capsys):
    names = {"os": os, "IN_COLAB": True}
    exec(cell_source("userdata.get"), names)
    printed = capsys.readouterr().out
    assert os.environ["HF_TOKEN"] == "hf_stand_in" and not os.environ["WANDB_API_KEY"]
    assert printed == "WANDB_API_KEY: not set\nHF_TOKEN: found\n"
    assert "hf_stand_in" not in [value for name, value in names.items() if name != "os"]


@pytest.mark.parametrize(
    ("use_drive", "folder"), [(True, "/content/drive/MyDrive/smollm-trm/quick"), (False, "outputs/quick")]
)
def test_results_lie_on_drive_only_where_asked_for(colab, use_drive, folder, capsys):
    names = {"Path": Path, "USE_DRIVE": use_drive, "IN_COLAB": True, "RUN": "quick", "RESUME": True}
    exec(cell_source("drive.mount"), names)
    assert names["FOLDER"] == Path(folder)
    assert colab == (["/content/drive"] if use_drive else [])


@pytest.mark.parametrize(("push_to", "token"), [("me/mine", "hf_stand_in"), ("", "hf_stand_in"), ("me/mine", "")])
def test_the_model_is_pushed_only_with_a_name_and_a_token_and_its_card_says_what_was_measured(
    push_to, token, monkeypatch, capsys
):
    measured, pushed = [], []
    monkeypatch.setenv("HF_TOKEN", token)
    names = {
        "PUSH_TO": push_to,
        "os": os,
        "saved": Path("model"),
        "results": {"LoRA": {"accuracy": 0.5}},
        "add_evaluation": lambda *given: measured.append(given),
        "push_model": lambda *given: pushed.append(given) or ["README.md"],
    }
    exec(cell_source("PUSH_TO and os"), names)
    if push_to and token:
        assert measured == [(Path("model"), "dev, LoRA", {"accuracy": 0.5})]
        assert pushed == [(Path("model"), "me/mine")]
    else:
        assert not measured and not pushed and "not pushed" in capsys.readouterr().out
    assert "hf_stand_in" not in capsys.readouterr().out
