"""What the study trains and asks: a base, the arms on it, their learning rates, and one run from start to grades."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from smollm_trm import finetune
from smollm_trm.data.answers import annotations_in
from smollm_trm.data.gsm8k import load_gsm8k
from smollm_trm.data.word_stories import WordProblemSettings
from smollm_trm.demo import DemoSize, demo_settings, length_of
from smollm_trm.evaluation.arms import evaluate_arm
from smollm_trm.evaluation.evaluate import evaluate_gsm8k
from smollm_trm.evaluation.halting import judge_halting
from smollm_trm.models.generation import encode_prompts
from smollm_trm.models.reasoners.reasoner import latent_variation
from smollm_trm.records import write_json
from smollm_trm.training.module import SmolLMTRMLightningModule
from smollm_trm.training.reasoner_first import ReasonerFirstModule

PROBLEMS = WordProblemSettings(max_steps=4, max_number=10, max_value=30, distractor_rate=0.0)
SIZE = DemoSize(problems=PROBLEMS, train_problems=72_000, test_problems=2000, base_steps=3400, arm_steps=800)
BASE_RATE, BASE_BATCH = 3e-3, 16
N_STEPS = PROBLEMS.max_steps
PER_STEP = 2  # latents for the result of a step: two digits at most
NUM_LATENTS = PER_STEP * N_STEPS
TRM: dict[str, Any] = {"n_latent_steps": 3, "n_deep_recursions": 1, "n_supervision_steps": 2}
ASKED_STEPS = (1, 2, 4, 8)  # supervision steps at test time: half to four times as many as trained
FIRST = "TRM first, word mixtures"  # half of the steps the TRM alone, then as many with LoRA
MORE_STEPS = ("TRM", "TRM, word mixtures", FIRST)  # arms that are asked with other numbers of supervision steps
COUNT = "cpu_seconds.json"
AT_ONCE: dict[str, Any] = {"target": "answer", "num_latents": NUM_LATENTS, "latents_per_step": PER_STEP}
STAGES = N_STEPS + 1  # the first step left out, the first two, three, all; and once more all
IN_STAGES: dict[str, Any] = {"first_stage": 1, "epochs_per_stage": 1, "num_epochs": STAGES}
CURRICULUM = {**IN_STAGES, "mode": "coconut", "c_thought": PER_STEP, "max_latent_stage": N_STEPS}
CURRICULUM["reset_optimizer"] = True
ARMS: dict[str, dict[str, Any]] = {
    "LoRA": {**AT_ONCE, "use_trm": False},
    "pause": {**AT_ONCE, "reasoner": "pause"},
    "static": {**AT_ONCE, "reasoner": "static"},
    "compressor": {**AT_ONCE, "reasoner": "compressor"},
    "TRM": {**AT_ONCE, "reasoner": "trm", "trm_kwargs": TRM},
    "TRM, word mixtures": {**AT_ONCE, "reasoner": "trm", "trm_kwargs": {**TRM, "soft_words": True}},
    FIRST: {**AT_ONCE, "reasoner": "trm", "trm_kwargs": {**TRM, "soft_words": True}},
    "iCoT": {**IN_STAGES, "mode": "icot", "use_trm": False},
    "Coconut": {**CURRICULUM, "reasoner": "coconut"},
    "TRM, curriculum": {**CURRICULUM, "reasoner": "trm", "trm_kwargs": TRM},
}
"""What each arm is. The compressor and the TRM are asked for the results of unwritten steps, but for curricula."""
CORE = ("LoRA", "static", "compressor", "TRM")
AS_LONG = ("LoRA", "compressor", "Coconut")  # also trained for the TRM's computing time
LORA = {"r": 32, "alpha": 64, "dropout": 0.0, "target_modules": "all-linear"}
GRID = (1.5e-3, 3e-3, 6e-3)
REASONER_RATE = 1.5  # a reasoner's learning rate, as a multiple of LoRA's
WARMUP = 0.2
CHOSEN: dict[str, float] = dict.fromkeys(ARMS, 3e-3)
"""LoRA's learning rate of each arm: the best dev loss of the grid, in runs of a third of the length on seed 0. Where
that lies at the grid's edge, the better of it and its neighbour in the whole length."""
OTHER_RATES = {"static": 6e-3, "iCoT": 6e-3}  # those edges, which were worse


class CountsSeconds(SmolLMTRMLightningModule):
    """Counts the CPU seconds of its training steps, those of earlier sessions too."""

    counted = 0.0
    began: float | None = None

    @property
    def cpu_seconds(self) -> float:
        """So far."""
        return self.counted + (0.0 if self.began is None else time.process_time() - self.began)

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """A step begins."""
        super().on_train_batch_start(batch, batch_idx)
        self.began = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        """A step ends."""
        self.counted, self.began = self.cpu_seconds, None

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Keep the count."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["cpu_seconds"] = self.cpu_seconds

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Take it up again; a run begun without counts from here."""
        super().on_load_checkpoint(checkpoint)
        self.counted = checkpoint.get("cpu_seconds", 0.0)


class CountsSecondsAlone(CountsSeconds, ReasonerFirstModule):
    """The same of the reasoner alone, the reading of its questions included; the count stays in its folder."""

    def on_train_end(self) -> None:
        """Leave the count."""
        super().on_train_end()
        write_json(Path(self.trainer.default_root_dir) / COUNT, {"cpu_seconds": self.cpu_seconds})


@dataclass(frozen=True)
class Job:
    """One run, and what it is asked when it is trained."""

    settings: dict[str, Any]
    asked: bool = True  # the held-out problems; else only its dev loss counts
    asked_steps: Sequence[int] = ()  # supervision steps that it is also asked with


def base_settings(folder: Path, *, seed: int) -> dict[str, Any]:
    """The base's run, trained whole to write its chain."""
    return {
        **demo_settings(folder / "data", SIZE, seed=seed),
        **length_of(SIZE.base_steps, BASE_BATCH),
        "batch_size": BASE_BATCH,
        "model_name": "tiny",
        "base_training": "full",
        "use_trm": False,
        "learning_rate": BASE_RATE,
        "save_every_n_steps": 250,
        "progress": False,
        "output_dir": str(folder / "base"),
    }


def arm_settings(
    folder: Path, arm: str, *, seed: int, steps: int, rate: float | None = None, **changes: Any
) -> dict[str, Any]:
    """An arm's run on the base, in a folder named by what decides it; a curriculum makes `steps` over all its stages.

    Arms without a curriculum read every problem once, the others as many steps of rows once a stage; where the TRM is
    first alone, that takes half of the steps, and LoRA and it read the same problems again in the other half.
    """
    rate = CHOSEN[arm] if rate is None else rate
    settings = {
        **demo_settings(folder / "data", SIZE, seed=seed),
        **length_of(steps, SIZE.batch_size),
        **ARMS[arm],
        "learning_rate": rate,
        "trm_learning_rate": REASONER_RATE * rate,
        "warmup_fraction": WARMUP,
        "save_every_n_steps": 250,
        "model_name": str(folder / "base" / "model"),
        "lora_kwargs": LORA,
        "progress": False,
        **changes,
    }
    if arm == FIRST:
        alone = steps // 2
        settings |= {**length_of(steps - alone, SIZE.batch_size), "reasoner_steps": alone}
    if (epochs := settings["num_epochs"]) == STAGES:
        settings |= {"max_samples": steps // epochs * SIZE.batch_size, "max_steps": steps // epochs * epochs}
        settings["val_check_interval"] = 1.0
    told = [f"{key}_{value}" for key, value in changes.items()]
    stem = "_".join([arm.replace(", ", "_").replace(" ", "_").lower(), str(steps), f"{rate:g}", *told])
    return {**settings, "output_dir": str(folder / stem)}


def steps_needed(row: Mapping[str, str]) -> int:
    """How many steps a problem's solution has."""
    return len(annotations_in(row["answer"]))


def finished(job: Job) -> dict[str, Any] | None:
    """The figures of a run that is trained and asked; None where it is not."""
    done = Path(job.settings["output_dir"]) / "asked.json"
    found = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}
    return found["figures"] if found.get("job") == json.loads(json.dumps(asdict(job))) else None


def train_and_ask(job: Job) -> dict[str, Any]:
    """One run from training to its graded answers; what is finished is only read."""
    torch.set_num_threads(1)
    folder = Path(job.settings["output_dir"])
    if (found := finished(job)) is not None:
        return found
    with patch.object(finetune, "ReasonerFirstModule", CountsSecondsAlone):
        _, module = finetune.train_gsm8k(**job.settings, module_class=CountsSeconds)
    training = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    figures: dict[str, Any] = {name: training[name] for name in ("dev_loss", "best_step", "optimizer_steps")}
    counts = [json.loads(file.read_text(encoding="utf-8")) for file in folder.glob(f"{finetune.ALONE}/{COUNT}")]
    seconds = module.cpu_seconds + sum(count["cpu_seconds"] for count in counts)
    figures |= {"cpu_seconds": round(seconds, 1), "wall_seconds": training["seconds"]}
    if job.asked:
        rows = load_gsm8k(job.settings["data_dir"], seed=job.settings["seed"]).gsm8k_final_test
        figures |= ask(job, module.model, rows, folder / "predictions")
    write_json(folder / "asked.json", {"job": asdict(job), "figures": figures})
    print(f"{folder.name}: {told(figures)}", flush=True)
    return figures


def ask(job: Job, model: Any, rows: Sequence[Mapping[str, str]], folder: Path) -> dict[str, Any]:
    """A trained arm's answers: as they are, with other problems' latents, with other numbers of supervision steps, and
    stopped one by one by its halting head."""
    options = {"batch_size": 250, "seed": job.settings["seed"], "progress": False}
    results = evaluate_arm("arm", model, rows, folder, **options)
    grades = {"own": results["arm"]["correct_by_problem"]}
    figures: dict[str, Any] = {"cut_off": results["arm"]["cut_off"]}
    if len(results) > 1:
        [grades["shuffled"]] = [one["correct_by_problem"] for name, one in results.items() if name != "arm"]
        figures["latent_variation"] = held_out_variation(model, [row["question"] for row in rows[:256]])
    for n_steps in job.asked_steps:
        if n_steps != model.reasoner.n_supervision_steps:
            path = folder / f"steps_{n_steps}.jsonl"
            one = evaluate_gsm8k(model, rows, n_steps=n_steps, predictions_path=path, **options)
            grades[f"{n_steps} steps"] = one["correct_by_problem"]
    if (halting := judge_halting(model, rows, grades["own"])) is not None:
        figures["halting"] = halting
        stopped = evaluate_gsm8k(model, rows, halting=True, predictions_path=folder / "halting.jsonl", **options)
        grades["halting"] = stopped["correct_by_problem"]
    return {**figures, "grades": {name: "".join("01"[bool(one)] for one in given) for name, given in grades.items()}}


@torch.no_grad()
def held_out_variation(model: Any, questions: Sequence[str]) -> float:
    """How much the latents of these questions differ, see `latent_variation`."""
    budget = {"max_new_tokens": 1, "context_length": model.config.max_position_embeddings}
    model.eval()
    return round(float(latent_variation(model.latents_for(*encode_prompts(model.encoder, questions, **budget)))), 4)


def told(figures: Mapping[str, Any]) -> str:
    """A finished run in a line."""
    grades = {name: 100 * given.count("1") / len(given) for name, given in figures.get("grades", {}).items()}
    scores = "".join(f", {name} {share:.1f}%" for name, share in grades.items())
    return f"dev loss {figures['dev_loss']:.4f}, {figures['cpu_seconds']:.0f} CPU-s{scores}"
