"""The notebook as its reader meets it: run top to bottom in an empty folder, without the library and without a network.

The long tests are marked `notebook` (`pytest -m notebook`); they share one smoke run of a few minutes.
"""

import ast
import csv
import gc
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
import weakref
from pathlib import Path

import nbformat
import pytest
import torch
from executed_notebook import NOTEBOOK, ROOT, ExecutedNotebook
from runs import save_tiny_base
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from smollm_trm.evaluation.arms import evaluate_arm
from smollm_trm.evaluation.loading import problems_of
from smollm_trm.finetune import train_gsm8k
from smollm_trm.models.configuration import LatentReasoningConfig, registered_for
from smollm_trm.models.modeling import LatentReasoningModel
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.training.settings import TrainSettings

GUIDES = ("COLAB_NOTEBOOK_GUIDE.md", "GSM8K_NOTEBOOK_README.md")
LONGEST_RUN = 1200  # CPU seconds of the smoke run: it took 323, on a busy machine they are longer


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> ExecutedNotebook:
    """The notebook's smoke run, exactly as committed."""
    return ExecutedNotebook(tmp_path_factory.mktemp("notebook"))


def folder_of(run: ExecutedNotebook, name: str) -> Path:
    """An arm's folder, which is named by its settings too."""
    places = (run.folder / "outputs/smoke").glob(f"{name}-????????")
    [folder] = [folder for folder in places if (folder / "results.json").is_file()]
    return folder


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
        losses = logged(folder_of(smoke, run) / "logs/metrics.csv", "train_loss")
        tenth = max(1, len(losses) // 10)
        assert sum(losses[-tenth:]) < 0.8 * sum(losses[:tenth]), run


@pytest.mark.notebook
@pytest.mark.timeout(1800)
def test_its_latents_are_used_and_it_says_so_over_the_table_of_all_arms(smoke):
    page = smoke.output("report_comparison(")
    for arm in ("base", "LoRA", "LoRA + TRM", "LoRA + TRM, latents shuffled"):
        assert f"<b>{arm}</b>" in page
    saved = json.loads((folder_of(smoke, "lora_trm") / "comparison.json").read_text())
    arms = {arm["name"]: arm for arm in saved["arms"]}
    assert arms["LoRA + TRM"]["latents_verdict"] == "latents used"
    assert "In LoRA + TRM the latents are used" in page and "no GPU here" in page
    assert arms["base"]["accuracy"] > 0.5 > arms["LoRA + TRM"]["accuracy"] > 0.15
    assert "dev accuracy" in smoke.output('judge("LoRA", model.model')
    assert "test accuracy" in smoke.output("OFFICIAL_TEST or RUN")


@pytest.mark.notebook
@pytest.mark.timeout(1800)
def test_it_shows_what_it_promises(smoke):
    assert "#### " in smoke.output("load_gsm8k(data_dir")
    example = smoke.output("masked:")
    assert "[slot x 8]" in example and "supervised: ' ####" in example and "<|im_end|>" in example
    assert "[slot x 8]" in smoke.output("encoder.prompt_text(")
    assert "latents (2, 16, 256), 4 times" in smoke.output("toy = build_reasoner")
    assert "trainable params" in smoke.output("print_trainable_parameters")
    compared = smoke.output("before:   {marked(was")
    assert re.search("before:   [✓✗]", compared) and re.search("after:    [✓✗]", compared)
    training = smoke.output("run_settings(tuned_name.lower()")
    assert len(re.findall(r"step \d+ [✓✗] .*right: ", training)) == 6  # two at each of three validations
    assert "step 1: halting" in smoke.output("halting_probabilities(tuned")
    assert "the same answer again" in smoke.output("from_pretrained(saved")
    assert "merged: " in smoke.output("EXPORT_MERGED or RUN")
    assert "not pushed" in smoke.output("PUSH_TO and os")
    pictures = [one for cell in smoke.cells for one in cell.get("outputs", []) if "image/png" in one.get("data", {})]
    assert len(pictures) == 4


@pytest.mark.notebook
@pytest.mark.timeout(1800)
def test_a_saved_notebook_holds_no_wall_of_bars(smoke):
    for cell in smoke.cells:
        outputs = cell.get("outputs", [])
        assert sum("it/s" in str(one) or "step/s" in str(one) or "problem/s" in str(one) for one in outputs) <= 3
        assert sum(len(one.get("text", "")) for one in outputs) < 6000
        assert not [one for one in outputs if one.get("name") == "stderr"], cell.source[:60]


@pytest.mark.notebook
@pytest.mark.timeout(1800)
def test_the_same_seed_gives_the_library_s_losses_generations_and_accuracy(smoke, tmp_path, monkeypatch):
    monkeypatch.chdir(smoke.folder)  # the notebook's paths are relative
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = folder_of(smoke, "lora_trm")
    noted = json.loads((run / "settings.json").read_text())
    settings = {name: value for name, value in noted.items() if name != "split"}
    rows, _ = problems_of(
        "dev", data_dir=settings["data_dir"], dataset_path=None, seed=0, models=["outputs/smoke/model"]
    )
    try:
        _, module = train_gsm8k(
            **{**settings, "output_dir": str(tmp_path / "again"), "resume": "never", "progress": False}
        )
        [answers] = run.glob("answers-*/lora_and_trm.jsonl")
        theirs = [json.loads(line) for line in answers.read_text().splitlines()]
        ours = evaluate_arm(
            "LoRA + TRM", module.model, rows, tmp_path, max_samples=len(theirs) - 1, batch_size=128,
            progress=False,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for column in ("train_loss", "dev_loss"):
        metrics = "logs/metrics.csv"
        assert logged(tmp_path / "again" / metrics, column) == logged(run / metrics, column)
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


DOCUMENTED = {  # from the user's own documents, as they are written there
    "more recursion": """
trm_kwargs={
    "n_latent_steps": 6,        # 4 → 6 for more reasoning
    "n_deep_recursions": 3,     # 2 → 3 for deeper recursion
    "n_supervision_steps": 8,   # 4 → 8 for more supervision
}
""",
    "less compression": "num_latents = 128  # Lower for less memory, 512 for more capacity",
    "a lower learning rate": "learning_rate = 1e-4  # Lower for stability",
    "a higher learning rate": "learning_rate = 5e-4  # Higher for faster convergence",
    "a short window": "num_latents = 256\nmax_length = 256",
    "out of memory": "batch_size = 1\nnum_latents = 128\nmax_length = 256\naccumulate_grad_batches = 8",
    "too slow": "max_samples = 8\nnum_epochs = 1\nval_check_interval=1.0",
    "baseline": "use_trm=False",
}
EVERY_RECIPE = [*recipes(), *((f"documents: {title}", code) for title, code in DOCUMENTED.items())]


@pytest.mark.parametrize(("title", "code"), EVERY_RECIPE, ids=[title for title, _ in EVERY_RECIPE])
def test_every_recipe_of_the_guides_and_of_the_documents_trains(
    title, code, tmp_path, monkeypatch, tiny_base, tiny_problems
):
    monkeypatch.chdir(tmp_path)
    form = form_fields()
    given: dict = {}
    exec(code, given)  # our own guide
    fields = {name: value for name, value in given.items() if not name.startswith("__")}
    assert set(fields) <= form, "a recipe sets what the form does not have"
    changes = {name: value for name, value in fields.items() if name in TrainSettings.__dataclass_fields__}
    if "num_latents" in changes:
        changes["num_latents"] = min(changes["num_latents"], 256)  # more take long
    small = {
        "model_name": tiny_base, "num_epochs": 1, "accumulate_grad_batches": 1, "batch_size": 2, "patience": None,
        "progress": False, "num_latents": 4, "output_dir": "run",
    }  # fmt: skip
    if "dataset_path" not in fields:
        small |= {"train_dataset": tiny_problems[:6], "test_dataset": tiny_problems[14:]}
    trainer, module = train_gsm8k(**{**small, **changes, "max_steps": 1})
    assert trainer.global_step == 1
    assert module.model.use_trm is changes.get("use_trm", True)
    assert module.model.num_latents == (changes.get("num_latents", 4) if module.model.use_trm else 0)


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory) -> str:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


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
    exec(cell_source("REASONERS = {"), vars(module))
    yield module
    del sys.modules[module.__name__]
    # the notebook's own classes had taken their place
    registered_for(AutoConfig, "latent_reasoning")(LatentReasoningConfig)
    registered_for(AutoModel, LatentReasoningConfig)(LatentReasoningModel)
    registered_for(AutoModelForCausalLM, LatentReasoningConfig)(SmolLMv3WithTRM)


SMALL_RUN = {  # what a test changes of whatever a notebook's configuration says
    "model_name": "tiny", "max_steps": 1, "num_epochs": 1, "num_latents": 3, "batch_size": 4, "eval_batch_size": 4,
    "accumulate_grad_batches": 1, "patience": None, "val_check_interval": 1, "save_every_n_steps": 1, "progress": False,
    "sample_answers": 0, "max_samples": 8, "reasoner_steps": 0,
    "trm_kwargs": {"n_layers": 1, "n_heads": 2, "compression_heads": 2, "dim": 16},
}  # fmt: skip


def run_cells(names: dict, *inside: str) -> dict:
    """Execute the cells with these texts, in order."""
    for text in inside:
        exec(cell_source(text), names)
    return names


def configured(inlined: types.ModuleType, **form: object) -> dict:
    """The names that there are after the configuration cell of a smoke run with these fields of the form."""
    names = {**vars(inlined), "FOLDER": Path("outputs/smoke"), "device": torch.device("cpu"), "peaks": [0.0]}
    names |= {"gpu_memory": str, "free_memory": lambda: None, "display": lambda *_: None}
    exec(cell_source("@title Settings").replace('RUN = "quick"', 'RUN = "smoke"'), names)
    names |= form
    run_cells(names, "RUNS = ")
    names["around"] |= {"word_problems": 40, "dev": 5, "base_steps": 2, "compared": 4, "at_once": 4}
    return run_cells(names, "write_word_problems(data_dir", "config = {")


def trained(names: dict) -> dict:
    """The names that there are after every cell of the training, made small."""
    names["config"] = {**names["config"], **SMALL_RUN}
    return run_cells(names, "arms: dict", 'twin = checked.model_name == "tiny"', "def stays_finite",
                     'judge("base"', 'judge("LoRA"', "run_settings(tuned_name.lower()")  # fmt: skip


def test_the_documents_configuration_and_calls_work_as_they_are_pasted(inlined, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = configured(inlined)
    pasted = """
config = {
    "train_dataset": gsm8k_train,  # 80% split (~5,978 examples)
    "test_dataset": gsm8k_test,    # 20% split (~1,495 examples)
    "model_name": "HuggingFaceTB/SmolLM3-3B",
    "batch_size": 2,
    "num_epochs": 3,
    "learning_rate": 2e-4,
    "num_latents": 256,
}
"""
    exec(pasted, names)
    loaded = []
    load_base = inlined.SmolLMv3WithTRM.from_base.__func__.__globals__["load_base"]
    scope = inlined.SmolLMv3WithTRM.from_base.__func__.__globals__

    def load_and_count(name, **how):
        loaded.append(name if isinstance(name, str) else None)
        return load_base(name, **how)

    monkeypatch.setitem(scope, "load_base", load_and_count)
    trained(names)
    by_name = [name for name in loaded if name]
    assert len(by_name) == 2 and by_name[0] == "tiny"  # made, trained, and then loaded once for all arms
    assert names["judged_on"] == names["gsm8k_test"]
    exec("results = evaluate_gsm8k(\n    model.model,\n    gsm8k_test,  # 20% split\n    max_samples=2\n)", names)
    exec("model.model.base_model.print_trainable_parameters()", names)
    run_cells(names, "def count(part", "after = ", "report_comparison(", "curves = {", "halting_probabilities(tuned",
              "attention_by_word(", "my_question = ", "from_pretrained(saved", "my_question = ")  # fmt: skip
    assert list(names["arms"]) == ["base", "LoRA", "LoRA + TRM", "LoRA + TRM, latents shuffled"]
    assert names["results"]["total"] == 2
    assert "the same answer again" in capsys.readouterr().out
    # A second Run all in this session gives the first one's models back before it loads anything.
    old = [weakref.ref(names["base"]), weakref.ref(names["tuned"]), weakref.ref(names["model"])]
    alive = []

    def load_and_look(name, **how):
        gc.collect()
        alive.append([one for one in old if one() is not None])
        return load_base(name, **how)

    monkeypatch.setitem(scope, "load_base", load_and_look)
    run_cells(names, "def stays_finite")
    assert alive[0] == []


def test_a_dataset_set_in_the_configuration_is_what_is_trained_on_and_judged(inlined, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    guide = (ROOT / GUIDES[0]).read_text(encoding="utf-8")
    [(problems, recipe)] = re.findall(r"```json\n(.+?)```\n+```python\n(dataset_path = .+?)```", guide, re.DOTALL)
    own = {row["question"] for row in json.loads(problems)}
    Path("problems.json").write_text(problems, encoding="utf-8")
    for how in (recipe, 'config["dataset_path"] = "problems.json"'):
        names = configured(inlined)
        if how is recipe:
            field: dict = {}
            exec(recipe, field)  # our own guide
            names = configured(inlined, dataset_path=field["dataset_path"])
        else:
            exec(how, names)
        run_cells(names, "arms: dict")
        assert {row["question"] for row in names["judged_on"]} < own
        split = names["gather_splits"](names["checked"], None, None)
        assert {row["question"] for row in split.gsm8k_train + split.gsm8k_test} == own


def test_a_changed_field_begins_another_run_only_for_the_arms_that_use_it(inlined, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def folders(**form) -> tuple[str, str]:
        names = run_cells(configured(inlined, **form), "arms: dict")
        run = names["run_settings"]
        return run("lora", use_trm=False)["output_dir"], run("lora_trm")["output_dir"]

    first = folders()
    assert folders() == first
    fewer = folders(num_latents="4")
    assert fewer[0] == first[0] and fewer[1] != first[1]
    slower = folders(learning_rate="1e-4")
    assert slower[0] != first[0] and slower[1] != first[1]
    assert folders(wandb_name="2024") == first


def test_settings_that_no_model_can_have_are_refused_in_the_configuration_cell(inlined, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"trm_kwargs": "{'n_heads': 8}", "trm_learning_rate": "1e-3", "reasoner": "trm"}
    assert configured(inlined, **given)["checked"].trm_learning_rate == 1e-3
    assert configured(inlined, reasoner="static")["checked"].trm_kwargs == {}
    with pytest.raises(ValueError, match="n_heads"):
        configured(inlined, trm_kwargs={"n_heads": 7})
    with pytest.raises(ValueError, match="num_latents"):
        configured(inlined, num_latents="many")
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
        run_cells(names, "write_word_problems(data_dir", "config = {")
    else:
        Path("gsm8k").rename(source)
    names["config"] = {**names["config"], **SMALL_RUN, "max_samples": None}
    run_cells(names, "arms: dict")
    small = {**names["run_settings"]("lora", use_trm=False), "max_dev_samples": 5}
    names["trainer"], names["model"] = names["train_gsm8k"](**small)
    assert names["judged_on"] == names["trainer"].datamodule.splits.gsm8k_test == names["gsm8k_test"]
    assert len(names["trainer"].datamodule.dev_set) == 5 < len(names["gsm8k_test"])
    saving = cell_source("from_pretrained(saved").partition("tuned = model.model = None")[0]
    tuned, run_folder = names["model"].model, Path(names["trainer"].default_root_dir)
    exec(saving, {**names, "tuned": tuned, "run_folder": run_folder})
    given = None if source == "gsm8k" else source
    rows, split = problems_of("dev", data_dir=given, dataset_path=None, seed=0, models=["outputs/smoke/model"])
    assert rows == names["gsm8k_test"] and split == names["splits"].summary
    card = Path("outputs/smoke/model/README.md").read_text(encoding="utf-8")
    assert f"trained on 32 problems of {Path(source).name} (split seed 42" in card
    assert ("openai/gsm8k" in card) is (source == "gsm8k")


def loading(inlined: types.ModuleType, tiny_problems: list, weight: float, precision: str) -> dict:
    """The names that the loading cell needs, with a twin whose last block is as loud as told."""
    asked = {"reasoner": None, "base_training": "frozen", "tiny_texts": ["Question: Answer: #### 1"]}
    dtypes = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16, "32-true": torch.float32}

    def pick_precision(wanted: str) -> tuple[str, torch.dtype]:  # as on a GPU, which fp16 needs
        return wanted, dtypes[wanted]

    dtype = dtypes[precision]
    base = inlined.SmolLMv3WithTRM.from_base("tiny", dtype=dtype, **asked)
    with torch.no_grad():
        base.model.language_model.layers[0].mlp.down_proj.weight.fill_(weight)
        base.model.language_model.layers[0].mlp.up_proj.weight.fill_(1.0)
        base.model.language_model.layers[0].mlp.gate_proj.weight.abs_()
    from_base = inlined.SmolLMv3WithTRM.from_base

    def given(name, **how):
        return base if isinstance(name, str) else from_base(name, **how)

    twin_class = types.SimpleNamespace(from_base=given)
    checked = TrainSettings(model_name="x/a-base", num_latents=3, precision=precision)
    names = {**vars(inlined), "settings": {"model_name": "x/a-base"}, "checked": checked, "twin": False}
    names |= {"judged_on": tiny_problems, "device": torch.device("cpu"), "gpu_memory": str, "free_memory": lambda: None}
    return {**names, "SmolLMv3WithTRM": twin_class, "pick_precision": pick_precision}


def test_a_base_that_overflows_even_so_computes_in_bf16(inlined, tiny_problems, capsys):
    names = loading(inlined, tiny_problems, 6e4, "16-mixed")
    run_cells(names, "def stays_finite")
    assert names["settings"]["precision"] == "bf16-mixed" and names["base_dtype"] == torch.bfloat16
    assert names["base"].dtype == torch.bfloat16 and "overflows in fp16" in capsys.readouterr().out


def test_a_base_without_finite_numbers_is_refused_before_it_answers(inlined, tiny_problems, capsys):
    names = loading(inlined, tiny_problems, float("nan"), "32-true")
    with pytest.raises(FloatingPointError, match="x/a-base gives no finite numbers in 32-true"):
        run_cells(names, "def stays_finite")


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
    """The one run cell with this text."""
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    run_cells_only = [cell.source for cell in cells if "library" not in cell.metadata.get("tags", [])]
    [source] = [source for source in run_cells_only if inside in source]
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
    names = {"Path": Path, "USE_DRIVE": use_drive, "IN_COLAB": True, "RUN": "quick"}
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
        "os": os,
        "saved": Path("model"),
        "arms": {"LoRA": {"accuracy": 0.5}},
        "add_evaluation": lambda *given: measured.append(given),
        "push_model": lambda *given: pushed.append(given) or ["README.md"],
    }
    exec(cell_source("PUSH_TO and os").replace('PUSH_TO = ""', f"PUSH_TO = {push_to!r}"), names)
    if push_to and token:
        assert measured == [(Path("model"), "dev, LoRA", {"accuracy": 0.5})]
        assert pushed == [(Path("model"), "me/mine")]
    else:
        assert not measured and not pushed and "not pushed" in capsys.readouterr().out
    assert "hf_stand_in" not in capsys.readouterr().out
