"""Callbacks that watch a run."""

import logging
from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.plugins import MixedPrecision
from torch.utils.data import DataLoader

from smollm_trm.training.loggers import quiet_lightning
from smollm_trm.training.watch import CollapseWarning, NonFiniteGuard


class Line(LightningModule):
    """y = w x under a loss that overflows fp16 where the batch says so."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.seen: list[float] = []

    def training_step(self, batch, batch_idx):
        return (self.weight * batch).sum()

    def on_train_batch_end(self, *args):
        self.seen.append(float(self.weight.detach()[0]))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit_line(batches: list[float], guard: NonFiniteGuard, **options) -> tuple[Line, Trainer]:
    line = Line()
    with quiet_lightning():
        trainer = Trainer(
            accelerator="cpu", max_epochs=1, logger=False, callbacks=[guard], enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, **options,
        )  # fmt: skip
        trainer.fit(line, DataLoader([torch.full((3,), value) for value in batches], batch_size=None))
    return line, trainer


def test_a_loss_scaler_and_the_guard_work_together():
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10)
    guard = NonFiniteGuard(limit=3)
    overflow = 3e38  # finite, but not times the scale
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    line, _ = fit_line([overflow, 1.0, overflow, 1.0], guard, plugins=[plugin])
    assert line.seen[0] == 1.0 != line.seen[1] == line.seen[2] != line.seen[3]
    assert scaler.get_scale() == 2.0**8 and (guard.total, guard.in_a_row) == (2, 0)


def test_gradients_are_measured_as_they_are_not_as_the_scaler_has_them():
    guard, norms = NonFiniteGuard(), []
    guard_step = guard.on_before_optimizer_step

    def see(trainer, pl_module, optimizer):
        norms.append(float(torch.nn.utils.get_total_norm([pl_module.weight.grad])))
        guard_step(trainer, pl_module, optimizer)

    guard.on_before_optimizer_step = see
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10)
    fit_line([2.0], guard, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    assert norms == [pytest.approx(12**0.5)]


def test_a_spoiled_half_of_an_accumulation_leaves_the_step_out():
    line, _ = fit_line([1.0, float("nan"), 1.0, 1.0], NonFiniteGuard(limit=3), accumulate_grad_batches=2)
    assert line.seen[0] == line.seen[1] == line.seen[2] == 1.0 != line.seen[3]


def test_the_guard_gives_up_after_its_limit_in_a_row_and_not_before():
    bad = float("inf")
    fit_line([bad, bad, 1.0, bad, bad], NonFiniteGuard(limit=3))
    with pytest.raises(FloatingPointError, match="gradients of 3 steps in a row were not finite: lower learning_rate"):
        fit_line([1.0, bad, bad, bad, 1.0], NonFiniteGuard(limit=3))


# Collapse


def watch(variations: list[float | None], caplog) -> list[str]:
    callback = CollapseWarning(threshold=1e-3, after=2)
    for step, variation in enumerate(variations):
        figures = {} if variation is None else {"latent_variation": torch.tensor(variation)}
        callback.on_train_batch_end(SimpleNamespace(callback_metrics=figures, global_step=step), None)
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_collapsed_latents_are_told_once_with_the_settings_that_help(caplog):
    messages = watch([0.0, 0.0, 0.5, 0.0005, 0.0], caplog)
    assert len(messages) == 1 and "variation 0.0005 at step 3" in messages[0]
    for setting in ("trm_learning_rate", "warmup_fraction", "branch_scale"):
        assert setting in messages[0]


def test_where_no_variation_is_logged_nothing_is_told(caplog):
    assert watch([None] * 5, caplog) == []
