"""What a training run does to the weights, and what it leaves behind."""

import csv
import json
import logging
import math
import os
import re
import signal
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import Logger
from runs import (
    DEV_ROWS,
    ROWS,
    TINY_TRM,
    bend_dev_loss,
    first_difference,
    newest_checkpoint,
    save_tiny_base,
    train_tiny,
    trainable_weights,
)
from torch.utils.data import DataLoader

from smollm_trm.data.datamodule import GSM8KDataModule
from smollm_trm.data.gsm8k import GSM8KSplits
from smollm_trm.evaluation.evaluate import evaluate_gsm8k
from smollm_trm.evaluation.predictions import load_predictions
from smollm_trm.finetune import train_gsm8k, uncounted
from smollm_trm.models.generation import Completion
from smollm_trm.models.reasoners.known import REASONERS
from smollm_trm.training.checkpoints import BestAndLatest
from smollm_trm.training.loggers import build_loggers
from smollm_trm.training.module import SmolLMTRMLightningModule
from smollm_trm.training.optim import OptimizerSettings, build_optimizer, build_schedule
from smollm_trm.training.parts import (
    build_data,
    build_module,
    check_fits,
    describe_run,
    gather_splits,
    pick_intervals,
    pick_precision,
)
from smollm_trm.training.run import begin_run
from smollm_trm.training.settings import TrainSettings
from smollm_trm.training.watch import NonFiniteGuard

# The dev loss is made to rise after step 5: the run ends early, and its best checkpoint is not its last.
BEST_STEP = 5
RUN = {
    "learning_rate": 0.1,
    "trm_learning_rate": 0.05,
    "gradient_clip": 0.01,
    "num_epochs": 6,
    "patience": 2,
    "val_check_interval": 2,
    "ema_decay": 0.4,
}


@dataclass
class Watched:
    """A run and what was seen of it from inside."""

    folder: Path
    base: str
    trainer: Any = None
    module: Any = None
    start: dict = field(default_factory=dict)
    steps: list[dict] = field(default_factory=list)
    """After each optimizer step: raw weights, rates and gradient norm."""
    validated: dict[int, dict] = field(default_factory=dict)
    """By optimizer step, the weights that a validation used."""
    messages: list[str] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, str]]:
        with open(self.folder / "logs" / "metrics.csv", newline="") as file:
            return list(csv.DictReader(file))

    def column(self, name: str) -> dict[int, float]:
        return {int(row["step"]): float(row[name]) for row in self.rows if row[name]}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def watched(base, tmp_path_factory) -> Watched:
    run = Watched(folder=tmp_path_factory.mktemp("run"), base=base)
    batch_end, validate = BestAndLatest.on_train_batch_end, SmolLMTRMLightningModule.validation_step
    fit_start = BestAndLatest.on_fit_start

    def see_start(self, trainer, pl_module):
        run.start = trainable_weights(pl_module)
        fit_start(self, trainer, pl_module)

    def see_step(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > len(run.steps):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            run.steps.append(
                {
                    "weights": trainable_weights(pl_module),
                    "rates": {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups},
                    "norm": float(torch.nn.utils.get_total_norm(gradients)),
                }
            )
        batch_end(self, trainer, pl_module, outputs, batch, batch_idx)

    def see_validation(self, batch, batch_idx):
        run.validated[self.trainer.global_step] = trainable_weights(self)
        validate(self, batch, batch_idx)

    handler = logging.Handler()
    handler.emit = lambda record: run.messages.append(record.getMessage())
    talkers = [logging.getLogger(name) for name in (None, "pytorch_lightning", "lightning_fabric")]
    logging.getLogger("smollm_trm").setLevel(logging.INFO)  # as the command has it
    with pytest.MonkeyPatch.context() as patch:
        bend_dev_loss(patch, best_step=BEST_STEP)
        patch.setattr(BestAndLatest, "on_fit_start", see_start)
        patch.setattr(BestAndLatest, "on_train_batch_end", see_step)
        patch.setattr(SmolLMTRMLightningModule, "validation_step", see_validation)
        for talker in talkers:
            talker.addHandler(handler)
        with warnings.catch_warnings(record=True) as caught:
            run.trainer, run.module = train_tiny(base, run.folder, **RUN)
        for talker in talkers:
            talker.removeHandler(handler)
    run.messages += [str(warning.message) for warning in caught]
    return run


# The weight average


def averages_by_hand(run: Watched) -> list[dict]:
    average, history = run.start, []
    for step, seen in enumerate(run.steps):
        decay = min(RUN["ema_decay"], (1 + step) / (10 + step))
        average = {name: decay * old + (1 - decay) * seen["weights"][name] for name, old in average.items()}
        history.append(average)
    return history


def largest_difference(left: dict, right: dict) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def test_the_average_is_updated_once_per_optimizer_step_and_matches_a_hand_computation(watched):
    checkpoint = newest_checkpoint(watched.folder)
    average = checkpoint["callbacks"]["AverageWeights"]
    assert average["steps"] == checkpoint["global_step"] == len(watched.steps) > 6
    assert largest_difference(average["averages"], averages_by_hand(watched)[-1]) < 1e-5


def test_validation_uses_the_averaged_weights(watched):
    by_hand = averages_by_hand(watched)
    assert len(watched.validated) > 3
    for step, weights in watched.validated.items():
        assert largest_difference(weights, by_hand[step - 1]) < 1e-5
        assert largest_difference(weights, watched.steps[step - 1]["weights"]) > 1e-3


def test_a_checkpoint_written_after_a_validation_holds_the_raw_weights(watched):
    checkpoint = newest_checkpoint(watched.folder)
    raw = watched.steps[checkpoint["global_step"] - 1]["weights"]
    assert checkpoint["global_step"] in watched.validated
    assert all(torch.equal(checkpoint["state_dict"][name], weight) for name, weight in raw.items())


def test_the_returned_model_is_the_average_with_the_best_dev_loss(watched):
    result = json.loads((watched.folder / "results.json").read_text())
    losses = watched.column("dev_loss")
    best = min(losses, key=losses.get) + 1
    assert result["best_step"] == best == BEST_STEP < result["optimizer_steps"]
    assert result["dev_loss"] == pytest.approx(min(losses.values()))
    assert largest_difference(trainable_weights(watched.module), averages_by_hand(watched)[best - 1]) < 1e-5
    assert not watched.module.training


# The optimizer


def base_parameters(model) -> list[torch.nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if ".reasoner." not in name]


def test_rates_are_separate_and_follow_warm_up_and_cosine_in_optimizer_steps(watched):
    total = 6 * 3  # epochs, optimizer steps of an epoch
    for step, seen in enumerate(watched.steps, start=1):
        warmup = 0.1 * total
        if step < warmup:
            factor = (step + 1) / (warmup + 1)
        else:
            factor = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
        assert seen["rates"]["lora"] == pytest.approx(0.1 * factor)
        assert seen["rates"]["reasoner"] == seen["rates"]["reasoner_no_decay"] == pytest.approx(0.05 * factor)


@pytest.mark.parametrize(("total", "warmup"), [(100, 0.1), (7, 0.25), (18, 0.0), (5, 1.0), (1, 0.1)])
def test_the_learning_rate_begins_low_peaks_after_the_warm_up_and_ends_at_its_final_share(total, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    settings = OptimizerSettings(warmup_fraction=warmup)
    schedule, factors = build_schedule(optimizer, total_steps=total, settings=settings), []
    for _ in range(total + 1):
        factors.append(schedule.get_last_lr()[0] / 2.0)
        optimizer.step()
        schedule.step()
    climb, by_hand = warmup * total, []
    for step in range(total + 1):
        if step < climb:
            by_hand.append((step + 1) / (climb + 1))
        else:
            progress = (step - climb) / max(1, total - climb)
            by_hand.append(0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
    assert factors == pytest.approx(by_hand, rel=1e-12)
    assert max(factors) == pytest.approx(1.0, abs=0.1) and factors[0] > 0


def test_the_gradient_is_clipped_and_logged_as_it_was_before(watched):
    assert all(seen["norm"] <= RUN["gradient_clip"] * 1.001 for seen in watched.steps)
    assert min(watched.column("grad_norm").values()) > 2 * RUN["gradient_clip"]


def test_weight_decay_is_on_matrices_only(watched):
    model = watched.module.model
    optimizer = build_optimizer(
        base=base_parameters(model), reasoner=model.reasoner, settings=OptimizerSettings(weight_decay=0.5)
    )
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trainable} == decays.keys()
    assert all(decays[id(p)] == (0.5 if p.ndim >= 2 else 0.0) for p in trainable)
    assert {p.ndim for p in trainable} >= {0, 1, 2}


def test_the_recursions_rate_is_divided_by_the_calls_that_its_gradient_goes_through(watched):
    model = watched.module.model
    settings = OptimizerSettings(learning_rate=1e-4, trm_learning_rate=1e-2)
    optimizer = build_optimizer(base=base_parameters(model), reasoner=model.reasoner, settings=settings)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    tied = {id(p) for p in model.reasoner.recursion.parameters()}
    assert {rates[one] for one in tied} == {1e-2 / (model.reasoner.recursion.n_latent_steps + 1)}
    assert {rates[id(p)] for p in model.reasoner.parameters() if id(p) not in tied} == {1e-2}
    assert {rates[id(p)] for p in base_parameters(model) if p.requires_grad} == {1e-4}


def test_the_reasoner_learns_five_times_as_fast_as_the_adapter_unless_told_otherwise(watched):
    model = watched.module.model
    optimizer = build_optimizer(
        base=base_parameters(model), reasoner=model.reasoner, settings=OptimizerSettings(learning_rate=1e-3)
    )
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["reasoner"] == rates["reasoner_no_decay"] == 5 * rates["lora"] == 5e-3
    assert TrainSettings(learning_rate=1e-3).optimizer_settings().reasoner_learning_rate == 5e-3
    assert TrainSettings(learning_rate=1e-3, trm_learning_rate=1e-4).optimizer_settings().reasoner_learning_rate == 1e-4


# What the run leaves


def test_the_run_stops_early_when_the_dev_loss_does_not_improve(watched):
    losses = list(watched.column("dev_loss").values())
    waits, best = 0, math.inf
    for number, loss in enumerate(losses, start=1):
        waits, best = (0, loss) if loss < best else (waits + 1, best)
        assert (waits == RUN["patience"]) == (number == len(losses))


def test_the_newest_two_checkpoints_and_the_best_are_kept(watched):
    steps = sorted(int(path.stem.split("-")[1]) for path in (watched.folder / "checkpoints").iterdir())
    result = json.loads((watched.folder / "results.json").read_text())
    validated = sorted(watched.validated)
    assert set(steps) == {*validated[-2:], result["best_step"]} and len(steps) == 3


def test_checkpoints_hold_nothing_of_the_base(watched):
    checkpoint = newest_checkpoint(watched.folder)
    model = watched.module.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    buffers = sum(buffer.numel() for buffer in model.reasoner.buffers())
    assert not any("base_layer" in name or "embed_tokens" in name for name in checkpoint["state_dict"])
    assert sum(tensor.numel() for tensor in checkpoint["state_dict"].values()) == trained + buffers
    largest = max(path.stat().st_size for path in (watched.folder / "checkpoints").iterdir())
    assert largest < 4 * (4 * trained + buffers) + 120_000  # weights, average, two moments; and names


def test_the_csv_has_every_figure(watched):
    wanted = {"train_loss", "dev_loss", "grad_norm", "lr-AdamW/lora", "lr-AdamW/reasoner", "tokens_per_second"}
    for name in wanted | {"latent_variation"}:
        assert watched.column(name) and all(math.isfinite(value) for value in watched.column(name).values()), name
    assert list(watched.column("train_loss")) == list(range(len(watched.steps)))


def test_the_run_says_nothing_but_what_matters(watched):
    [summary] = watched.messages
    assert summary.startswith("training ") and summary.endswith(str(watched.folder))


def test_the_progress_shows_losses_and_remaining_time(base, tmp_path, capfd):
    train_tiny(base, tmp_path, progress=True, num_epochs=1)
    last = [line for line in capfd.readouterr().err.splitlines() if line.startswith("trained")][-1]
    assert " 3/3 [" in last and "train_loss=" in last and "dev_loss=" in last and ("step/s" in last or "s/step" in last)


# Going on


def test_a_finished_run_returns_its_model_without_training(watched, monkeypatch):
    results = (watched.folder / "results.json").read_bytes()
    rows = watched.rows
    monkeypatch.setattr(SmolLMTRMLightningModule, "training_step", lambda *args: pytest.fail("it trained"))
    monkeypatch.setattr(SmolLMTRMLightningModule, "validation_step", lambda *args: pytest.fail("it validated"))
    trainer, module = train_tiny(watched.base, watched.folder, **RUN)
    assert first_difference(trainable_weights(module), trainable_weights(watched.module)) is None
    assert (watched.folder / "results.json").read_bytes() == results and watched.rows == rows
    assert trainer.global_step == len(watched.steps)


def test_a_finished_run_goes_on_where_max_steps_is_raised_with_a_course_of_its_own(base, tmp_path, monkeypatch, caplog):
    names = ("model/model.safetensors", "model/adapter/adapter_model.safetensors")
    caplog.set_level(logging.INFO, "smollm_trm")
    rates = {}
    for folder, raises in (("unbroken", (14,)), ("broken", (14, 14))):
        settings = {"num_epochs": 1, "patience": 1, "save_every_n_steps": 1, "warmup_fraction": 0.25}
        train_tiny(base, tmp_path / folder, **settings)  # 3 steps, by its epochs
        with pytest.raises(ValueError, match="holds a run with max_steps=-1, now it is 2"):
            train_tiny(base, tmp_path / folder, **settings, max_steps=2)
        for n, most in enumerate(raises):
            with monkeypatch.context() as patch:
                if n < len(raises) - 1:
                    step = SmolLMTRMLightningModule.training_step
                    dying = lambda self, *args: step(self, *args) if self.global_step < 9 else 1 / 0  # noqa: E731, B023
                    patch.setattr(SmolLMTRMLightningModule, "training_step", dying)
                with suppress(ZeroDivisionError):
                    trainer, _ = train_tiny(base, tmp_path / folder, **settings, max_steps=most, progress=True)
        assert trainer.global_step == 14
        with open(tmp_path / folder / "logs" / "metrics.csv", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["lr-AdamW/lora"]]
        rates[folder] = {int(row["step"]): float(row["lr-AdamW/lora"]) for row in rows}
    assert "ended at step 3: it goes on to step 14, with a new warm-up and cosine" in caplog.text
    assert re.search(r"s a step: about 00:0\d for the \d+ steps that are left", caplog.text)
    settings = OptimizerSettings(learning_rate=3e-3, warmup_fraction=0.25)
    course = build_schedule(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3), total_steps=11, settings=settings
    )
    expected = [3e-3 * course.lr_lambdas[0](step + 1) for step in range(11)]
    assert [rates["unbroken"][step] for step in range(3, 14)] == pytest.approx(expected)
    for name in names:
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()


def test_without_a_latent_span_its_settings_may_change(base, tmp_path):
    def resumed(**settings: Any) -> Path | None:
        chosen = TrainSettings(model_name=base, output_dir=str(tmp_path), **settings)
        return begin_run(describe_run(chosen), asdict(chosen), may_change=uncounted(chosen)).checkpoint

    resumed(use_trm=False)
    (tmp_path / "results.json").write_text("{}")
    unused = {"num_latents": 4, "trm_kwargs": {"dim": 8}, "reasoner": "static", "trm_learning_rate": 0.1}
    assert resumed(use_trm=False, **unused, supervise="all") is None
    for change, name in (({"use_trm": False, "lora_kwargs": {"r": 3}}, "lora_kwargs"), ({}, "use_trm")):
        with pytest.raises(ValueError, match=f"holds a run with {name}="):
            resumed(**change)


@pytest.mark.parametrize("change", [{"learning_rate": 0.2}, {"num_latents": 4}, {"trm_kwargs": {**TINY_TRM, "dim": 8}}])
def test_other_settings_are_refused_by_name(watched, change):
    with pytest.raises(ValueError, match=f"holds a run with {next(iter(change))}=.*resume='never'"):
        train_tiny(watched.base, watched.folder, **{**RUN, **change})


def test_other_rows_are_refused(watched):
    with pytest.raises(ValueError, match="holds a run with split="):
        train_tiny(watched.base, watched.folder, train_dataset=ROWS[30:49], **RUN)


def test_a_checkpoint_of_another_configuration_is_one_clear_line(watched, tmp_path):
    newest = next((watched.folder / "checkpoints").iterdir())
    for change, reason in (
        ({"lora_kwargs": {"r": 3}}, "has shape"),
        ({"reasoner": "static", "trm_kwargs": {}}, "model.model.reasoner.* is missing"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            train_tiny(watched.base, tmp_path / reason[:8], resume=str(newest), **change)
        assert "another configuration" in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_of_another_folder_is_gone_on_with_and_a_finished_one_is_refused(base, tmp_path, monkeypatch):
    bend_dev_loss(monkeypatch, best_step=2)
    train_tiny(base, tmp_path / "one", num_epochs=1, val_check_interval=2)
    middle, last = (tmp_path / "one" / "checkpoints" / f"step-{step}.ckpt" for step in (2, 3))
    with pytest.raises(ValueError, match="step-2.ckpt is missing: resume a run that has ended in its own output_dir"):
        train_tiny(base, tmp_path / "two", num_epochs=2, resume=str(last))
    trainer, _ = train_tiny(base, tmp_path / "three", num_epochs=1, val_check_interval=2, resume=str(middle))
    result = json.loads((tmp_path / "three" / "results.json").read_text())
    assert trainer.global_step == result["best_step"] == 3 and math.isfinite(result["dev_loss"])


def test_a_second_save_keeps_what_the_first_noted(watched, tmp_path):
    watched.module.model.save_pretrained(tmp_path)
    noted = json.loads((tmp_path / "config.json").read_text())["notes"]["training"]
    assert noted["best_step"] == BEST_STEP and len(noted["split"]["fingerprint"]) == 64


def test_the_run_notes_device_and_precision(watched):
    results = json.loads((watched.folder / "results.json").read_text())
    assert (results["device"], results["precision"]) == ("cpu", "float32")


def test_resume_never_starts_anew(base, tmp_path):
    train_tiny(base, tmp_path, num_epochs=2)
    train_tiny(base, tmp_path, num_epochs=1, resume="never")
    with open(tmp_path / "logs" / "metrics.csv", newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert newest_checkpoint(tmp_path)["global_step"] == 3 and steps == [0, 1, 2]
    assert json.loads((tmp_path / "results.json").read_text())["epochs"] == 1


def test_a_run_ends_with_a_validation_however_it_ends(base, tmp_path):
    train_tiny(base, tmp_path, num_epochs=5, max_steps=4, val_check_interval=1000)
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint["global_step"] == checkpoint["callbacks"]["BestAndLatest"]["best_step"] == 4


# Bad luck


def spoil(monkeypatch, batches: range) -> None:
    """Make the loss of these batches (counted over the run) not a number."""
    step, seen = SmolLMTRMLightningModule.training_step, iter(range(10_000))
    nan = float("nan")
    monkeypatch.setattr(
        SmolLMTRMLightningModule,
        "training_step",
        lambda self, batch, index: step(self, batch, index) * (nan if next(seen) in batches else 1.0),
    )


def test_steps_with_gradients_that_are_not_finite_are_left_out_and_counted(base, tmp_path, monkeypatch):
    spoil(monkeypatch, range(2, 3))  # the first half of the second optimizer step
    weights = []
    batch_end = BestAndLatest.on_train_batch_end

    def see(self, trainer, pl_module, *rest):
        if trainer.global_step > len(weights):
            weights.append(trainable_weights(pl_module))
        batch_end(self, trainer, pl_module, *rest)

    monkeypatch.setattr(BestAndLatest, "on_train_batch_end", see)
    train_tiny(base, tmp_path, num_epochs=1)
    assert first_difference(weights[0], weights[1]) is None and first_difference(weights[1], weights[2]) is not None
    with open(tmp_path / "logs" / "metrics.csv", newline="") as file:
        counted = {int(row["step"]): row["nonfinite_steps"] for row in csv.DictReader(file) if row["grad_norm"]}
    assert counted == {0: "", 1: "1.0", 2: "1.0"}


def test_a_loss_that_stays_nan_ends_the_run_with_advice(base, tmp_path, monkeypatch):
    spoil(monkeypatch, range(4, 10_000))
    monkeypatch.setitem(NonFiniteGuard.__init__.__kwdefaults__, "limit", 3)
    with pytest.raises(FloatingPointError, match="3 steps in a row.*lower learning_rate.*bf16-mixed") as caught:
        train_tiny(base, tmp_path, num_epochs=3)
    assert "\n" not in str(caught.value)


def test_a_dev_loss_that_is_nan_ends_the_run_with_advice(base, tmp_path, monkeypatch):
    monkeypatch.setattr(
        SmolLMTRMLightningModule,
        "validation_step",
        lambda self, batch, index: self.log("dev_loss", torch.tensor(float("nan")), batch_size=1),
    )
    with pytest.raises(FloatingPointError, match="dev_loss is nan: lower learning_rate"):
        train_tiny(base, tmp_path, num_epochs=1)


def test_out_of_memory_names_the_settings_that_help(base, tmp_path, monkeypatch):
    def burst(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(SmolLMTRMLightningModule, "training_step", burst)
    with pytest.raises(RuntimeError, match="^out of memory: set gradient_checkpointing=True, then lower batch_size"):
        train_tiny(base, tmp_path)


def test_ctrl_c_stays_a_keyboard_interrupt_and_can_be_pressed_again(base, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)

    def press(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(SmolLMTRMLightningModule, "training_step", press)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(base, tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_an_output_folder_that_cannot_be_is_one_clear_line(base, tmp_path):
    (tmp_path / "file").write_text("here first")
    with pytest.raises(OSError, match="could not write .*settings.json: .*choose another output folder") as caught:
        train_tiny(base, tmp_path / "file" / "run")
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_half_written(base, tmp_path, monkeypatch):
    save, saved = torch.save, []

    def fill_disk(checkpoint, path):
        if saved:
            Path(path).write_bytes(b"PK half")
            raise OSError(28, "No space left on device")
        save(checkpoint, path)
        saved.append(path)

    monkeypatch.setattr(torch, "save", fill_disk)
    with pytest.raises(OSError, match="could not write .*step-2.ckpt: No space left on device; free some") as caught:
        train_tiny(base, tmp_path, save_every_n_steps=1)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "checkpoints") == ["step-1.ckpt"]
    monkeypatch.undo()
    trainer, _ = train_tiny(base, tmp_path, save_every_n_steps=1)
    assert trainer.global_step == 6


# Parts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trm_kwargs": {"n_heads": 7}}, "n_heads=7 must divide the width"),
        ({"trm_kwargs": {"dim": 100}}, "must divide the width 100|width 100|dim 100|100"),
        ({"trm_kwargs": {**TINY_TRM, "compression_heads": 3}}, "heads"),
        ({"reasoner": "compressor", "trm_kwargs": {"compression_heads": 7}}, "heads"),
    ],
)
@pytest.mark.parametrize("place", ["base", "tiny"])
def test_what_cannot_be_is_refused_before_rows_and_weights_are_loaded(base, place, change, message, monkeypatch):
    monkeypatch.setattr("smollm_trm.finetune.gather_splits", lambda *_: pytest.fail("it loaded the rows"))
    with pytest.raises(ValueError, match=message) as caught:
        train_gsm8k(model_name=base if place == "base" else "tiny", output_dir="never", **change)
    assert "\n" not in str(caught.value) and not Path("never").exists()


def test_what_fits_is_let_through_without_a_draw_and_a_baseline_is_not_looked_at(base):
    state = torch.get_rng_state()
    for name, heads in ((base, 2), ("tiny", 8)):
        for reasoner in REASONERS:
            own = {"compression_heads": heads} if reasoner in ("trm", "compressor") else {}
            slots = {"num_latents": 1} if reasoner == "sequence_trm" else {}
            own |= {"d_compressed": 16} if slots else {}
            check_fits(TrainSettings(model_name=name, trm_kwargs=own, reasoner=reasoner, **slots))
    assert torch.equal(state, torch.get_rng_state())
    check_fits(TrainSettings(model_name="nowhere", use_trm=False, num_latents=512))
    with pytest.raises(ValueError, match="no config.json in that folder"):
        check_fits(TrainSettings(model_name="./nowhere"))


class StandInForWandb(Logger):
    """Lightning's `WandbLogger` as far as a run uses it: it joins a run of the process that is still open."""

    open_run: dict | None = None
    runs: list[dict] = []

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options, self._experiment = options, None

    name = version = "wandb"

    @property
    def experiment(self) -> Any:
        kind = type(self)
        if self._experiment is None:
            if kind.open_run is None:
                kind.open_run = self.options
                kind.runs.append(self.options)
            self._experiment = SimpleNamespace(finish=lambda: setattr(kind, "open_run", None))
        return self._experiment

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        assert self.experiment and self.open_run is self.options, "it lands in another run"

    def log_hyperparams(self, *args: Any, **options: Any) -> None:
        pass


def test_every_run_at_wandb_is_one_of_its_own_and_one_for_all_its_sessions(base, tmp_path, monkeypatch):
    kind = type("WandbLogger", (StandInForWandb,), {"runs": [], "open_run": None})
    monkeypatch.setenv("WANDB_API_KEY", "a key")
    monkeypatch.setattr("pytorch_lightning.loggers.WandbLogger", kind)
    monkeypatch.chdir(tmp_path)
    options = {"wandb_project": "project", "num_epochs": 1}
    for folder, seed in (("one", 1), ("two", 1), (tmp_path / "one", 1), ("three", 2)):
        train_tiny(base, Path(folder), seed=seed, **options)
        assert kind.open_run is None, "it was not finished"
    first, second, again, third = (run["id"] for run in kind.runs)
    assert first == again and len({first, second, third}) == 3
    assert all(run["resume"] == "allow" and run["project"] == "project" for run in kind.runs)
    monkeypatch.setattr(SmolLMTRMLightningModule, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_tiny(base, tmp_path / "four", **options)
    assert kind.open_run is None and len(kind.runs) == 5


def test_no_logger_ever_asks_for_a_key(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("it asked"))
    loggers = build_loggers(tmp_path, first_step=0, wandb=("project", None), seed=0)
    assert [type(logger).__name__ for logger in loggers] == ["KeptCSVLogger", "TensorBoardLogger"]
    assert "WANDB_API_KEY is not" in caplog.text


def test_a_key_without_wandb_itself_costs_a_message_only(tmp_path, monkeypatch, caplog):
    def missing(**_):
        raise ModuleNotFoundError("wandb")

    monkeypatch.setenv("WANDB_API_KEY", "a key")
    monkeypatch.setattr("pytorch_lightning.loggers.WandbLogger", missing)
    assert len(build_loggers(tmp_path, first_step=0, wandb=("project", None), seed=0)) == 2
    assert "wandb is not installed: losses go to" in caplog.text and "a key" not in caplog.text


def test_more_devices_than_gpus_are_refused_before_anything_is_loaded(base, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"^devices=2: this machine has 1 GPU\(s\)$"):
        train_tiny("nowhere", tmp_path, devices=2)


@pytest.mark.parametrize(
    ("interval", "n_batches", "expected"),
    [
        (1.0, 10, (1.0, 1)),
        (0.5, 10, (4, None)),
        (0.25, 2989, (744, None)),
        (0.01, 10, (4, None)),
        (7, 10, (4, None)),
        (1, 3, (1.0, 1)),
        (30, 10, (1.0, 3)),
    ],
)
def test_validations_fall_on_optimizer_steps(interval, n_batches, expected):
    settings = TrainSettings(val_check_interval=interval, accumulate_grad_batches=4)
    found = pick_intervals(settings, n_batches)
    assert (found["val_check_interval"], found.get("check_val_every_n_epoch")) == expected


@pytest.mark.parametrize(
    ("capability", "expected"), [((9, 0), "bf16-mixed"), ((8, 0), "bf16-mixed"), ((7, 5), "16-mixed")]
)
def test_precision_goes_by_the_gpus_capability(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)  # a T4 says so too
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert pick_precision("auto")[0] == expected


@pytest.mark.parametrize("base_training", ["lora", "full"])
def test_what_is_trained_is_fp32_and_a_frozen_base_is_not(base, base_training):
    settings = TrainSettings(model_name=base, base_training=base_training, num_latents=2, progress=False)
    splits = gather_splits(settings, ROWS[:4], ROWS[4:6])
    module = build_module(settings, splits, torch.bfloat16)
    dtypes = {True: set(), False: set()}
    for parameter in module.parameters():
        dtypes[parameter.requires_grad].add(parameter.dtype)
    assert dtypes[True] == {torch.float32}
    assert dtypes[False] == ({torch.bfloat16} if base_training == "lora" else set())


def test_bf16_trains(base, tmp_path):
    train_tiny(base, tmp_path, num_epochs=1, precision="bf16-mixed")
    assert 0 < json.loads((tmp_path / "results.json").read_text())["dev_loss"] < 10


def test_every_seed_has_the_same_split_unless_told_otherwise():
    def fingerprint(**changes) -> str:
        return gather_splits(TrainSettings(**changes), ROWS, None).fingerprint

    assert fingerprint(seed=1) == fingerprint(seed=2) != fingerprint(split_seed=1)


def test_annotations_are_trained_on_where_they_are_kept(base):
    for keep in (False, True):
        settings = TrainSettings(model_name=base, num_latents=2, keep_annotations=keep, trm_kwargs=TINY_TRM)
        splits = gather_splits(settings, ROWS[:4], ROWS[4:6])
        module = build_module(settings, splits, torch.float32)
        data = build_data(settings, splits, module)
        text = module.model.tokenizer.decode(data.train_set.examples[0].completion)
        assert ("<<" in text) is keep and module.model.config.keep_annotations is keep


# The official evaluation


def test_trainer_test_agrees_with_evaluate_gsm8k(watched, monkeypatch):
    rows, module = ROWS[36:43], watched.module
    splits = GSM8KSplits(
        gsm8k_train=DEV_ROWS, gsm8k_test=DEV_ROWS, gsm8k_final_test=rows, seed=0, source="rows", fingerprint="f" * 64,
        duplicates=0,
    )  # fmt: skip
    data = GSM8KDataModule(encoder=module.model.encoder, splits=splits, eval_batch_size=3)
    written = {row["question"]: f"#### {index}" if index % 2 else row["answer"] for index, row in enumerate(rows)}
    asked = []

    def answer(self, questions, *, max_new_tokens, **options):
        asked.append(max_new_tokens)
        return [Completion(text=written[question], n_tokens=3, cut_off=False) for question in questions]

    real = evaluate_gsm8k(module.model, rows, progress=False)["accuracy"]
    assert watched.trainer.test(module, datamodule=data, verbose=False)[0]["test_accuracy"] == pytest.approx(real)
    kept = watched.folder / "evaluation" / "trainer_test.json"
    report = json.loads(kept.read_text())
    assert (report["part"], report["total"], report["accuracy"]) == ("test", 7, real)
    assert report["split"]["fingerprint"] == "f" * 64 and report["device"] == "cpu" and report["versions"]
    assert load_predictions(kept.with_suffix(".jsonl"))["correct_by_problem"] == report["correct_by_problem"]
    kept.with_suffix(".jsonl").unlink()
    monkeypatch.setattr(type(module.model), "generate_with_thinking", answer)
    expected = evaluate_gsm8k(module.model, rows, progress=False)
    found = watched.trainer.test(module, datamodule=data, verbose=False)[0]["test_accuracy"]
    assert found == pytest.approx(expected["accuracy"]) == pytest.approx(4 / 7)
    longest = max(len(module.model.encoder.encode_completion(row["answer"])) for row in rows)
    assert len(set(asked)) == 1 and asked[0] >= longest


def test_the_official_evaluation_computes_as_every_other_does(watched, tmp_path, monkeypatch):
    seen = []

    def evaluated(model, rows, **options):
        seen.append(torch.is_autocast_enabled("cpu"))
        return evaluate_gsm8k(model, rows, progress=False)

    monkeypatch.setattr("smollm_trm.finetune.evaluate_gsm8k", evaluated)
    quiet = {"logger": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, precision="bf16-mixed", **quiet)
    trainer.test(watched.module, dataloaders=DataLoader([ROWS[36:38]], batch_size=None), verbose=False)
    assert seen == [False]


def test_a_test_in_several_batches_keeps_them_apart(watched, tmp_path):
    module = watched.module
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False)
    found = trainer.test(module, dataloaders=DataLoader([ROWS[36:38], ROWS[38:41]], batch_size=None), verbose=False)
    reports = [json.loads(path.read_text()) for path in sorted((tmp_path / "evaluation").glob("*.json"))]
    assert [report["total"] for report in reports] == [2, 3]
    assert found[0]["test_accuracy"] == pytest.approx(sum(report["correct"] for report in reports) / 5)


def test_own_data_has_no_official_test(watched):
    splits = gather_splits(TrainSettings(), ROWS[:4], ROWS[4:6])
    data = GSM8KDataModule(encoder=watched.module.model.encoder, splits=splits)
    with pytest.raises(ValueError, match="given rows has no test part: evaluate it with evaluate_gsm8k"):
        watched.trainer.test(watched.module, datamodule=data, verbose=False)
