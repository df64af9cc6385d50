"""Both phases in one model: a base is taught to read true states, then the predicted one takes their place.

A final hidden state in an embedding's place means nothing to a base that never read one. So LoRA is trained, for some
hundreds of steps, to answer at once from the question and the *true* state after thinking; the recursion, which takes
no part in that, gives the state from then on. What the model answers with true, predicted, mean and other problems'
states says which of the two steps loses what (`phases compare`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smollm_trm.data.answers import extract_strict_answer
from smollm_trm.data.datamodule import GSM8KDataset, ResumableLoader
from smollm_trm.data.gsm8k import split_fingerprint
from smollm_trm.models.dimension import base_fingerprint
from smollm_trm.models.reasoners.reasoner import Thought
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.storage import local_model_folder
from smollm_trm.phases.datagen import read_index, read_shards
from smollm_trm.phases.parts import load_compressor, read_part, refuse_other_base
from smollm_trm.phases.settings import AssembleSettings
from smollm_trm.phases.trm import load_sequence_trm, part_of_problem
from smollm_trm.records import UserMistake, picked, run_record, write_json, write_whole
from smollm_trm.training.checkpoints import only_run_in
from smollm_trm.training.loggers import quiet_lightning
from smollm_trm.training.module import SmolLMTRMLightningModule
from smollm_trm.training.optim import OptimizerSettings
from smollm_trm.training.parts import pick_precision
from smollm_trm.training.run import Run, begin_run, build_run_trainer, fit_run, load_average


class ProblemsWithStates(GSM8KDataset):
    """Rows with the true state after thinking about each, by its question."""

    def __init__(self, rows: Sequence[Mapping[str, str]], states: Mapping[str, Tensor], **options: Any) -> None:
        super().__init__(rows, **options)
        self.states = states

    def __getitem__(self, index: list[int]) -> dict[str, Tensor]:
        """A batch of `GSM8KDataset` with `states` `(B, D)`."""
        states = torch.stack([self.states[self.rows[row]["question"]] for row in index])
        return {**super().__getitem__(index), "states": states}


class ReadingModule(SmolLMTRMLightningModule):
    """Trains the adapter to answer from given states; the reasoner is left as it is."""

    def given(self, batch: dict[str, Tensor]) -> Thought:
        """The batch's true states as the span's latents."""
        return Thought(self.model.reasoner.latents_of_states(batch["states"]))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        n_tokens, _ = self.step_totals(batch)
        loss = self.answer_from(batch, self.given(batch), num_items_in_batch=n_tokens).loss
        self.log_training(loss.detach() * n_tokens, batch, [])
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        output = self.answer_from(batch, self.given(batch))
        self.log_mean("dev_loss", output.loss, int((batch["labels"] >= 0).sum()))


def rows_with_states(
    folder: Path, index: Mapping[str, Any]
) -> tuple[dict[str, list[dict[str, str]]], dict[str, Tensor]]:
    """The problems of a folder of pairs that have a number as their answer, by part, and the state after each.

    Those that the recursion is judged on are left out: nothing is trained on them here either.
    """
    parts, states = {"train": [], "dev": []}, {}
    for _, after, plain in read_shards(folder, index):
        question, answer = plain["problems"], plain["answers"]
        part = part_of_problem(question)
        if part in parts and question not in states and extract_strict_answer(answer) is not None:
            parts[part].append({"question": question, "answer": answer})
            states[question] = after.float()
    for part, rows in parts.items():
        if not rows:
            raise UserMistake(f"{folder}: no {part} problem there has a number as its answer; generate more of gsm8k")
    return parts, states


def build_assembled(settings: AssembleSettings, index: Mapping[str, Any], dtype: torch.dtype) -> SmolLMv3WithTRM:
    """The base with a fresh adapter and the reasoner from phases 1 and 2; parts that do not fit are refused."""
    of_trm, _ = read_part(settings.trm_checkpoint, "sequence_trm")
    base: Any = settings.model_name
    if local_model_folder(base) is not None:
        base = SmolLMv3WithTRM.from_pretrained(base, dtype=dtype, device="cpu")
    model = SmolLMv3WithTRM.from_base(
        base, dtype=dtype, seed=settings.seed, calibration=(), base_training="lora", reasoner="sequence_trm",
        num_latents=1, target="answer", prompt_format=index["prompt_format"],
        reasoner_settings={"d_compressed": of_trm["d_compressed"], **of_trm["network"]},
    )  # fmt: skip
    fingerprint = base_fingerprint(model.model.language_model)
    refuse_other_base(index, fingerprint, f"the folder of pairs {settings.data_path}", settings.model_name)
    compressor, of_compressor = load_compressor(
        settings.compressor_checkpoint, fingerprint=fingerprint, here=settings.model_name
    )
    trm = load_sequence_trm(settings.trm_checkpoint, compressor, of_compressor)
    model.reasoner.compressor.load_state_dict(compressor.state_dict())
    model.reasoner.trm.load_state_dict(trm.state_dict())
    return model


def assemble(settings: AssembleSettings) -> dict[str, Any]:
    """Teach a base to read true states, put the trained parts in, save the model; returns the run's figures."""
    folder, pairs = Path(settings.output_dir), Path(settings.data_path)
    precision, dtype = pick_precision(settings.precision)
    index = read_index(pairs)
    model = build_assembled(settings, index, dtype)
    parts, states = rows_with_states(pairs, index)
    train, dev = (ProblemsWithStates(parts[part], states, encoder=model.encoder) for part in ("train", "dev"))
    model.reasoner.requires_grad_(False)
    module = ReadingModule(
        model=model.train(), optimizer_settings=OptimizerSettings(learning_rate=settings.learning_rate),
        seed=settings.seed,
    )  # fmt: skip
    run = Run(folder=folder, ema_decay=0.999, **picked(settings, "resume", "seed", "progress"))
    loader = ResumableLoader(train, batch_size=settings.batch_size, seed=settings.seed, totals=train.totals)
    with only_run_in(folder), quiet_lightning():
        noted = {**asdict(settings), "pairs": [one["sha256"] for one in index["shards"].values()]}
        places = ("data_path", "compressor_checkpoint", "trm_checkpoint", "model_name")
        start = begin_run(run, noted, may_change=("resume", "progress", "output_dir", *places))
        trainer = build_run_trainer(
            run, start, precision=precision, max_steps=settings.max_steps, max_epochs=-1,
            gradient_clip_val=1.0, log_every_n_steps=10, check_val_every_n_epoch=None,
            val_check_interval=max(1, settings.max_steps // 2),
        )  # fmt: skip
        fit_run(run, trainer, module, checkpoint=start.checkpoint, train_dataloaders=loader,
                val_dataloaders=ResumableLoader(dev, batch_size=128))  # fmt: skip
        kept = trainer.checkpoint_callback
        load_average(module, kept.best_path)
        names = sorted({name for shard in index["shards"].values() for name in shard["datasets"]})
        fingerprint = split_fingerprint(train.rows, dev.rows)
        split = {"source": ", ".join(names), "seed": settings.seed, "fingerprint": fingerprint}
        figures = {"dev_loss": kept.best_loss, "optimizer_steps": trainer.global_step, "split": split,
                   "train_rows": len(train), "dev_rows": len(dev)}  # fmt: skip
        model.reasoner.requires_grad_(True)
        model.config.notes |= {"training": figures}
        write_whole(folder / "model", model.eval().save_pretrained)
        write_json(folder / run.results_file, {**figures, "settings": asdict(settings), **run_record()})
    return figures


def assemble_command(settings: AssembleSettings) -> str:
    """Put both phases into one model that answers."""
    figures = assemble(settings)
    return (
        f"the model is in {settings.output_dir}/model; from true states, {figures['dev_loss']:.3f} nats a token on "
        f"{figures['dev_rows']} dev problems. `smollm-trm phases compare` says what the predicted state is worth"
    )
