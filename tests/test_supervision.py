"""The loss of a batch: which supervision step, which tokens, when to halt."""

import math
from types import SimpleNamespace

import pytest
import torch
from twins import ROWS, make_batch, make_model, make_tokenizer

from smollm_trm.data.batching import IGNORED_LABEL
from smollm_trm.models.reasoners.reasoner import Thought
from smollm_trm.training.module import (
    SmolLMTRMLightningModule,
    halting_losses,
    predicted_and_labels,
    row_losses,
    rows_all_right,
)

TOKENIZER = make_tokenizer()
FOUR_STEPS = {
    "n_layers": 1,
    "n_heads": 2,
    "n_latent_steps": 1,
    "n_deep_recursions": 2,
    "n_supervision_steps": 4,
    "compression_heads": 2,
    "dim": 16,
}


def make_module(
    *, supervise: str = "one", rank: int = 0, reasoner: str | None = "trm", accumulate: int = 1, **config
) -> SmolLMTRMLightningModule:
    if reasoner == "trm":
        config = {"reasoner_settings": FOUR_STEPS, **config}
    model = make_model("smollm3", TOKENIZER, reasoner=reasoner, **{"num_latents": 4, **config}).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # so that supervision steps differ
        for name, parameter in model.named_parameters():
            if ".recursion." in name:
                parameter.add_(0.7 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("scale.gain"):
                parameter.fill_(10.0)
    module = SmolLMTRMLightningModule(model=model, supervise=supervise, seed=7)
    module.log = lambda *args, **options: None
    module._trainer = SimpleNamespace(
        world_size=1, global_rank=rank, current_epoch=0, global_step=0, accumulate_grad_batches=accumulate
    )
    return module


def loss_and_gradients(module: SmolLMTRMLightningModule, batch: dict, batch_idx: int = 0) -> tuple[float, dict]:
    module.zero_grad()
    loss = module.training_step(batch, batch_idx)
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("target", ["answer", "steps"])
def test_one_drawn_step_is_all_steps_in_the_mean(target, monkeypatch):
    every = make_module(supervise="all", target=target)
    batch = make_batch(every.model, ROWS[:3])
    expected_loss, expected = loss_and_gradients(every, batch)
    one = make_module(target=target)
    losses, gradients = [], {name: torch.zeros_like(gradient) for name, gradient in expected.items()}
    for step in range(1, 5):
        monkeypatch.setattr(one, "draw_step", lambda step=step: step)
        loss, found = loss_and_gradients(one, batch)
        losses.append(loss)
        for name, gradient in found.items():
            gradients[name] += gradient / 4
    assert sum(losses) / 4 == pytest.approx(expected_loss, abs=3e-6) and max(losses) - min(losses) > 5e-5
    for name, gradient in expected.items():
        assert torch.allclose(gradients[name], gradient, atol=1e-6), name


def test_the_batches_of_an_optimizer_step_train_the_same_supervision_step():
    module, drawn = make_module(accumulate=3), []
    for batch_idx in range(120):
        module.on_train_batch_start({}, batch_idx)
        drawn.append((module.draw_step(), float(torch.rand(()))))
    steps = [step for step, _ in drawn]
    assert steps[0::3] == steps[1::3] == steps[2::3] and set(steps) == {1, 2, 3, 4}
    alone = make_module()
    for batch_idx, step in enumerate(steps[0::3]):  # as a run whose batches are three times as large
        alone.on_train_batch_start({}, batch_idx)
        assert alone.draw_step() == step
    assert len({noise for _, noise in drawn}) == 120


def test_all_processes_draw_the_same_step_and_each_its_own_dropout():
    drawn, noise = [], []
    for rank in (0, 1):
        module = make_module(rank=rank)
        drawn.append([])
        for batch_idx in range(200):
            module.on_train_batch_start({}, batch_idx)
            drawn[-1].append(module.draw_step())
        noise.append(torch.rand(4))
    assert drawn[0] == drawn[1] and not torch.equal(*noise)
    assert all(30 < drawn[0].count(step) < 70 for step in (1, 2, 3, 4)) and set(drawn[0]) == {1, 2, 3, 4}


def test_a_steps_randomness_depends_on_seed_and_place_only():
    module, noise = make_module(), []
    for epoch, batch_idx in ((0, 3), (0, 4), (1, 3), (0, 3)):
        module._trainer.current_epoch = epoch
        module.on_train_batch_start({}, batch_idx)
        noise.append((module.draw_step(), torch.rand(4).tolist()))
        torch.rand(5)
    assert noise[0] == noise[3] and noise[0] != noise[1] != noise[2] != noise[0]


@pytest.mark.parametrize("reasoner", ["static", "compressor", None])
def test_controls_have_one_step_and_no_halting(reasoner):
    module = make_module(reasoner=reasoner)
    batch = make_batch(module.model, ROWS[:3])
    module.on_train_batch_start(batch, 0)
    assert module.draw_step() is None
    assert torch.allclose(module.training_step(batch, 0), module.model(**batch).loss, rtol=1e-6)


# Halting


def test_halting_losses_by_hand():
    found = halting_losses(torch.tensor([0.0, 2.0, -1.0]), torch.tensor([True, True, False]))
    assert found.tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(-2)), math.log(1 + math.exp(-1))])


def test_a_row_is_right_when_every_supervised_token_is():
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]]), 5).float()
    labels = torch.tensor([[1, 2, 3], [1, 4, 3], [IGNORED_LABEL, 2, 3]])
    assert rows_all_right(logits, labels).tolist() == [True, False, True]


def test_row_losses_are_means_over_supervised_tokens():
    logits = torch.zeros(2, 3, 4)
    logits[0, 0, 1] = math.log(3)  # probability 3/6 of token 1, 1/6 of the others
    labels = torch.tensor([[1, 0, IGNORED_LABEL], [IGNORED_LABEL] * 3])
    assert row_losses(logits, labels).tolist() == pytest.approx([(math.log(2) + math.log(4)) / 2, 0.0])


def halting_part(module: SmolLMTRMLightningModule, batch: dict, output, step: int, by_step) -> torch.Tensor:
    thought = Thought(output.latents, output.halting_logit)
    return module.halting_part(thought, output.logits, batch["labels"], step, by_step)


def test_under_answer_a_row_should_halt_where_its_tokens_are_right(monkeypatch):
    module = make_module()
    batch = make_batch(module.model, ROWS[:3])
    output = module.model(**batch)
    right = torch.tensor([True, False, True])
    monkeypatch.setattr("smollm_trm.training.module.rows_all_right", lambda logits, labels: right)
    expected = halting_losses(output.halting_logit, right).sum()
    assert torch.allclose(halting_part(module, batch, output, 2, None), expected)


def test_under_steps_a_row_should_halt_within_one_percent_of_its_best_step():
    module = make_module(target="steps")
    batch = make_batch(module.model, ROWS[:3])
    output = module.model(**batch)
    losses = torch.tensor([[2.0, 3.0, 1.009], [1.005, 2.0, 1.0], [1.0, 2.5, 4.0]])  # (steps, rows)
    for step, target in ((1, [False, False, True]), (2, [True, True, True]), (3, [True, False, False])):
        expected = halting_losses(output.halting_logit, torch.tensor(target)).sum()
        assert torch.allclose(halting_part(module, batch, output, step, losses), expected)
    nothing = halting_part(module, batch, output, 1, None)  # a batch whose steps were not compared
    assert nothing == 0
    nothing.backward()
    assert module.model.reasoner.halting_head.weight.grad is not None  # as DDP asks


@pytest.mark.parametrize("supervise", ["one", "all"])
def test_the_steps_are_compared_once_in_every_16th_optimizer_step(supervise, monkeypatch):
    module, asked = make_module(target="steps", supervise=supervise), []
    batch = make_batch(module.model, ROWS[:3])
    losses_by_step = module.losses_by_step
    monkeypatch.setattr(module, "losses_by_step", lambda batch: asked.append(at) or losses_by_step(batch))
    for at in (15, 16, 17):
        module.trainer.global_step = at
        module.on_train_batch_start(batch, at)
        module.training_step(batch, at)
    assert asked == [16]


def test_the_losses_that_halting_compares_have_no_dropout():
    module = make_module(target="steps")
    batch = make_batch(module.model, ROWS[:3])
    for part in module.model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
    losses = module.losses_by_step(batch)
    assert torch.equal(losses, module.losses_by_step(batch)) and losses.shape == (4, 3) and module.model.training
    last = module.model.eval()(**batch)
    by_hand = row_losses(*predicted_and_labels(last.logits, batch["labels"]))
    assert torch.allclose(losses[3], by_hand, atol=1e-6)


@pytest.mark.parametrize("target", ["answer", "steps"])
def test_a_row_without_labels_weighs_nothing(target):
    module = make_module(target=target)
    batch = make_batch(module.model, ROWS[:3])
    batch["labels"][2] = IGNORED_LABEL
    alone = {name: tensor[:2] for name, tensor in batch.items()}
    losses = []
    for part in (batch, alone):
        module.on_train_batch_start(part, 0)
        totals = {"num_items_in_batch": int((batch["labels"] != IGNORED_LABEL).sum()), "num_examples_in_batch": 2}
        losses.append(module.training_step({**part, **totals}, 0))
    assert torch.allclose(*losses, rtol=1e-5)
    nothing = {**batch, "labels": torch.full_like(batch["labels"], IGNORED_LABEL)}
    module.on_train_batch_start(nothing, 0)
    assert module.training_step(nothing, 0) == 0


def test_a_batch_of_one_says_nothing_about_variation():
    for rows, expected in ((ROWS[:1], False), (ROWS[:2], True)):
        module, logged = make_module(), []
        module.log = lambda name, value, logged=logged, **options: logged.append(name)
        batch = make_batch(module.model, rows)
        module.on_train_batch_start(batch, 0)
        module.training_step(batch, 0)
        assert ("latent_variation" in logged) is expected


@pytest.mark.parametrize("supervise", ["one", "all"])
def test_the_prompt_is_read_once_and_loss_and_gradients_are_those_of_reading_it_again(supervise, monkeypatch):
    found, columns = [], []
    for reads_again in (False, True):
        module = make_module(supervise=supervise)
        if reads_again:
            monkeypatch.setattr("smollm_trm.models.modeling.read_before", lambda slots, n_cached: 0)
        decoder = module.model.model.language_model
        decoder.register_forward_pre_hook(
            lambda _, args, kwargs: columns.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
        )
        batch = make_batch(module.model, ROWS[:4])
        module.on_train_batch_start(batch, 0)
        columns.clear()
        found.append(loss_and_gradients(module, batch))
        whole, (read, *answers) = batch["input_ids"].shape[1], columns
        assert all(answer == whole for answer in answers) if reads_again else {read + n for n in answers} == {whole}
    (loss, gradients), (loss_again, gradients_again) = found
    assert loss == pytest.approx(loss_again, abs=1e-6) and gradients.keys() == gradients_again.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, gradients_again[name], atol=1e-6), name


# Latents that say a step's result


def test_latents_are_asked_for_each_steps_result_in_its_own_slots():
    encoder = make_module(num_latents=7).model.encoder
    ids = {text: encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("3\n", "28\n")}
    answer = "Ann has 7-4=<<7-4=3>>3.\nAnn needs 31-3=<<31-3=28>>28 more.\n#### 28"
    first, second = ([*ids[text], None, None, None, None][:3] for text in ("3\n", "28\n"))
    assert encoder.results_for_latents(answer, 3) == [*first, *second, None]
    assert encoder.results_for_latents(answer, 3, repeat_last=True) == [*first, *second, second[0]]
    wide = [[*ids[text], None, None][:4] for text in ("3\n", "28\n")]
    assert encoder.results_for_latents(answer, 4) == [*wide[0], *wide[1][:3]]
    one_step = "It is 7-4=<<7-4=3>>3.\n#### 3"
    assert encoder.results_for_latents(one_step, 3, repeat_last=True) == [*first, *first, first[0]]
    assert encoder.results_for_latents("Seven less four.\n#### 3", 3) == [None] * 7


def test_a_latent_says_the_word_whose_embedding_it_is():
    model = make_module().model
    table = model.get_input_embeddings().weight.detach()
    scale = model.reasoner.scale
    words = table[:50] / table[:50].square().mean(1, keepdim=True).sqrt()
    said = model.reasoner.words(scale(words), model.lm_head)
    assert (said.argmax(-1) == torch.arange(50)).float().mean() > 0.9


def test_soft_words_are_mixtures_of_embeddings_by_what_is_said():
    module = make_module(reasoner_settings={"soft_words": True})
    model, batch = module.model, make_batch(module.model, ROWS[:4])
    thought = model.think(batch["input_ids"], batch["attention_mask"])[-1]
    table = model.get_input_embeddings().weight
    expected = model.reasoner.words(thought.free, model.lm_head).softmax(-1) @ table
    torch.testing.assert_close(thought.latents, expected)
    labels = torch.full(thought.latents.shape[:2], 5)
    logits = model.reasoner.words(thought.free, model.lm_head)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(module.latent_loss(thought, labels), loss)
    module.on_train_batch_start(batch, 0)
    _, gradients = loss_and_gradients(module, batch)
    assert gradients["model.model.reasoner.to_embedding.weight"].abs().sum() > 0, "of the answer alone"


def test_words_are_mixed_only_where_slots_are_to_be_filled():
    model = make_module(reasoner_settings={"soft_words": True}).model
    batch = make_batch(model, ROWS[:4])
    slots = model.model.spans(batch["input_ids"])
    prompt = model.model.prompt_before(batch["input_ids"], batch["attention_mask"], slots)
    mixed = model.reasoner.think(prompt)[-1]
    prompt.n_slots = None
    alone = model.reasoner.think(prompt)[-1]
    assert alone.free is None and torch.equal(alone.latents, mixed.free)


@pytest.mark.parametrize("reasoner", ["trm", "compressor", "static"])
def test_what_latents_say_is_trained_where_a_reasoner_says_something(reasoner):
    module = make_module(reasoner=reasoner)
    batch = make_batch(module.model, ROWS[:4])
    module.on_train_batch_start(batch, 0)
    plain, _ = loss_and_gradients(module, batch)
    asked = [module.model.encoder.results_for_latents(row["answer"], 2) for row in ROWS[:4]]
    labels = torch.tensor([[IGNORED_LABEL if one is None else one for one in row] for row in asked])
    module.on_train_batch_start(batch, 0)
    loss, gradients = loss_and_gradients(module, {**batch, "latent_labels": labels})
    n_tokens = int((batch["labels"] != IGNORED_LABEL).sum())
    with torch.no_grad():
        module.on_train_batch_start(batch, 0)
        thought = module.model.think(batch["input_ids"], batch["attention_mask"], n_steps=module.draw_step())[-1]
    if reasoner == "static":
        assert loss == pytest.approx(plain, abs=1e-6)
        return
    with torch.no_grad():
        logits = module.model.reasoner.words(thought.latents, module.model.lm_head)
    said = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / n_tokens
    assert loss == pytest.approx(plain + float(said), abs=1e-5) and float(said) > 0.1
    assert any("lora_B" in name for name in gradients)
