"""Training with two processes: what test_two_processes.py runs in both of them."""

import json
from pathlib import Path

import pytest
import torch
from runs import DEV_ROWS, ROWS, plain_descent, seen_gradients, train_tiny

from smollm_trm.data.datamodule import GSM8KDataModule
from smollm_trm.data.gsm8k import GSM8KSplits
from smollm_trm.models.generation import Completion

# 19 rows in batches of 2 and 2: the last batch has 3 rows, one process gets 2 of them. The dev part has 5 rows in
# batches of 2 and 2: of its last batch's single row, one process gets none. Its number of supervised tokens is odd.
PLAN = {
    "test_dataset": DEV_ROWS[1:6],
    "lora_kwargs": {"r": 4, "dropout": 0.0},
    "num_epochs": 2,
    "val_check_interval": 4,
    "save_every_n_steps": 2,
}
SHARED = {**PLAN, "devices": 2, "batch_size": 2, "eval_batch_size": 2}
ALONE = {**PLAN, "devices": 1, "batch_size": 4, "eval_batch_size": 4}
FIRST = {"target": "answer", "latents_per_step": 1, "reasoner_steps": 2, "max_steps": 1, "val_check_interval": 1.0}
WHOLE = {**ALONE, "batch_size": 8, "accumulate_grad_batches": 1, "val_check_interval": 2}


def main(base: str, output: str) -> None:
    patch = pytest.MonkeyPatch()
    plain_descent(patch)
    gradients = seen_gradients(patch)
    trainer, module = train_tiny(base, Path(output), **SHARED)
    torch.save(gradients, Path(output) / f"gradients-{trainer.global_rank}.pt")
    rows = ROWS[36:41]
    splits = GSM8KSplits(
        gsm8k_train=DEV_ROWS, gsm8k_test=DEV_ROWS, gsm8k_final_test=rows, seed=0, source="rows", fingerprint="",
        duplicates=0,
    )  # fmt: skip
    data = GSM8KDataModule(encoder=module.model.encoder, splits=splits, eval_batch_size=2)
    right = {row["question"]: row["answer"] for row in rows[:4]}
    asked: list[str] = []

    def answer(questions: list[str], **options) -> list[Completion]:
        asked.extend(questions)
        return [Completion(text=right.get(one, "no idea"), n_tokens=3, cut_off=False) for one in questions]

    module.model.generate_with_thinking = answer
    accuracy = trainer.test(module, datamodule=data, verbose=False)[0]["test_accuracy"]
    figures = {
        "accuracy": accuracy,
        "asked": asked,
        "strategy": type(trainer.strategy).__name__,
        "weights": {name: p.tolist() for name, p in module.named_parameters() if name.endswith(("gain", "bias"))},
    }
    rank = trainer.global_rank
    _, module = train_tiny(base, Path(output) / "reasoner_first", **{**SHARED, **FIRST})
    figures["reasoner_first"] = {name: p.tolist() for name, p in module.model.reasoner.named_parameters()}
    (Path(output) / f"process-{rank}.json").write_text(json.dumps(figures))
