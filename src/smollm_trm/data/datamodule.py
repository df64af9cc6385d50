"""GSM8K as batches: encoded once (or stage by stage), grouped by length, resumable at any batch."""

import logging
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from smollm_trm.data.answers import annotations_in
from smollm_trm.data.batching import IGNORED_LABEL, LengthGroupedBatches, collate_examples
from smollm_trm.data.curriculum import Curriculum
from smollm_trm.data.gsm8k import GSM8KSplits
from smollm_trm.data.prompts import EncodedExample, PromptEncoder, padding_token_id
from smollm_trm.records import UserMistake

logger = logging.getLogger(__name__)


class GSM8KDataset(Dataset):
    """Rows `{question, answer}` as token ids; of more than `max_length` tokens beside the latents they are dropped.

    Under a curriculum they are those of its first stage until `enter_stage`; a row that is too long with all steps and
    all latents is in no stage, so that every epoch has the same rows.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, str]],
        *,
        encoder: PromptEncoder,
        max_length: int | None = None,
        curriculum: Curriculum | None = None,
        seed: int | None = None,
        latents_per_step: int = 0,
        repeat_last: bool = False,
    ) -> None:
        rows = annotated_rows(rows) if encoder.steps_from == "annotations" else rows
        self.encoder, self.curriculum = encoder, curriculum
        self.seed = seed  # of drawn stages; None draws none
        self.latents_per_step, self.repeat_last = latents_per_step, repeat_last
        encoded = [encoder.encode(row) for row in rows]
        window = None if max_length is None else max_length + encoder.num_latents
        kept = [at for at, example in enumerate(encoded) if window is None or len(example) <= window]
        self.rows, self.examples = [rows[at] for at in kept], [encoded[at] for at in kept]
        self.dropped = len(encoded) - len(kept)
        if not self.examples:
            shortest = min(map(len, encoded), default=0) - encoder.num_latents
            raise UserMistake(
                f"no row fits max_length={max_length}: the shortest of {len(encoded)} has {shortest} tokens "
                f"beside its {encoder.num_latents} latents; raise max_length"
            )
        if self.dropped:
            logger.warning("dropped %d of %d rows with more than %d tokens", self.dropped, len(encoded), max_length)
        self.lengths = [len(example) for example in self.examples]
        self.entered: tuple[int, int | None] | None = None
        if curriculum is not None:
            self.enter_stage(curriculum.stage_of(0), epoch=0)

    def __len__(self) -> int:
        return len(self.examples)

    def enter_stage(self, stage: int, *, epoch: int) -> None:
        """Write the rows as a stage of the curriculum has them; `epoch` and `seed` decide what is drawn."""
        entered = (stage, epoch if self.curriculum.uniform_prob and self.seed is not None else None)
        if self.entered == entered:
            return
        self.entered, draw = entered, random.Random(f"{self.seed} {epoch}")
        for at, row in enumerate(self.rows):
            n_steps = len(self.encoder.steps(row["answer"]))
            drawn = stage if self.seed is None else self.curriculum.drawn_stage(stage, n_steps, draw)
            skip_steps, n_slots = self.curriculum.plan(drawn, n_steps)
            self.examples[at] = self.encoder.encode(row, n_slots=n_slots, skip_steps=skip_steps)
        self.lengths[:] = map(len, self.examples)

    def totals(self, rows: list[int]) -> dict[str, int]:
        """Supervised tokens and examples of these rows, which a batch's loss is divided by."""
        tokens = sum(len(self.examples[row].completion) for row in rows)
        return {"num_items_in_batch": tokens, "num_examples_in_batch": len(rows)}

    def __getitem__(self, index: int | list[int]) -> EncodedExample | dict[str, Tensor]:
        """One encoded row, or the batch of a list of them; for a process without rows (`[]`), a row without labels."""
        if isinstance(index, int):
            return self.examples[index]
        batch = collate_examples([self.examples[i] for i in index or [0]], padding_token_id(self.encoder.tokenizer))
        if self.latents_per_step:
            options = {"latents_per_step": self.latents_per_step, "repeat_last": self.repeat_last}
            asked = (self.encoder.results_for_latents(self.rows[i]["answer"], **options) for i in index)
            labels = [[IGNORED_LABEL if one is None else one for one in row] for row in asked]
            batch["latent_labels"] = torch.tensor(labels or [[IGNORED_LABEL] * self.encoder.num_latents])
        if not index:
            batch["labels"].fill_(IGNORED_LABEL)
        return batch


def annotated_rows(rows: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The rows whose solutions have calculator annotations; the others are dropped with a count."""
    found = [row for row in rows if annotations_in(row["answer"])]
    if not found:
        raise UserMistake(f"none of {len(rows)} rows has a calculator annotation <<...>>: set steps_from='lines'")
    if len(found) < len(rows):
        told = "dropped %d of %d rows without calculator annotations; steps_from='lines' keeps them"
        logger.warning(told, len(rows) - len(found), len(rows))
    return found


class ResumableLoader(DataLoader):
    """A loader of whole batches, grouped by the dataset's `lengths`, that can say and be told how far it is."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        totals: Callable[[list[int]], dict[str, int]] | None = None,
        **shares: int,
    ) -> None:
        batches = LengthGroupedBatches(lengths=dataset.lengths, batch_size=batch_size, seed=seed, **shares)
        super().__init__(dataset, sampler=batches, batch_size=None, num_workers=num_workers)
        self.batches = batches
        self.totals = totals
        self.given = 0

    def __iter__(self) -> Iterator[Any]:
        self.given = self.batches.first_batch
        steps = [] if self.totals is None else [self.totals(rows) for rows in self.batches.rows_by_step()]
        for batch in super().__iter__():
            self.given += 1
            yield {**batch, **steps[(self.given - 1) // self.batches.accumulate]} if steps else batch

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Begin the next iteration after those batches; a finished epoch begins anew."""
        self.batches.first_batch = state_dict["given"] % len(self.batches)


class GSM8KDataModule(LightningDataModule):
    """GSM8K's three parts: train, dev (the 20% part, which may pick a checkpoint) and the official test.

    Args:
        batch_size, eval_batch_size: rows per process and step, in training and in validation.
        max_length: see `GSM8KDataset`.
        max_samples, max_dev_samples: only the first so many rows of a part; all when None.
        curriculum: how much of a solution each stage writes; None writes what the encoder says.
        latents_per_step: latents that training asks for the result of each step of a solution; 0 asks nothing.
        repeat_last: whether the latents behind the last result are asked for it again.
    """

    def __init__(
        self,
        *,
        encoder: PromptEncoder,
        splits: GSM8KSplits,
        batch_size: int = 2,
        eval_batch_size: int = 16,
        max_length: int | None = 512,
        max_samples: int | None = None,
        max_dev_samples: int | None = None,
        seed: int = 0,
        curriculum: Curriculum | None = None,
        latents_per_step: int = 0,
        repeat_last: bool = False,
    ) -> None:
        super().__init__()
        self.asked = {"latents_per_step": latents_per_step, "repeat_last": repeat_last}
        self.encoder, self.splits, self.seed, self.curriculum = encoder, splits, seed, curriculum
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.max_length, self.max_samples, self.max_dev_samples = max_length, max_samples, max_dev_samples
        self.train_set: GSM8KDataset | None = None
        self.dev_set: GSM8KDataset | None = None
        self.train_loader: ResumableLoader | None = None
        self.position: dict[str, int] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Encode what training needs; the official test stays untouched until `trainer.test`."""
        # The rows are encoded once and kept: worker processes would only cost.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        if stage in ("fit", "validate", None) and self.train_set is None:
            options = {"encoder": self.encoder, "max_length": self.max_length, "curriculum": self.curriculum}
            options |= self.asked
            self.train_set = GSM8KDataset(self.splits.gsm8k_train[: self.max_samples], seed=self.seed, **options)
            self.dev_set = GSM8KDataset(self.splits.gsm8k_test[: self.max_dev_samples], **options)
            if self.curriculum is not None:
                self.curriculum.check_steps(max(len(self.encoder.steps(row["answer"])) for row in self.train_set.rows))

    def enter_epoch(self, epoch: int) -> int:
        """Write all rows as the curriculum has them in an epoch; its stage."""
        stage = self.curriculum.stage_of(epoch)
        for part in (self.train_set, self.dev_set):
            part.enter_stage(stage, epoch=epoch)
        return stage

    def train_dataloader(self) -> ResumableLoader:
        self.train_loader = self._loader(self.train_set, self.batch_size, seed=self.seed, totals=self.train_set.totals)
        if self.position is not None:
            self.train_loader.load_state_dict(self.position)
            self.position = None
        return self.train_loader

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.dev_set, self.eval_batch_size, seed=0)

    def test_dataloader(self) -> DataLoader:
        """The official test part, as one list of rows for `test_step`; several processes share it."""
        rows = self.splits.gsm8k_final_test
        if not rows:
            raise UserMistake(f"{self.splits.source} has no test part: evaluate it with evaluate_gsm8k")
        share = rows[self.trainer.global_rank :: self.trainer.world_size] if self.trainer else rows
        return DataLoader([share], batch_size=None)

    def state_dict(self) -> dict[str, int]:  # the loader's own is restored too late to count the steps left
        return {} if self.train_loader is None else self.train_loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.position = state_dict

    def _loader(self, dataset: GSM8KDataset, batch_size: int, *, seed: int, totals: Any = None) -> ResumableLoader:
        shares = {}
        if trainer := self.trainer:
            shares = {"world_size": trainer.world_size, "rank": trainer.global_rank}
            shares["accumulate"] = trainer.accumulate_grad_batches
        return ResumableLoader(dataset, batch_size=batch_size, seed=seed, totals=totals, **shares)
