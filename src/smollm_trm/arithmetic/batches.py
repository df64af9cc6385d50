"""From text to batches of about equal length, in an order that a resumed run finds again.

All examples stand in one byte tensor (16 tokens fit into a byte). The order of the whole run is a function of
the seed: every epoch is shuffled, cut into pools of 50 batches, sorted by length inside a pool and dealt out
in random order; so a batch is as long as its longest row, not 128. The run is *one* list of batches, and
going on after step 1,234 is starting at its 1,235th entry.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PreTrainedTokenizerFast

from smollm_trm.arithmetic.rules import THINK

BATCHES_IN_A_POOL = 50


@dataclass(frozen=True, kw_only=True)
class EncodedSums:
    """Examples as tokens: N rows of at most L tokens."""

    token_ids: torch.Tensor
    """uint8 [N, L], padded on the right."""
    lengths: torch.Tensor
    """int64 [N], real tokens of a row."""
    problem_lengths: torch.Tensor
    """int64 [N], tokens up to and including `=`."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def select(self, rows: torch.Tensor) -> "EncodedSums":
        """Some of the rows, or some of them several times."""
        return EncodedSums(
            token_ids=self.token_ids[rows], lengths=self.lengths[rows], problem_lengths=self.problem_lengths[rows]
        )


def encode_sums(lines: list[str], tokenizer: PreTrainedTokenizerFast, *, max_length: int) -> EncodedSums:
    """Turn written sums into one tensor.

    Raises:
        ValueError: an example is longer than the context.
    """
    encoded = tokenizer(lines, padding=True, padding_side="right", return_tensors="pt")
    lengths = encoded["attention_mask"].sum(dim=1)
    if lengths.max() > max_length:
        longest = int(lengths.argmax())
        raise ValueError(
            f"the example {lines[longest]!r} has {int(lengths.max())} tokens, max_length is {max_length}: "
            "raise --max-length or make data of fewer digits"
        )
    equals = tokenizer.convert_tokens_to_ids("=")
    problem_lengths = (encoded["input_ids"] == equals).int().argmax(dim=1) + 1  # the first one
    return EncodedSums(token_ids=encoded["input_ids"].to(torch.uint8), lengths=lengths, problem_lengths=problem_lengths)


def repeat_one_column_sums(sums: EncodedSums, lines: list[str], times: int) -> EncodedSums:
    """Let the sums without a chain be seen several times an epoch, where the others have one.

    There are only 275 sums of one column (of up to three operands), and they are written in a way of their own.
    """
    has_chain = torch.tensor([THINK in line for line in lines])
    if times == 1 or not has_chain.any():
        return sums
    return sums.select(torch.arange(len(sums)).repeat_interleave(torch.where(has_chain, 1, times)))


class SumBatches(Dataset):
    """A dataset whose items are whole batches: `dataset[rows]`.

    Args:
        sums: the examples.
        problem_weight: weight of the problem's own tokens in the loss. Learning them completes `7+` to a
            whole sum; but their digits are chance, so they are left out of what is reported as accuracy.
    """

    def __init__(self, *, sums: EncodedSums, problem_weight: float) -> None:
        self.sums = sums
        self.problem_weight = problem_weight

    def __len__(self) -> int:
        return len(self.sums)

    def __getitem__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """A batch, padded right: input_ids int64, token_weights float, is_completion bool, all [B, L]."""
        chosen = torch.as_tensor(rows)
        lengths = self.sums.lengths[chosen, None]  # [B, 1]
        columns = torch.arange(int(lengths.max()))
        is_real = columns < lengths
        is_completion = is_real & (columns >= self.sums.problem_lengths[chosen, None])
        return {
            "input_ids": self.sums.token_ids[chosen, : len(columns)].long(),
            "token_weights": is_completion + self.problem_weight * (is_real & ~is_completion),
            "is_completion": is_completion,
        }


def batches_of_an_epoch(lengths: torch.Tensor, *, batch_size: int, seed: int, epoch: int) -> list[torch.Tensor]:
    """The rows of every batch of one epoch, grouped by length; the same for the same seed and epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    batches: list[torch.Tensor] = []
    for pool in torch.randperm(len(lengths), generator=generator).split(batch_size * BATCHES_IN_A_POOL):
        by_length = pool[lengths[pool].argsort(stable=True)].split(batch_size)
        batches += [by_length[place] for place in torch.randperm(len(by_length), generator=generator)]
    return batches


class WholeRunSampler(Sampler):
    """All batches of a run, one after the other, from a first step on.

    Args:
        lengths: int64 [N], tokens of the rows.
        batch_size: rows of a batch; the last of an epoch may be smaller.
        num_steps: batches of the whole run.
        seed: fixes the order.
    """

    def __init__(self, *, lengths: torch.Tensor, batch_size: int, num_steps: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.num_steps = num_steps
        self.seed = seed
        self.first_step = 0

    def __len__(self) -> int:
        return self.num_steps  # of the whole run: Lightning counts the steps already done itself

    def __iter__(self) -> Iterator[list[int]]:
        steps_per_epoch = -(-len(self.lengths) // self.batch_size)
        for step in range(self.first_step, self.num_steps):
            epoch, place = divmod(step, steps_per_epoch)
            if place == 0 or step == self.first_step:
                batches = batches_of_an_epoch(self.lengths, batch_size=self.batch_size, seed=self.seed, epoch=epoch)
            yield batches[place].tolist()


class WholeRunLoader(DataLoader):
    """A DataLoader that Lightning can set to where a checkpoint was written.

    Args:
        dataset: whose items are whole batches.
        sampler: of the whole run.
        num_workers: processes that prepare batches.
        steps_done: asked for the trainer's steps when a checkpoint is written.
    """

    def __init__(
        self,
        *,
        dataset: SumBatches,
        sampler: WholeRunSampler,
        num_workers: int,
        steps_done: Callable[[], int],
    ) -> None:
        super().__init__(dataset, batch_size=None, sampler=sampler, num_workers=num_workers)
        self.steps_done = steps_done

    def state_dict(self) -> dict[str, int]:
        """Where the run stands (what was trained, not what was prepared ahead)."""
        return {"steps_done": self.steps_done()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after `steps_done` batches."""
        self.sampler.first_step = state["steps_done"]


def plain_batches(sums: EncodedSums, *, batch_size: int) -> list[list[int]]:
    """Every row once, sorted by length: the batches of an evaluation."""
    return [rows.tolist() for rows in sums.lengths.argsort(stable=True).split(batch_size)]
