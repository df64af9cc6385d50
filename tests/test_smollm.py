"""What must always hold of a decoder with a latent span, on every architecture."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from twins import ARCHITECTURES, ROWS, SMALL_TRM, make_base, make_batch, make_model, make_tokenizer

from smollm_trm.data.batching import IGNORED_LABEL, pad_left, supervised_columns
from smollm_trm.data.prompts import padding_token_id
from smollm_trm.models.loading import ANCHOR_TEXT
from smollm_trm.models.prompt import hidden_states_at, positions_of
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.records import UserMistake

TOKENIZER = make_tokenizer()


@pytest.fixture(params=ARCHITECTURES)
def model(request) -> SmolLMv3WithTRM:
    return make_model(request.param, TOKENIZER)


def slots_of(model: SmolLMv3WithTRM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["input_ids"] == model.config.slot_token_id


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_latents_it_is_the_plain_base_bit_for_bit(architecture):
    plain = make_base(architecture, TOKENIZER).eval()
    lora = SmolLMv3WithTRM.from_base((make_base(architecture, TOKENIZER), TOKENIZER), reasoner=None).eval()
    rows = [lora.encoder.encode_prompt(row["question"]) for row in ROWS[:4]]
    assert lora.tokenizer.decode(rows[0]).endswith("Answer: <think></think>")
    ids, mask = pad_left(rows, padding_token_id(TOKENIZER))
    expected = plain(ids, attention_mask=mask, position_ids=positions_of(mask)).logits
    assert torch.equal(lora(ids, attention_mask=mask).logits, expected)
    assert torch.equal(lora(ids[:1, -9:]).logits, plain(ids[:1, -9:]).logits)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": padding_token_id(TOKENIZER)}
    assert torch.equal(*(one.generate(ids, attention_mask=mask, **options) for one in (lora, plain)))


def test_changing_the_answer_leaves_the_latents_bitwise_unchanged(model):
    question = ROWS[0]["question"]
    first, second = (make_batch(model, [{"question": question, "answer": f"#### {n}"}]) for n in (12, 987))
    assert torch.equal(model(**first).latents, model(**second).latents)


def test_no_logit_looks_ahead(model):
    batch = make_batch(model, ROWS[:2])
    changed = batch["input_ids"].clone()
    changed[:, -2:] = 7
    before, after = (model(ids, attention_mask=batch["attention_mask"]).logits for ids in (batch["input_ids"], changed))
    assert torch.equal(before[:, :-2], after[:, :-2]) and not torch.equal(before[:, -1], after[:, -1])


def test_the_answer_depends_on_the_latents_of_its_own_question(model):
    batch = make_batch(model, ROWS[:2])
    latents = model.think(batch["input_ids"], batch["attention_mask"])[-1].latents
    own, swapped = (model(**batch, latents=given).logits for given in (latents, latents.flip(0)))
    assert torch.equal(own, model(**batch).logits)
    assert (own - swapped).abs().max() > 1e-3


def test_a_row_does_not_depend_on_its_neighbours_or_on_padding_on_either_side(model):
    rows = sorted(ROWS[:8], key=lambda row: len(row["question"]))
    batch = make_batch(model, rows)
    together = model(**batch)
    for index in (0, len(rows) - 1):
        real = batch["attention_mask"][index].bool()
        ids = batch["input_ids"][index][real][None]
        right = torch.cat([ids, torch.full((1, 5), padding_token_id(TOKENIZER))], dim=1)
        right_mask = torch.ones_like(right)
        right_mask[:, -5:] = 0
        alone, padded = model(ids), model(right, attention_mask=right_mask)
        assert torch.allclose(together.latents[index], alone.latents[0], atol=1e-5)
        assert torch.allclose(together.logits[index][real], alone.logits[0], atol=1e-4)
        assert torch.allclose(padded.logits[:, :-5], alone.logits, atol=1e-5)


def test_replacing_the_reasoners_weights_changes_the_logits(model):
    batch = make_batch(model, ROWS[:2])
    before = model(**batch).logits
    with torch.no_grad():
        for parameter in model.reasoner.recursion.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert (model(**batch).logits - before).abs().max() > 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reasoner", ["trm", "compressor", "static", "pause", "coconut"])
def test_every_trainable_tensor_has_had_a_gradient_after_one_step(reasoner, precision, checkpointing):
    model = make_model("smollm3", TOKENIZER, reasoner=reasoner).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = make_batch(model, ROWS[:4])
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trainable.values(), lr=1e-3)
    seen = set()
    for _ in range(2):
        with torch.autocast("cpu", precision) if precision else nullcontext():
            output = model(**batch)
        halting = 0 if output.halting_logit is None else output.halting_logit.square().sum()
        (output.loss + halting).backward()
        seen |= {name for name, p in trainable.items() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
        optimizer.zero_grad()
    assert seen == set(trainable) and len(seen) > 8


@pytest.mark.parametrize("reasoner", ["trm", "coconut"])
def test_checkpointing_does_not_change_loss_or_gradients(reasoner):
    gradients = []
    for checkpointing in (False, True):
        model = make_model("smollm3", TOKENIZER, reasoner=reasoner).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**make_batch(model, ROWS[:2])).loss
        loss.backward()
        gradients.append(torch.cat([loss[None], *(p.grad.flatten() for p in model.parameters() if p.grad is not None)]))
    assert torch.allclose(*gradients, atol=1e-6)


def test_more_latents_than_prompt_tokens_work():
    model = make_model("smollm3", TOKENIZER, num_latents=200)
    output = model(**make_batch(model, ROWS[:2]))
    assert output.latents.shape == (2, 200, 32) and torch.isfinite(output.loss)


def test_the_loss_is_over_the_completion_and_its_end_of_text_only(model):
    batch = make_batch(model, ROWS[:3])
    output = model(**batch)
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses = torch.nn.functional.cross_entropy(full[:, :-1].transpose(1, 2), batch["labels"][:, 1:])
    assert torch.allclose(output.loss, losses, atol=1e-5)
    for row, labels in zip(ROWS, batch["labels"], strict=False):
        text = model.tokenizer.decode(labels[labels != IGNORED_LABEL])
        assert text == f" #### {row['answer'].rsplit('#### ')[-1]}<|im_end|>"


def test_logits_of_the_supervised_columns_alone_give_the_same_loss():
    model = make_model("smollm3", TOKENIZER)
    batch = make_batch(model, ROWS[:3])
    whole, columns = model(**batch), supervised_columns(batch["labels"])
    few = model(**batch, logits_to_keep=columns)
    assert few.logits.shape[1] == columns < whole.logits.shape[1]
    assert torch.allclose(few.logits, whole.logits[:, -columns:], atol=1e-6)
    assert torch.allclose(few.loss, whole.loss, atol=1e-6)
    halves = model(**batch, num_items_in_batch=2 * int((batch["labels"] != IGNORED_LABEL).sum()))
    assert torch.allclose(2 * halves.loss, whole.loss, atol=1e-6)


def test_hidden_size_comes_from_the_configuration(model):
    assert model.reasoner.scale.anchor.shape == (model.config.hidden_size,)
    assert model.reasoner.compressor.to_key_value.in_features == 3 * model.config.hidden_size


@pytest.mark.parametrize("training", [False, True])
def test_the_read_pass_gives_the_states_of_spread_layers_bitwise(model, training):
    model.train(training)
    if training:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    depth = model.config.num_hidden_layers
    assert model.reasoner.read_depths == [round(depth / 3), round(2 * depth / 3), depth]
    batch = make_batch(model, ROWS[:3])
    prompt = model.model.prompt_before(batch["input_ids"], batch["attention_mask"], slots_of(model, batch))
    found = prompt.hidden_states(model.reasoner.read_depths)
    with torch.no_grad():
        kept = model.model.language_model(
            inputs_embeds=prompt.embeddings,
            attention_mask=prompt.mask.long(),
            position_ids=positions_of(prompt.mask),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
    for layer, state in zip(model.reasoner.read_depths, found, strict=True):
        assert torch.equal(state, kept[layer])
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("depths", [[0], [1], [1, 2], [0, 3]])
def test_any_layers_may_be_read(model, depths):
    embeddings = torch.randn(1, 5, 32)
    decoder = model.model.language_model
    kept = decoder(inputs_embeds=embeddings, output_hidden_states=True).hidden_states
    found = hidden_states_at(decoder, depths, inputs_embeds=embeddings)
    assert all(torch.equal(state, kept[depth]) for state, depth in zip(found, depths, strict=True))


def test_slots_take_ordinary_positions_and_hold_their_latents_in_order(model):
    batch = make_batch(model, ROWS[:2])
    seen = []
    decoder = model.model.language_model
    handle = decoder.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    output = model(**batch)
    handle.remove()
    given = seen[-1]
    assert torch.equal(given["position_ids"], positions_of(batch["attention_mask"]))
    assert torch.equal(given["inputs_embeds"][slots_of(model, batch)].view(2, 6, 32), output.latents)


def test_latents_lie_around_the_anchor_at_the_size_of_the_embedding_table(model):
    table = model.get_input_embeddings().weight.detach()
    latents = model(**make_batch(model, ROWS[:2])).latents
    around = latents - table[TOKENIZER(ANCHOR_TEXT, add_special_tokens=False)["input_ids"][-1]]
    assert torch.isclose(around.square().mean(), table.square().mean(), rtol=1e-2)


def test_the_recursion_may_be_narrower_than_the_base():
    model = make_model("smollm3", TOKENIZER, reasoner_settings={**SMALL_TRM, "dim": 16})
    assert model.reasoner.recursion.network.dim == 16 and model(**make_batch(model, ROWS[:2])).latents.shape[-1] == 32


@pytest.mark.parametrize(
    ("changes", "learns"),
    [
        ({"base_training": "frozen", "reasoner": None}, set()),
        ({"base_training": "frozen", "reasoner": "static"}, {"model.reasoner.states", "model.reasoner.scale.gain"}),
        ({"base_training": "frozen", "reasoner": "coconut"}, set()),
    ],
)
def test_a_frozen_base_leaves_learning_to_the_reasoner(changes, learns):
    model = make_model("smollm3", TOKENIZER, **changes)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == learns


@pytest.mark.parametrize(
    ("architecture", "adapted"),
    [("smollm3", {"q_proj", "k_proj", "v_proj", "o_proj"}), ("gpt2", {"c_attn", "c_proj"})],
)
def test_the_adapter_is_on_every_attention_projection_and_nowhere_else(architecture, adapted):
    model = SmolLMv3WithTRM.from_base((make_base(architecture, TOKENIZER), TOKENIZER))
    names = [name.split(".") for name, _ in model.named_parameters() if "lora_A" in name]
    assert {parts[parts.index("lora_A") - 1] for parts in names} == adapted
    assert not any("mlp" in parts or "reasoner" in parts for parts in names)
    lora = model.model.language_model.peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (16, 32, 0.1)


def test_the_seed_alone_decides_the_new_weights():
    drawn = []
    for noise, seed in ((1, 3), (2, 3), (1, 4)):
        base = make_base("smollm3", TOKENIZER)
        torch.manual_seed(noise)
        model = SmolLMv3WithTRM.from_base((base, TOKENIZER), num_latents=6, reasoner_settings=SMALL_TRM, seed=seed)
        drawn.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_a_prompt_without_a_span_or_with_half_of_one_is_refused_with_the_call_that_writes_it(model):
    ids = torch.tensor([model.encoder.encode_prompt(ROWS[0]["question"])])
    without = ids[ids != model.config.slot_token_id][None]
    for wrong in (without, ids[:, :-3], torch.cat([without, ids[:, : without.shape[1]]])):
        for call in (model, partial(model.generate, max_new_tokens=2), model.think):
            with pytest.raises(UserMistake, match="a prompt without a latent span: .*generate_with_thinking"):
                call(wrong)


def test_only_the_first_run_of_slot_tokens_is_a_span(model):
    ids = torch.tensor([model.encoder.encode_prompt(ROWS[0]["question"])])
    table, slot = model.get_input_embeddings().weight, model.config.slot_token_id
    seen = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["inputs_embeds"]), with_kwargs=True
    )
    model(torch.cat([ids, torch.full((1, 2), slot)], dim=1))
    assert torch.equal(seen[-1][0, -2:], table[[slot, slot]])


@pytest.mark.parametrize("n_slots", [5, 7])
def test_a_row_with_fewer_slots_takes_its_first_latents_and_with_more_is_refused(n_slots):
    model = make_model("smollm3", TOKENIZER)
    prompt = model.encoder.encode_prompt(ROWS[0]["question"])
    slot = model.config.slot_token_id
    first = prompt.index(slot)
    ids = torch.tensor([prompt[:first] + [slot] * n_slots + prompt[first + 6 :]])
    if n_slots == 5:
        assert torch.isfinite(model(ids).logits).all()
    else:
        with pytest.raises(UserMistake, match="a prompt with 7 latent slots, but there are 6 latents"):
            model(ids)
