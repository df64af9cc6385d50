"""From text to batches: all examples stand in one byte tensor, for 16 tokens fit into a byte.

Which rows make a batch is said by `LengthGroupedBatches`; a batch is as long as its longest row, not 128.
"""

from dataclasses import dataclass

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from smollm_trm.arithmetic.rules import THINK


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
