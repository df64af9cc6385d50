"""A training run small enough for a test: the real `train_gsm8k` on a handful of word problems."""

from pathlib import Path
from typing import Any

import pytest
import torch
from twins import ROWS, make_tokenizer

from smollm_trm.data.batching import LengthGroupedBatches
from smollm_trm.finetune import train_gsm8k
from smollm_trm.models.tiny import build_tiny_model
from smollm_trm.training.module import SmolLMTRMLightningModule
from smollm_trm.training.watch import NonFiniteGuard

TRAIN_ROWS, DEV_ROWS = ROWS[:19], ROWS[19:25]
TINY_TRM = {
    "n_layers": 1,
    "n_heads": 2,
    "n_latent_steps": 1,
    "n_deep_recursions": 2,
    "n_supervision_steps": 3,
    "compression_heads": 2,
    "dim": 16,
}
TINY_RUN = {
    "num_latents": 3,
    "trm_kwargs": TINY_TRM,
    "lora_kwargs": {"r": 4},
    "batch_size": 4,
    "num_epochs": 2,
    "accumulate_grad_batches": 2,
    "learning_rate": 3e-3,
    "progress": False,
}


def save_tiny_base(folder: Path) -> str:
    """A base model on disk, loaded as any other is."""
    tokenizer = make_tokenizer()
    base = build_tiny_model(tokenizer, hidden_size=32, n_layers=2, n_heads=4, intermediate_size=48)
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def train_tiny(model_name: str, output_dir: Path, **changes: Any):
    """`train_gsm8k` with the settings above; 5 batches and 3 optimizer steps an epoch."""
    given = {"train_dataset": TRAIN_ROWS, "test_dataset": DEV_ROWS, **TINY_RUN, **changes}
    return train_gsm8k(model_name=model_name, output_dir=str(output_dir), **given)


def bend_dev_loss(patch: pytest.MonkeyPatch, *, best_step: int) -> None:
    """Let the dev loss rise with the distance from an optimizer step, whatever the model learns."""
    log_mean = SmolLMTRMLightningModule.log_mean

    def log_bent(self: SmolLMTRMLightningModule, name: str, mean: torch.Tensor, count: int) -> None:
        log_mean(self, name, mean + abs(self.trainer.global_step - best_step), count)

    patch.setattr(SmolLMTRMLightningModule, "log_mean", log_bent)


def plain_descent(patch: pytest.MonkeyPatch) -> None:
    """Train by plain gradient descent on rows in a fixed order, so that runs whose gradients agree stay together.

    (Adam divides by a gradient's size: of two that are nothing but rounding it makes steps of full length. The order
    within an epoch depends on how long the rows of a batch are.)
    """

    def in_order(self: LengthGroupedBatches) -> list[list[int]]:
        rows, size = list(range(len(self.lengths))), self.batch_size * self.world_size
        return [rows[at : at + size] for at in range(0, len(rows), size)]

    patch.setattr(LengthGroupedBatches, "global_batches", in_order)
    patch.setattr("torch.optim.AdamW", lambda groups, betas: torch.optim.SGD(groups))


def seen_gradients(patch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """A list that gets the gradients of every optimizer step, as they are before they are clipped."""
    steps: list[dict[str, torch.Tensor]] = []
    guard_step = NonFiniteGuard.on_before_optimizer_step

    def see(self: NonFiniteGuard, trainer: Any, pl_module: SmolLMTRMLightningModule, optimizer: Any) -> None:
        named = pl_module.named_parameters()
        steps.append({name: p.grad.detach().clone() for name, p in named if p.grad is not None})
        guard_step(self, trainer, pl_module, optimizer)

    patch.setattr(NonFiniteGuard, "on_before_optimizer_step", see)
    return steps


def newest_checkpoint(output_dir: Path) -> dict[str, Any]:
    newest = max((output_dir / "checkpoints").glob("step-*.ckpt"), key=lambda path: int(path.stem.split("-")[1]))
    return torch.load(newest, weights_only=True)


def trainable_weights(module: SmolLMTRMLightningModule) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def first_difference(left: Any, right: Any, path: str = "") -> str | None:
    """Where two nests of dicts, lists, tensors and numbers differ bit for bit; None if nowhere."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        pairs = [(key, left[key], right[key]) for key in left]
    elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)) and len(left) == len(right):
        pairs = [(index, *pair) for index, pair in enumerate(zip(left, right, strict=True))]
    elif isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return None if torch.equal(left, right) else path
    else:
        return None if left == right else f"{path}: {left!r} against {right!r}"
    return next((found for key, *both in pairs if (found := first_difference(*both, f"{path}.{key}"))), None)
