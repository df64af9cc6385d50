"""From text to batches: all examples stand in one byte tensor, and a batch is as long as its longest row, not 128."""

from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from smollm_trm.arithmetic.model import VOCABULARY, build_arithmetic_tokenizer
from smollm_trm.arithmetic.rules import THINK
from smollm_trm.data.batching import LengthGroupedBatches
from smollm_trm.data.datamodule import ResumableLoader
from smollm_trm.records import UserMistake


@dataclass(frozen=True, kw_only=True)
class EncodedSums(Dataset):
    """N examples of at most L tokens; `sums[rows]` is a whole batch."""

    token_ids: torch.Tensor
    """uint8 [N, L], padded on the right."""
    lengths: torch.Tensor
    """int64 [N], real tokens of a row."""
    problem_lengths: torch.Tensor
    """int64 [N], tokens up to and including `=`."""
    problem_weight: float
    """Weight of the problem's own tokens in the loss. Learning them completes `7+` to a whole sum; but their digits are
    chance, so they are left out of what is reported as accuracy."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        """A batch, padded right: input_ids int64, token_weights float, is_completion bool, all [B, L]."""
        chosen = torch.as_tensor(rows)
        lengths = self.lengths[chosen, None]  # [B, 1]
        columns = torch.arange(int(lengths.max()))
        is_real = columns < lengths
        is_completion = is_real & (columns >= self.problem_lengths[chosen, None])
        return {
            "input_ids": self.token_ids[chosen, : len(columns)].long(),
            "token_weights": is_completion + self.problem_weight * (is_real & ~is_completion),
            "is_completion": is_completion,
        }

    def loader(self, batch_size: int, *, seed: int = 0, num_workers: int = 0) -> ResumableLoader:
        """Batches of similar lengths, in an order fixed by the seed."""
        batches = LengthGroupedBatches(lengths=self.lengths.tolist(), batch_size=batch_size, seed=seed)
        return ResumableLoader(self, batches=batches, num_workers=num_workers)


def encode_sums(lines: list[str], *, max_length: int, problem_weight: float = 0.0) -> EncodedSums:
    """Turn written sums into tensors; one that is longer than `max_length` tokens is refused."""
    encoded = build_arithmetic_tokenizer()(lines, padding=True, padding_side="right", return_tensors="pt")
    lengths = encoded["attention_mask"].sum(dim=1)
    if lengths.max() > max_length:
        longest = int(lengths.argmax())
        raise UserMistake(
            f"the example {lines[longest]!r} has {int(lengths.max())} tokens, max_length is {max_length}: "
            "raise --max-length or make data of fewer digits"
        )
    is_equals = encoded["input_ids"] == VOCABULARY["="]
    return EncodedSums(
        token_ids=encoded["input_ids"].to(torch.uint8),
        lengths=lengths,
        problem_lengths=is_equals.int().argmax(dim=1) + 1,  # the first one
        problem_weight=problem_weight,
    )


def repeat_one_column_sums(lines: list[str], times: int) -> list[str]:
    """Let the sums without a chain be seen several times an epoch, where the others have one.

    There are only 275 sums of one column (of up to three operands), and they are written in a way of their own.
    """
    if not any(THINK in line for line in lines):
        return lines
    return [line for line in lines for _ in range(1 if THINK in line else times)]
