"""The worst day, drawn from a seed: kills at random moments, random damage, random arguments (`make soak`).

    python tests/soak.py [--seconds 600] [--rounds N] [--seed N]

Every command runs in a fork of this process, so that the imports are paid once. What must hold: a command ends by
itself, with exit code 0, or with 2 and one line that is no traceback; it writes nothing outside its folder; and what
was killed and run again ends with the same files as if it had not been. It ends with a count; what it found stands
above, each with its seed.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork after threads have run would wait for them for ever

import torch
from runs import TINY_TRM, save_tiny_base
from twins import ROWS, SMALL_TRM

import smollm_trm.arithmetic.commands  # noqa: F401
import smollm_trm.evaluation.arms  # noqa: F401
import smollm_trm.finetune  # noqa: F401
from smollm_trm import cli
from smollm_trm.data.rows import write_jsonl
from smollm_trm.models.smollm import SmolLMv3WithTRM

CPU_SECONDS, MEMORY = 60, 24 * 2**30
HOSTILE = (
    *(
        "",
        " ",
        "-1",
        "0",
        "1",
        "1e9",
        "999999999999",
        "9" * 30,
        "nan",
        ".inf",
        "x",
        "../../x",
        "/",
        ".",
        "true",
        "null",
    ),
    *("[]", "{}", "[5]", '{"a": 1}', '{"../x": "y"}', "[" * 5000, "a\nb", "\udcff", "*", "&a", "!!x", "é", "steps"),
)
TRAIN = {
    **{"model_name": "base", "data_dir": "gsm", "output_dir": "run", "num_latents": 2, "batch_size": 4, "max_steps": 6},
    **{"trm_kwargs": TINY_TRM, "lora_kwargs": {"r": 2}, "accumulate_grad_batches": 2, "val_check_interval": 4},
    **{"save_every_n_steps": 1, "learning_rate": 3e-3, "progress": False},
}
ALONE_FIRST = {"output_dir": "alone", "target": "answer", "latents_per_step": 1, "reasoner_steps": 4}
SUMS = {
    **{
        "data_dir": "sums",
        "output_dir": "sum_run",
        "preset": "fast",
        "max_steps": 12,
        "batch_size": 8,
        "eval_steps": 4,
    },
    **{"save_steps": 3, "eval_examples": 8, "num_workers": 0, "logging_steps": 2},
}


def as_options(given: dict) -> list[str]:
    return [f"--{name}={json.dumps(one) if isinstance(one, (dict, bool)) else one}" for name, one in given.items()]


EVALUATE = [
    "evaluate",
    "model",
    *as_options({"data_dir": "gsm", "max_new_tokens": 6, "batch_size": 2, "output_dir": "ev"}),
]
KILLED = {  # a command, and the files that it must leave whatever happens
    "train": (
        ["train", *as_options(TRAIN)],
        ("run/model/model.safetensors", "run/model/adapter/adapter_model.safetensors"),
    ),
    "train, the reasoner first": (
        ["train", *as_options({**TRAIN, **ALONE_FIRST})],
        ("alone/reasoner/model/model.safetensors", "alone/model/model.safetensors"),
    ),
    "arithmetic": (["arithmetic", "train", *as_options(SUMS)], ("sum_run/model.safetensors",)),
    "evaluate": (EVALUATE, ("ev/dev-6-tokens.json",)),
    "compare": (
        ["compare", "--models.one=model", "--data_dir=gsm", "--max_samples=4", "--batch_size=2", "--output_dir=cmp"],
        ("cmp/comparison.json",),
    ),
}
QUICK = {
    "ask": ["ask", "model", "Why 1?", "--max_new_tokens=2"],
    "evaluate": ["evaluate", "model", "--data_dir=gsm", "--max_samples=2", "--max_new_tokens=2"],
    "compare": ["compare", "--models.one=model", "--data_dir=gsm", "--max_samples=2"],
    "push": ["push", "model", "me/model", "--dry_run=true"],
    "train": ["train", *as_options({**TRAIN, "max_steps": 1})],
    "arithmetic generate": ["arithmetic", "generate", "--num_examples=100", "--output_dir=new"],
    "arithmetic train": ["arithmetic", "train", *as_options({**SUMS, "max_steps": 2})],
}
CHANGING = ("seconds", "tokens_per_second", "command", "versions", "machine")  # from run to run


def prepare(folder: Path) -> None:
    """A base, a model on it, data, finished runs."""
    os.chdir(folder)
    save_tiny_base(folder / "base")
    SmolLMv3WithTRM.from_base("base", num_latents=2, reasoner_settings=SMALL_TRM).save_pretrained(folder / "model")
    config = folder / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model": "base"}))
    write_jsonl(Path("gsm/train.jsonl"), ROWS[:25])
    write_jsonl(Path("gsm/test.jsonl"), ROWS[50:])
    for arguments in (
        ["arithmetic", "generate", "--num_examples=100", "--max_digits=1", "--output_dir=sums"],
        *(command for command, _ in KILLED.values()),
    ):
        code, said = ran(folder, arguments)
        assert code == 0, said


def ran(folder: Path, arguments: list[str], *, dies: tuple[int, float] | None = None) -> tuple[int, str]:
    """Exit code (a signal is negative) and standard error of a command in a fork; it may get a signal after seconds."""
    noted = Path(os.environ["HOME"]) / "stderr"
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            for descriptor, path in ((0, os.devnull), (1, os.devnull), (2, noted)):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
            os.chdir(folder)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            cli.main(arguments)
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if dies:
        time.sleep(dies[1])
        os.kill(pid, dies[0])
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), noted.read_text(encoding="utf-8", errors="replace")


def content(path: Path) -> object:
    """What must be equal of a file: its bytes, or its figures but those of time."""
    if path.suffix != ".json":
        return path.read_bytes()
    figures = json.loads(path.read_text(encoding="utf-8"))
    return {name: value for name, value in figures.items() if name not in CHANGING}


def kill(draw: random.Random, whole: Path, folder: Path) -> str | None:
    """A command dies once or twice, by SIGKILL or Ctrl-C, and ends as the unbroken one did."""
    kind = draw.choice([*KILLED])
    arguments, files = KILLED[kind]
    for path in ("run", "sum_run", "ev", "cmp"):
        shutil.rmtree(folder / path)
    deaths = [(draw.choice((signal.SIGKILL, signal.SIGINT)), draw.uniform(0, 4)) for _ in range(draw.randint(1, 2))]
    told = f"{kind} {[(one.name, round(after, 3)) for one, after in deaths]}"
    for death in deaths:
        code, said = ran(folder, arguments, dies=death)
        if code not in (0, 130, -signal.SIGKILL) or (code == 130 and "Traceback" in said):
            return f"{told}: exit code {code}: {said[-300:]}"
    code, said = ran(folder, arguments)
    if code != 0:
        return f"{told}: run again, exit code {code}: {said[-300:]}"
    different = [name for name in files if content(folder / name) != content(whole / name)]
    return f"{told}: other files than unbroken: {different}" if different else None


def damage(draw: random.Random, whole: Path, folder: Path) -> str | None:
    """A file of a model, a base, a run or the data is damaged, and a command meets it."""
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.stat().st_size and "tensorboard" not in path.parts
    )
    path = draw.choice(files)
    text = path.suffix in (".json", ".jsonl", ".csv", ".jinja")
    old, at = path.read_bytes(), draw.randrange(path.stat().st_size)
    ways = {
        "gone": None,
        "empty": b"",
        "cut": old[:at],
        "flipped": old[:at] + bytes([old[at] ^ 1 << draw.randrange(8)]) + old[at + 1 :],
        "zeroed": bytes(len(old)),
        "nested": b"[" * 50_000,
        "noise": draw.randbytes(200),
    }
    if text:
        ways["value"] = swapped_value(draw, old)
    way = draw.choice([*ways])
    path.unlink() if ways[way] is None else path.write_bytes(ways[way])
    kind = draw.choice([*QUICK])
    return judged(f"{path.relative_to(folder)} {way} at {at}, then {kind}", folder, QUICK[kind])


def swapped_value(draw: random.Random, old: bytes) -> bytes:
    """JSON with one value changed for another kind; as it was where it is no JSON."""
    try:
        whole = json.loads(old)
    except ValueError:
        return old
    place, key = whole, None
    while isinstance(place, (dict, list)) and place:
        within, key = place, draw.choice([*place]) if isinstance(place, dict) else draw.randrange(len(place))
        place = within[key]
        if draw.random() < 0.4:
            break
    if key is not None:
        within[key] = draw.choice((None, -1, 0, 10**12, 0.5, "x", [], {}, [1], True, float("nan")))
    return json.dumps(whole).encode()


def absurd(draw: random.Random, whole: Path, folder: Path) -> str | None:
    """An option of a command gets an absurd value."""
    kind = draw.choice([*QUICK])
    parser = cli.command_parser(kind)
    options = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    left_out = (
        "--help",
        "--print_config",
        "--devices",
        "--num_nodes",
        "--wandb_project",
        "--dataset_path",
        "--num_workers",
    )
    options = [name for name in options if name not in left_out and not name.endswith("+")]
    given = f"{draw.choice(options)}={draw.choice(HOSTILE)}"
    return judged(f"{kind} {given[:80]!r}", folder, [*QUICK[kind], given])


def judged(told: str, folder: Path, arguments: list[str]) -> str | None:
    """What is wrong with how a command ended; None: nothing."""
    outside = sorted(path for path in folder.parent.iterdir())
    code, said = ran(folder, arguments)
    lines = [line for line in said.splitlines() if line.startswith("smollm-trm: ")]
    if sorted(path for path in folder.parent.iterdir()) != outside:
        return f"{told}: it wrote outside its folder"
    if code not in (0, 2) or "Traceback" in said or (code == 2 and len(lines) != 1):
        return f"{told}: exit code {code}: {said[-400:]}"
    return None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--rounds", type=int, default=10**9)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started, found, counts = time.monotonic(), [], dict.fromkeys(("kill", "damage", "absurd"), 0)
    print(f"seed {given.seed}, {given.seconds:.0f} seconds", flush=True)
    with TemporaryDirectory() as place:
        os.environ["HOME"] = place
        whole, folder = Path(place) / "whole", Path(place) / "work" / "here"
        whole.mkdir()
        folder.parent.mkdir()
        prepare(whole)
        for number in range(given.rounds):
            if time.monotonic() - started > given.seconds:
                break
            draw = random.Random(given.seed * 1_000_003 + number)
            kind = (kill, damage, absurd)[number % 3]
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(whole, folder)
            counts[kind.__name__] += 1
            if problem := kind(draw, whole, folder):
                found.append(problem)
                print(f"round {number} of seed {given.seed}: {problem}", flush=True)
        os.chdir("/")
    print(f"{counts['kill']} kills, {counts['damage']} damages, {counts['absurd']} arguments: {len(found)} found")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
