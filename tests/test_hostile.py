"""The worst day: what is damaged, malicious or absurd gets one line, writes nothing elsewhere and runs nothing.

A table of inputs and the line that each gets; `make soak` draws more of the kind from a seed, for ten minutes.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from processes import ended, started
from runs import save_tiny_base, train_tiny
from safetensors.torch import load_file
from transformers import PreTrainedConfig
from twins import ROWS, SMALL_TRM

from smollm_trm import cli
from smollm_trm.data.rows import check_row, read_json_list, read_jsonl, write_jsonl
from smollm_trm.evaluation.arms import arm_stems
from smollm_trm.evaluation.loading import problems_of
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.records import UserMistake, remove_path, write_whole

DEEP = "[" * 100_000
DEV = {"accuracy": 0.25, "correct": 5, "total": 20, "interval": [0.11, 0.47]}
BOMB = "a: &a [x]\n" + "".join(f"b{n}: &b{n} [*b{n - 1}, *b{n - 1}]\n" for n in range(1, 40)).replace("*b0", "*a")
TRAIN = ["train", "--model_name", "tiny", "--data_dir", "nowhere"]


def refusal(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and len(error) < 1200, error
    return error


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["ask", "x", "Why \udcff?"], "it holds bytes that are not UTF-8 text"),
        (["train", "--output_dir", "\udcff"], "it holds bytes that are not UTF-8 text"),
        (["ask", "x", "Why?", "--temperature", "-1"], "temperature=-1.0"),
        (["ask", "x", "Why?", "--max_new_tokens", "0"], "max_new_tokens=0"),
        (["ask", "x", "Why?", "--prompt_format", "poem"], "prompt_format='poem': choose 'plain' or 'chat'"),
        (["evaluate", "x", "--batch_size", "0"], "batch_size=0: must be at least 1"),
        (["evaluate", "x", "--samples_per_problem", "0"], "samples_per_problem=0: must be at least 1"),
        (["evaluate", "x", "--latents", "mixed"], "latents='mixed': choose 'own' or 'shuffled'"),
        (["evaluate", "x", "--shots", "-1"], "shots=-1: must be at least 0"),
        (["evaluate", "x", "--output_dir", ""], "output_dir: it is empty"),
        (["compare", "--models", '{"../../x": "y"}'], "the arm '../../x' names files"),
        (["compare", "--models", '{"": "y"}'], "the arm '' names files"),
        (["compare", "--models", '{"a|b\\n": "y"}'], "names files"),
        (["compare", "--models", '{"TRM": "y", "trm": "z"}'], "the arms 'TRM' and 'trm' would share a file"),
        (["compare", "--models", '{"a": "y", "a shuffled": "z"}'], "'a' and 'a shuffled' would share a file"),
        (["compare", "--models", '{"a": "y"}', "--baseline", "b"], "baseline='b': choose one of the arms, a"),
        (["push", "x", "a/b/c", "--dry_run", "true"], "repo_id='a/b/c': no name that the Hub takes"),
        (["push", "x", "me/what?", "--dry_run", "true"], "no name that the Hub takes"),
        (["push", "x", "model", "--dry_run", "true"], "no name that the Hub takes"),
        ([*TRAIN, "--output_dir", ""], "output_dir: it is empty"),
        ([*TRAIN, "--lora_kwargs.target_modules=[5]"], "target_modules=[5] must be list[str] | str | None"),
        ([*TRAIN, "--lora_kwargs.target_modules=[]"], "target_modules=[]: name layers in a list"),
        ([*TRAIN, "--lora_kwargs.r=99999999999999999999"], "r=99999999999999999999 must be int, found no finite"),
        ([*TRAIN, "--trm_kwargs.dim=65536", "--trm_kwargs.n_layers=64"], "training the reasoner is too large"),
        ([*TRAIN, "--trm_kwargs.branch_scale=-1"], "branch_scale=-1: must be above 0"),
        ([*TRAIN, "--trm_kwargs.gain=.nan"], "gain"),
        ([*TRAIN, "--reasoner", "static", "--trm_kwargs.n_layers=2"], "trm_kwargs of the reasoner 'static': unknown"),
        ([*TRAIN, "--seed=99999999999999999999999"], "must be int, found no finite number"),
        ([*TRAIN, "--seed=-1"], "seed=-1: must be at least 0"),
        ([*TRAIN, "--seed=99999999999999"], "seed=99999999999999: must be at most 1099511627776"),
        ([*TRAIN, "--max_length=1000000000000"], "max_length=1000000000000: must be at most 1048576"),
        ([*TRAIN, "--max_steps=99999999999999999999999"], "found no finite number"),
        ([*TRAIN, "--strategy", "nope"], "strategy='nope': choose 'ddp'"),
        ([*TRAIN, "--trm_kwargs", DEEP], "more brackets than a setting has"),
        (["arithmetic", "generate", "--digit-order", "sideways"], "digit_order='sideways': choose one of"),
        (["arithmetic", "generate", "--max-operands", "1000000000"], "max_operands=1000000000: must be at most"),
        (["arithmetic", "generate", "--max-length", "1000000000000"], "max_length=1000000000000: must be"),
        (["arithmetic", "generate", "--output-dir", ""], "output_dir: it is empty"),
    ],
    ids=lambda part: str(part)[-60:] if isinstance(part, list) else "",
)
def test_an_absurd_argument_is_refused_before_anything_is_loaded(arguments, line, capsys):
    assert line in refusal(arguments, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_half_precision_on_a_cpu_is_refused(capsys):
    assert "precision='16-mixed' needs a GPU" in refusal([*TRAIN, "--precision", "16-mixed"], capsys)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (BOMB.encode(), "aliases and more than 20 levels are refused"),
        (b"a: " + DEEP.encode(), "aliases and more than 20 levels are refused"),
        (b"\xff\xfe\x00\x01", "settings.yaml: not a YAML file that can be read"),
        (b"a: [", "settings.yaml, line 1: not a YAML file that can be read"),
        (b"- 1\n", "expected settings, one `name: value` a line, found list"),
        (b"a: !!python/object/apply:os.mkdir [ran]\n", "could not determine a constructor"),
        (b"num_latnets: 4\n", "Option 'num_latnets' is not accepted; did you mean num_latents?"),
    ],
)
def test_a_settings_file_that_is_a_trap_is_one_line(content, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("settings.yaml").write_bytes(content)
    assert line in refusal(["train", "--config", "settings.yaml"], capsys) and not Path("ran").exists()
    assert line in refusal(["train", "--config=settings.yaml"], capsys)


@pytest.mark.parametrize(
    ("content", "reader", "line"),
    [
        (DEEP, read_jsonl, "line 1: not valid JSON"),
        (DEEP, read_json_list, "not valid JSON"),
        ("[" + "9" * 5000 + "]", read_json_list, "not valid JSON"),
        ('{"question": "\\ud800", "answer": "#### 1"}', read_jsonl, "holds half a character"),
        ('{"prompt": "?", "answer": "#### 1"}', read_jsonl, "'question' is missing; .* found 'prompt', 'answer'"),
    ],
)
def test_a_data_file_that_is_a_trap_is_one_line(content, reader, line, tmp_path):
    (tmp_path / "rows").write_text(content)
    with pytest.raises(UserMistake, match=line) as refused:
        [check_row(row, where="row") for _, row in reader(tmp_path / "rows")]
    assert "\n" not in str(refused.value)


# A model and its base, each file of them damaged


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    base = save_tiny_base(folder / "base")
    SmolLMv3WithTRM.from_base(base, num_latents=2, reasoner_settings=SMALL_TRM).save_pretrained(folder / "model")
    return folder


def set_values(**values):
    """A damage: other values at places of a JSON file, such as text_config__hidden_size."""

    def damage(path: Path) -> None:
        content = json.loads(path.read_text())
        for place, value in values.items():
            *outer, last = place.split("__")
            within = content
            for name in outer:
                within = within[name]
            within[last] = value
        path.write_text(json.dumps(content))

    return damage


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def nest(path: Path) -> None:
    path.write_text(DEEP)


def pickle_instead(path: Path) -> None:
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()


@pytest.mark.parametrize(
    ("file", "damage", "line"),
    [
        ("base/model.safetensors", halve, "could not load the weights of .*base': .*header"),
        ("base/model.safetensors", pickle_instead, "pickled weights are not read; convert them once"),
        ("base/config.json", nest, "could not load the configuration of .*base'"),
        ("base/config.json", set_values(hidden_size="x"), "could not load the configuration of .*base'"),
        ("base/config.json", set_values(num_attention_heads=0), "could not load the weights of .*base'"),
        ("base/config.json", set_values(model_type="odd", auto_map={"AutoConfig": "evil.A"}), "which is not run"),
        ("base/tokenizer.json", halve, "could not load the tokenizer of .*base'"),
        ("base/tokenizer_config.json", Path.unlink, "base.*tokenizer"),
        ("base/generation_config.json", nest, "could not load the weights of .*base'"),
        ("model/config.json", nest, "could not load the configuration of .*model'"),
        ("model/config.json", set_values(text_config__hidden_size="x"), "config.json: not a configuration of this pro"),
        ("model/config.json", set_values(text_config__layer_types=[]), "config.json: not a configuration of this pro"),
        ("model/config.json", set_values(notes__training=3), "notes' training is no object"),
        ("model/config.json", set_values(reasoner_settings__dim=65536, reasoner_settings__n_layers=64), "too large"),
        ("model/config.json", set_values(reasoner_settings__branch_scale=float("nan")), "branch_scale=nan must be"),
        ("model/model.safetensors", halve, "model.safetensors cannot be read"),
        ("model/tokenizer.json", halve, "could not load the tokenizer of .*model'"),
        ("model/adapter/adapter_config.json", set_values(r="x"), "adapter: the adapter cannot be read"),
        ("model/adapter/adapter_config.json", set_values(target_modules=[5]), "adapter: the adapter cannot be read"),
        ("model/adapter/adapter_config.json", nest, "adapter: the adapter cannot be read"),
        ("model/adapter/adapter_model.safetensors", halve, "adapter: the adapter cannot be read"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_model_or_its_base_is_one_line(file, damage, line, whole, tmp_path, capsys, monkeypatch):
    shutil.copytree(whole, tmp_path / "w")
    set_values(base_model=str(tmp_path / "w" / "base"))(tmp_path / "w" / "model" / "config.json")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    damage(tmp_path / "w" / file)
    error = refusal(["ask", str(tmp_path / "w" / "model"), "Why?", "--max_new_tokens", "1"], capsys)
    assert re.search(line, error), error


@pytest.mark.parametrize("name", ["target", "prompt_format"])
def test_how_a_base_is_asked_is_not_for_a_saved_model(name, whole, capsys):
    value = {"target": "answer", "prompt_format": "plain"}[name]
    error = refusal(["ask", str(whole / "model"), "Why?", f"--{name}", value], capsys)
    assert f"{name}='{value}' is for an untuned base: " in error and "a saved model, asked as it was trained" in error


def test_a_bases_own_code_runs_by_the_users_word_alone(whole, tmp_path, monkeypatch, capsys):
    shutil.copytree(whole, tmp_path / "w")
    base, model = str(tmp_path / "w" / "base"), str(tmp_path / "w" / "model")
    set_values(auto_map={"AutoModelForCausalLM": "own.Own"})(tmp_path / "w" / "base" / "config.json")
    own = "from transformers import SmolLM3ForCausalLM\nopen({!r}, 'w').close()\nclass Own(SmolLM3ForCausalLM): pass\n"
    (tmp_path / "w" / "base" / "own.py").write_text(own.format(str(tmp_path / "ran")))
    set_values(base_model=base)(tmp_path / "w" / "model" / "config.json")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    ask, train = ["Why?", "--max_new_tokens", "1"], [*TRAIN, "--load_model_path", model]
    word = ["--trust_remote_code", "true"]
    assert "trust_remote_code=True is for an untuned base" in refusal(["ask", model, *ask, *word], capsys)
    assert "trust_remote_code=True is for --model_name" in refusal([*train, *word], capsys)
    with pytest.raises(UserMistake, match="only the saved model names that base"):
        SmolLMv3WithTRM.from_pretrained(model, trust_remote_code=True)
    cli.main(["ask", base, *ask])
    assert not (tmp_path / "ran").exists()
    cli.main(["ask", base, *ask, *word])
    assert (tmp_path / "ran").exists()
    SmolLMv3WithTRM.from_pretrained(model, model_name=base, trust_remote_code=True)


def test_a_copy_of_the_bases_shape_beside_the_reasoner_changes_nothing(whole, tmp_path):
    shutil.copytree(whole / "model", tmp_path / "model")
    changes = {"tie_word_embeddings": False, "eos_token_id": 3, "text_config__rms_norm_eps": 0.5}
    set_values(**changes)(tmp_path / "model" / "config.json")
    model, same = (SmolLMv3WithTRM.from_pretrained(place / "model") for place in (tmp_path, whole))
    ids = torch.tensor([model.encoder.encode_prompt("Why?")])
    assert torch.equal(model(ids).logits, same(ids).logits)
    assert model.config.tie_word_embeddings is same.config.tie_word_embeddings
    assert model.config.text_config.rms_norm_eps == same.config.text_config.rms_norm_eps


def test_where_the_hub_does_not_answer_nothing_is_judged(monkeypatch, tmp_path):
    def silent(name: str) -> None:
        raise OSError("connection refused")

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", silent)
    write_jsonl(tmp_path / "rows.jsonl", ROWS[:30])
    with pytest.raises(UserMistake, match="me/model: .*connection refused.*not known what it was trained on"):
        problems_of("dev", data_dir=None, dataset_path=str(tmp_path / "rows.jsonl"), seed=1, models=["me/model"])


def test_arms_get_files_of_their_own():
    names = ["base, writing its chain", "LoRA", "LoRA + TRM", "λ-1.5"]
    assert arm_stems(names) == ["base,_writing_its_chain", "lora", "lora_and_trm", "λ-1.5"]


# A run: its folder, its files, its end


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("finished")
    base = save_tiny_base(folder / "base")
    train_tiny(base, folder / "run", num_epochs=1)
    return base, folder / "run"


def test_a_finished_run_repairs_its_model(finished, tmp_path):
    base, run = finished
    shutil.copytree(run, tmp_path / "run")
    model, (results, evaluations) = tmp_path / "run" / "model", (tmp_path / "run" / "results.json", {"dev": DEV})
    set_values(notes__evaluations=evaluations)(model / "config.json")
    weights = {name: (model / name).read_bytes() for name in ("model.safetensors", "adapter/adapter_model.safetensors")}
    damages = {
        "weights": lambda: (model / "model.safetensors").write_bytes(b""),
        "adapter": lambda: (model / "adapter" / "adapter_model.safetensors").unlink(),
        "tokenizer": lambda: (model / "tokenizer.json").write_bytes(b""),
        "one bit": lambda: flip_a_bit(model / "model.safetensors"),
        "results": lambda: results.write_text("{"),
        "configuration": lambda: (model / "config.json").write_bytes(b""),
        "everything": lambda: shutil.rmtree(model),
    }
    for name, damage in damages.items():
        damage()
        train_tiny(base, tmp_path / "run", num_epochs=1)
        assert weights == {name: (model / name).read_bytes() for name in weights}
        notes = json.loads((model / "config.json").read_text())["notes"]
        assert notes.get("evaluations") == (None if name in ("configuration", "everything") else evaluations)
        assert json.loads(results.read_text())["optimizer_steps"] == 3
    before = {path: path.stat().st_mtime_ns for path in model.rglob("*")}
    train_tiny(base, tmp_path / "run", num_epochs=1)
    assert before == {path: path.stat().st_mtime_ns for path in model.rglob("*")}, "what is whole is left alone"


def test_a_second_run_in_a_folder_is_refused_and_a_dead_one_is_not_in_the_way(finished, tmp_path):
    base, run = finished
    shutil.copytree(run, tmp_path / "run")
    program = f"import fcntl, sys; f = open({str(tmp_path / 'run' / '.lock')!r}, 'ab'); fcntl.lockf(f, fcntl.LOCK_EX)\n"
    program += "print('held', flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserMistake, match="another run is writing there; wait"):
            train_tiny(base, tmp_path / "run", num_epochs=1)
        other.kill()
    train_tiny(base, tmp_path / "run", num_epochs=1)
    with open(tmp_path / "run" / ".lock", "ab") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_ctrl_c_keeps_the_step_under_way(finished, tmp_path, monkeypatch):
    base, _ = finished
    from smollm_trm.training.module import SmolLMTRMLightningModule

    train_step, calls = SmolLMTRMLightningModule.training_step, []

    def interrupted(self, batch, batch_idx):
        calls.append(batch_idx)
        if len(calls) == 3:  # the first batch of the second accumulated step
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(self, batch, batch_idx)

    monkeypatch.setattr(SmolLMTRMLightningModule, "training_step", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as it is where a user sits
    with pytest.raises(KeyboardInterrupt, match="stopped; step 2 is kept, and the same command goes on from there"):
        train_tiny(base, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt")] == ["step-2.ckpt"]
    assert len(calls) == 4 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    train_tiny(base, tmp_path / "run")
    train_tiny(base, tmp_path / "unbroken")
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        broken, unbroken = ((tmp_path / run / "model" / name).read_bytes() for run in ("run", "unbroken"))
        assert broken == unbroken


def test_ctrl_c_before_any_checkpoint_promises_none(finished, tmp_path, monkeypatch):
    from smollm_trm.training.module import SmolLMTRMLightningModule

    def at_once(self, batch, batch_idx):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(SmolLMTRMLightningModule, "training_step", at_once)
    with pytest.raises(KeyboardInterrupt, match="stopped before the first checkpoint: nothing is kept"):
        train_tiny(finished[0], tmp_path / "run")


def test_a_backup_that_shares_a_removed_file_stays_whole(tmp_path):
    (tmp_path / "file").write_text("12345")
    os.link(tmp_path / "file", tmp_path / "backup")
    remove_path(tmp_path / "file")
    assert (tmp_path / "backup").read_text() == "12345" and not (tmp_path / "file").exists()


def test_files_and_the_folders_that_hold_them_are_flushed(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda one: flushed.append(os.readlink(f"/proc/self/fd/{one}")) or fsync(one))

    def write(folder: Path) -> None:
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "file").write_text("x")

    for _ in range(2):
        flushed.clear()
        write_whole(tmp_path / "model", write)
        assert [Path(one).name for one in flushed][0] == "inner" and Path(flushed[-1]) == tmp_path
        assert any(one.endswith("inner/file") for one in flushed) and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("given", "registers"),
    [(["-m", "smollm_trm", "--help"], False), (["-m", "other"], True), (["-c", "import other"], True)],
)
def test_only_the_command_line_starts_without_the_auto_classes(given, registers, tmp_path):
    (tmp_path / "other.py").write_text("import smollm_trm")
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")  # found first: whether it is imported is all we ask
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, *given], env=environment, capture_output=True, cwd=tmp_path)
    assert done.returncode == (7 if registers else 0)


def test_ctrl_c_before_a_command_begins_is_a_line(monkeypatch, capsys):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("logging.basicConfig", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare"])
    assert stop.value.code == 130 and capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_while_the_command_line_is_imported_is_no_traceback(tmp_path):
    (tmp_path / "yaml.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    places = [str(tmp_path), str(Path(cli.__file__).parents[1])]
    program = f"import runpy, sys; sys.path[:0] = {places!r}; sys.argv = ['smollm-trm']; "
    program += "runpy.run_module('smollm_trm', run_name='__main__')"
    default = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    done = subprocess.run([sys.executable, "-c", default + program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and done.stderr == ""


def few_rounds(noted: str) -> None:
    """What runs in a process of its own."""
    import soak
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True  # read from the environment before this function began
    with open(noted, "w") as said, redirect_stdout(said):
        soak.main(["--rounds", "6", "--seed", "7"])


def test_a_few_rounds_of_what_make_soak_draws_for_ten_minutes(tmp_path):
    process = started("test_hostile", "few_rounds", str(tmp_path / "said"))
    code, said = ended(process), (tmp_path / "said").read_text()
    assert code == 0 and "2 kills, 2 damages, 2 arguments: 0 found" in said, said
