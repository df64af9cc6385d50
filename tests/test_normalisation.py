"""However an optimizer step's rows are cut into batches, they give the gradients of one large batch."""

from pathlib import Path

import pytest
import torch
from runs import plain_descent, save_tiny_base, seen_gradients, train_tiny, trainable_weights

from smollm_trm.data.datamodule import GSM8KDataset
from smollm_trm.training.module import SmolLMTRMLightningModule

# 19 rows: two optimizer steps of 8 and one of 3.
WHOLE = {"batch_size": 8, "accumulate_grad_batches": 1}
CUT = {
    "halves": {"batch_size": 4, "accumulate_grad_batches": 2},
    "pairs": {"batch_size": 2, "accumulate_grad_batches": 4},
}
PLAN = {"lora_kwargs": {"r": 4, "dropout": 0.0}, "num_epochs": 1, "num_latents": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def trained(base: str, folder: Path, patch: pytest.MonkeyPatch, **settings) -> tuple[list[dict], dict]:
    """The gradients of every optimizer step before it was made, and the weights at the end."""
    with patch.context() as inner:
        plain_descent(inner)
        steps = seen_gradients(inner)
        _, module = train_tiny(base, folder, **{**PLAN, **settings})
    return steps, trainable_weights(module)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> list[dict]:
    """The gradients of large batches, answers alone trained on."""
    return trained(base, tmp_path_factory.mktemp("whole"), pytest.MonkeyPatch(), **WHOLE, target="answer")[0]


def largest_difference(left: dict, right: dict) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


@pytest.mark.parametrize(
    "how",
    [
        {"target": "answer"},
        {"target": "steps"},
        {"target": "steps", "supervise": "all"},
        {"target": "steps", "use_trm": False},
    ],
)
def test_accumulated_batches_give_the_gradients_of_one_large_batch(base, tmp_path, monkeypatch, how):
    whole, end = trained(base, tmp_path / "whole", monkeypatch, **WHOLE, **how)
    assert len(whole) == 3 and max(float(gradient.abs().max()) for gradient in whole[0].values()) > 1e-2
    for name, cut in CUT.items():
        parts, weights = trained(base, tmp_path / name, monkeypatch, **cut, **how)
        assert len(parts) == 3
        for step, (expected, found) in enumerate(zip(whole, parts, strict=True)):
            assert largest_difference(expected, found) < 1e-5, f"{name}, step {step}"
        assert largest_difference(end, weights) < 1e-5


@pytest.mark.parametrize("broken", ["tokens of the batch", "no share", "rows of the batch"])
def test_a_loss_that_only_knows_its_batch_would_be_seen(base, whole, tmp_path, monkeypatch, broken):
    totals, step_totals = GSM8KDataset.totals, SmolLMTRMLightningModule.step_totals
    with monkeypatch.context() as patch:
        if broken == "tokens of the batch":
            patch.setattr(GSM8KDataset, "totals", lambda *_: {})
        elif broken == "no share":
            patch.setattr(
                SmolLMTRMLightningModule,
                "step_totals",
                lambda self, batch: (batch["num_items_in_batch"], batch["num_examples_in_batch"]),
            )
        else:
            patch.setattr(
                SmolLMTRMLightningModule,
                "step_totals",
                lambda self, batch: (step_totals(self, batch)[0], len(batch["labels"])),
            )
        parts, _ = trained(base, tmp_path / "parts", patch, **CUT["halves"], target="answer")
    assert totals is GSM8KDataset.totals
    assert max(largest_difference(*pair) for pair in zip(whole, parts, strict=True)) > 1e-3


def test_a_loader_that_does_not_know_its_step_lets_every_batch_count_the_same(base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(GSM8KDataset, "totals", lambda *_: {})
        steps, _ = trained(base, tmp_path, patch, **CUT["halves"])
    assert len(steps) == 3 and all(torch.isfinite(one).all() for step in steps for one in step.values())
