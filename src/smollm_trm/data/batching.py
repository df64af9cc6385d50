"""From encoded examples to batches: one column for all spans, little padding, an order that can be resumed.

Prompts are padded on the left and completions on the right, so that the latent spans of a batch begin in the same
column; under a curriculum they may differ in length. Batches hold rows of similar length. The order of an epoch follows
from the seed and the epoch alone, and can be entered at any batch: that is what makes a resumed run equal to an
unbroken one.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from smollm_trm.data.prompts import EncodedExample
from smollm_trm.records import check_range

IGNORED_LABEL = -100
BATCHES_SORTED = 50  # the stretch of an epoch within which rows are sorted by length


def pad_left(rows: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask `(B, longest)`, real tokens on the right."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), padding)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    return ids, mask


def collate_examples(examples: Sequence[EncodedExample], padding: int) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels` (-100 on prompts and padding), `(B, L)`; the model shifts labels."""
    before = [example.prompt[: len(example.prompt) - example.n_behind] for example in examples]
    behind = [
        (example.prompt + example.completion)[len(head) :] for example, head in zip(examples, before, strict=True)
    ]
    head_ids, head_mask = pad_left(before, padding)
    tail_ids, tail_mask = (one.flip(1) for one in pad_left([tail[::-1] for tail in behind], padding))
    supervised = torch.tensor([[example.n_behind] for example in examples]) <= torch.arange(tail_ids.shape[1])
    labels = tail_ids.masked_fill(~(supervised & tail_mask.bool()), IGNORED_LABEL)
    return {
        "input_ids": torch.cat([head_ids, tail_ids], dim=1),
        "attention_mask": torch.cat([head_mask, tail_mask], dim=1),
        "labels": torch.cat([torch.full_like(head_ids, IGNORED_LABEL), labels], dim=1),
    }


def supervised_columns(labels: Tensor) -> int:
    """How many of the last columns need logits: from the one before the first label of any row."""
    return labels.shape[1] - max(1, int((labels != IGNORED_LABEL).any(0).int().argmax())) + 1


class LengthGroupedBatches(Sampler[list[int]]):
    """Batches of indices whose examples have similar lengths, in an order fixed by seed and epoch.

    An epoch is shuffled, each stretch of 50 batches is sorted by length and cut, and the batches are shuffled. Several
    processes share each batch of `world_size` times the size, so that every index is given exactly once; one for which
    an epoch's last rows do not suffice gets an empty batch there.
    """

    def __init__(
        self,
        *,
        lengths: Sequence[int],
        batch_size: int,
        seed: int = 0,
        world_size: int = 1,
        rank: int = 0,
        accumulate: int = 1,
    ) -> None:
        check_range(1, batch_size=batch_size)
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.world_size, self.rank, self.accumulate = world_size, rank, accumulate
        self.epoch = 0
        self.first_batch = 0  # with which the next iteration, and only that one, begins

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // (self.batch_size * self.world_size))

    def global_batches(self) -> list[list[int]]:
        """The epoch's batches over all processes, each of at most `batch_size * world_size` indices."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.batch_size * self.world_size
        batches = []
        for start in range(0, len(order), size * BATCHES_SORTED):
            stretch = sorted(order[start : start + size * BATCHES_SORTED], key=lambda index: self.lengths[index])
            batches += [stretch[at : at + size] for at in range(0, len(stretch), size)]
        return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]

    def rows_by_step(self) -> list[list[int]]:
        """The rows of each optimizer step of the epoch, over all processes and accumulated batches."""
        batches = self.global_batches()
        steps = (batches[at : at + self.accumulate] for at in range(0, len(batches), self.accumulate))
        return [[row for batch in step for row in batch] for step in steps]

    def __iter__(self) -> Iterator[list[int]]:
        first, self.first_batch = self.first_batch, 0
        for batch in self.global_batches()[first:]:
            yield batch[self.rank :: self.world_size]
