"""Batches: every row once, little padding, an order that can be entered anywhere."""

import random
from collections import Counter

import pytest
import torch
from twins import ROWS, make_model, make_tokenizer

from smollm_trm.data.batching import IGNORED_LABEL, LengthGroupedBatches, collate_examples, pad_left
from smollm_trm.data.datamodule import GSM8KDataModule, GSM8KDataset, ResumableLoader
from smollm_trm.data.gsm8k import GSM8KSplits
from smollm_trm.data.prompts import EncodedExample, PromptEncoder

TOKENIZER = make_tokenizer()
ENCODER = PromptEncoder(tokenizer=TOKENIZER, num_latents=3)


def gsm8k_like_lengths(count: int) -> list[int]:
    """Tokens of GSM8K rows: most between 100 and 300, a few up to 600."""
    draw = random.Random(3)
    return [min(600, 60 + int(draw.lognormvariate(4.8, 0.45))) for _ in range(count)]


def share_of_padding(batches: list[list[int]], lengths: list[int]) -> float:
    padded = sum(max(lengths[index] for index in batch) * len(batch) for batch in batches)
    return 1 - sum(lengths[index] for batch in batches for index in batch) / padded


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1001])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_row_is_given_once_an_epoch_over_all_processes(count, world_size):
    lengths = gsm8k_like_lengths(count)
    options = {"lengths": lengths, "batch_size": 4, "seed": 1, "world_size": world_size}
    for epoch in (0, 1):
        given, numbers = Counter(), set()
        for rank in range(world_size):
            batches = LengthGroupedBatches(**options, rank=rank)
            batches.set_epoch(epoch)
            own = list(batches)
            assert len(own) == len(batches) and max(map(len, own)) <= 4
            numbers.add(len(own))
            given.update(index for batch in own for index in batch)
        assert len(numbers) == 1 and given == Counter(range(count))


def test_two_processes_see_the_rows_of_one_with_the_doubled_batch():
    lengths = gsm8k_like_lengths(101)
    one = list(LengthGroupedBatches(lengths=lengths, batch_size=8, seed=5))
    two = [list(LengthGroupedBatches(lengths=lengths, batch_size=4, seed=5, world_size=2, rank=r)) for r in (0, 1)]
    assert [sorted(batch) for batch in one] == [sorted(a + b) for a, b in zip(*two, strict=True)]


def test_the_order_follows_from_seed_and_epoch_alone():
    lengths = gsm8k_like_lengths(300)

    def order(seed: int, epoch: int) -> list[list[int]]:
        batches = LengthGroupedBatches(lengths=lengths, batch_size=4, seed=seed)
        batches.set_epoch(epoch)
        torch.rand(3)
        return list(batches)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) != order(2, 1) and order(1, 0) != order(2, 0)


def test_an_epoch_can_be_entered_at_any_batch_once():
    batches = LengthGroupedBatches(lengths=gsm8k_like_lengths(50), batch_size=4, seed=1)
    whole = list(batches)
    batches.first_batch = 5
    assert list(batches) == whole[5:] and list(batches) == whole


@pytest.mark.parametrize("batch_size", [2, 16])
def test_little_is_padding(batch_size):
    lengths = gsm8k_like_lengths(5978)
    batches = list(LengthGroupedBatches(lengths=lengths, batch_size=batch_size))
    shuffled = torch.randperm(len(lengths)).tolist()
    at_random = [shuffled[at : at + batch_size] for at in range(0, len(shuffled), batch_size)]
    assert share_of_padding(batches, lengths) < 0.035 < 0.1 < share_of_padding(at_random, lengths)


def test_lengths_come_in_no_order():
    lengths = gsm8k_like_lengths(2000)
    longest = [max(lengths[index] for index in batch) for batch in LengthGroupedBatches(lengths=lengths, batch_size=4)]
    pairs = torch.tensor([longest[:-1], longest[1:]], dtype=torch.float)
    assert abs(torch.corrcoef(pairs)[0, 1]) < 0.15


def test_a_batch_size_of_zero_is_refused_by_name():
    with pytest.raises(ValueError, match="batch_size=0: must be at least 1"):
        LengthGroupedBatches(lengths=[1], batch_size=0)


# Padding


def test_prompts_end_in_one_column_and_completions_begin_in_the_next():
    batch = collate_examples([EncodedExample([1, 2, 3], [4]), EncodedExample([5], [6, 7])], padding=0)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 0], [0, 0, 5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 4, -100], [-100, -100, -100, 6, 7]]


def test_padding_on_the_left():
    ids, mask = pad_left([[1], [2, 3]], 9)
    assert ids.tolist() == [[9, 1], [2, 3]] and mask.tolist() == [[0, 1], [1, 1]]


# Rows


def test_rows_too_long_are_dropped_with_a_count_and_none_is_cut(caplog):
    lengths = sorted(len(ENCODER.encode(row)) for row in ROWS)
    window = lengths[-1] - ENCODER.num_latents - 1  # latents come on top
    dataset = GSM8KDataset(ROWS, encoder=ENCODER, max_length=window)
    over = sum(length - ENCODER.num_latents > window for length in lengths)
    assert dataset.dropped == over > 0 and len(dataset) == len(ROWS) - over
    assert caplog.messages == [f"dropped {over} of {len(ROWS)} rows with more than {window} tokens"]
    assert sorted(dataset.lengths) == lengths[: len(dataset)]
    assert GSM8KDataset(ROWS, encoder=ENCODER).dropped == 0


def test_a_window_that_no_row_fits_is_one_clear_line():
    with pytest.raises(ValueError, match="no row fits max_length=5: the shortest of 60 has .* raise max_length"):
        GSM8KDataset(ROWS, encoder=ENCODER, max_length=5)


def test_a_process_without_rows_gets_a_batch_without_weight():
    model = make_model("smollm3", TOKENIZER)
    batch = GSM8KDataset(ROWS[:3], encoder=model.encoder)[[]]
    assert bool((batch["labels"] == IGNORED_LABEL).all()) and batch["input_ids"].shape[0] == 1
    assert model(**batch, num_items_in_batch=1).loss == 0


# Loaders


def make_loader() -> ResumableLoader:
    dataset = GSM8KDataset(ROWS[:22], encoder=ENCODER)
    return ResumableLoader(dataset, batch_size=4, seed=2)


def test_a_loader_goes_on_where_another_stopped():
    whole = [batch["input_ids"] for batch in make_loader()]
    assert len(whole) == 6
    for stop in range(1, 6):
        stopped, resumed = make_loader(), make_loader()
        iterator = iter(stopped)
        for _ in range(stop):
            next(iterator)
        resumed.load_state_dict(stopped.state_dict())
        rest = [batch["input_ids"] for batch in resumed]
        assert len(rest) == 6 - stop and all(torch.equal(*pair) for pair in zip(rest, whole[stop:], strict=True))
        assert len(list(resumed)) == 6 and resumed.state_dict() == {"given": 6}
    stopped.load_state_dict({"given": 6})
    assert len(list(stopped)) == 6


def test_the_data_module_hands_its_position_to_the_next_loader():
    splits = GSM8KSplits(
        gsm8k_train=ROWS[:22], gsm8k_test=ROWS[22:30], gsm8k_final_test=ROWS[30:37], seed=0, source="rows",
        fingerprint="", duplicates=0,
    )  # fmt: skip
    first, second = (GSM8KDataModule(encoder=ENCODER, splits=splits, batch_size=4, seed=2) for _ in range(2))
    assert first.state_dict() == {}
    for data in (first, second):
        data.setup("fit")
    iterator = iter(first.train_dataloader())
    seen = [next(iterator) for _ in range(2)]
    second.load_state_dict(first.state_dict())
    rest = list(second.train_dataloader())
    assert len(rest) == 4 and torch.equal(rest[0]["input_ids"], next(iterator)["input_ids"])
    assert not torch.equal(rest[0]["input_ids"], seen[0]["input_ids"])
    assert len(list(second.train_dataloader())) == 6


def test_test_problems_come_as_one_list_of_rows_in_order():
    splits = GSM8KSplits(
        gsm8k_train=[], gsm8k_test=[], gsm8k_final_test=ROWS[:7], seed=0, source="", fingerprint="", duplicates=0
    )
    assert list(GSM8KDataModule(encoder=ENCODER, splits=splits).test_dataloader()) == [ROWS[:7]]
