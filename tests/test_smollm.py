"""What must always hold of a decoder with a latent span, on every architecture."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTModel, PreTrainedTokenizerFast
from twins import ARCHITECTURES, ROWS, SMALL_TRM, make_base, make_batch, make_model, make_tokenizer

from smollm_trm.data.batching import pad_left
from smollm_trm.models.output import states_at
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.span import LatentSpan
from smollm_trm.models.storage import ModelSettings

TOKENIZER = make_tokenizer()


@pytest.fixture(params=ARCHITECTURES)
def model(request) -> SmolLMv3WithTRM:
    return make_model(request.param, TOKENIZER)


def test_changing_the_answer_leaves_the_latents_bitwise_unchanged(model):
    question = ROWS[0]["question"]
    first, second = (make_batch(model, [{"question": question, "answer": f"#### {n}"}]) for n in (12, 987))
    assert torch.equal(model(**first).latents, model(**second).latents)


def test_the_answer_depends_on_the_latents_of_its_own_question(model):
    batch = make_batch(model, ROWS[:2])
    thoughts = model.think(batch["input_ids"], batch["attention_mask"])
    own = model(**batch, thought=thoughts[-1]).logits
    swapped = model(**batch, thought=thoughts[-1]._replace(latents=thoughts[-1].latents.flip(0))).logits
    assert (own - swapped).abs().max() > 1e-3


def test_a_row_does_not_depend_on_its_neighbours_or_on_padding(model):
    rows = sorted(ROWS[:8], key=lambda row: len(row["question"]))
    together = model(**make_batch(model, rows))
    for index in (0, len(rows) - 1):
        batch = make_batch(model, [rows[index]])
        alone = model(**batch)
        length = alone.logits.shape[1]
        assert torch.allclose(together.latents[index], alone.latents[0], atol=1e-5)
        supervised = alone.labels[0] != -100
        assert torch.allclose(together.logits[index, :length][supervised], alone.logits[0][supervised], atol=1e-4)


def test_replacing_the_reasoners_weights_changes_the_logits(model):
    batch = make_batch(model, ROWS[:2])
    before = model(**batch).logits
    with torch.no_grad():
        for parameter in model.reasoner.recursion.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert (model(**batch).logits - before).abs().max() > 1e-4


def test_every_trainable_tensor_has_had_a_gradient_after_one_step(model):
    model.train()
    batch = make_batch(model, ROWS[:4])
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trainable.values(), lr=1e-3)
    seen = set()
    for _ in range(2):
        output = model(**batch)
        (output.loss + output.halting_logit.square().sum()).backward()
        seen |= {name for name, p in trainable.items() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
        optimizer.zero_grad()
    assert seen == set(trainable)


def test_more_latents_than_prompt_tokens_work():
    model = make_model("smollm3", TOKENIZER, num_latents=200)
    output = model(**make_batch(model, ROWS[:2]))
    assert output.latents.shape == (2, 200, 32) and torch.isfinite(output.loss)


def test_the_loss_is_over_the_completion_and_its_end_of_text_only(model):
    batch = make_batch(model, ROWS[:3])
    output = model(**batch)
    full = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses = torch.nn.functional.cross_entropy(full[:, :-1].transpose(1, 2), batch["labels"][:, 1:], ignore_index=-100)
    assert torch.allclose(output.loss, losses, atol=1e-5)
    for row, labels in zip(ROWS, batch["labels"], strict=False):
        text = model.tokenizer.decode(labels[labels != -100])
        assert text == f" #### {row['answer'].rsplit('#### ')[-1]}<|im_end|>"


def test_without_latents_it_is_the_base_bit_for_bit():
    model = make_model("smollm3", TOKENIZER, reasoner=None, base_training="frozen")
    ids = torch.tensor([model.encoder.encode_prompt(ROWS[0]["question"])])
    assert model.tokenizer.decode(ids[0]).endswith("Answer: <think></think>")
    expected = model.base_model(input_ids=ids).logits
    assert torch.equal(model(ids).logits, expected)


def test_hidden_size_comes_from_the_configuration(model):
    assert model.reasoner.scale.anchor.shape == (model.config.hidden_size,)
    assert model.reasoner.compressor.to_key_value.in_features == 3 * model.config.hidden_size


def test_checkpointing_does_not_change_loss_or_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = make_model("smollm3", TOKENIZER).train()
        if checkpointing:
            model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**make_batch(model, ROWS[:2])).loss
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(*gradients, atol=1e-6)


def test_spans_in_different_columns_are_refused():
    rows = [[1, 9, 9, 2], [9, 9, 2, 3]]
    ids, mask = pad_left(rows, 0)
    with pytest.raises(ValueError, match="same columns"):
        LatentSpan.find(ids, mask, 9).columns()
    with pytest.raises(ValueError, match="no latent span"):
        LatentSpan.find(ids, mask, 8).columns()


def test_read_with_adapter_decides_whether_the_adapter_moves_the_latents():
    batch = make_batch(make_model("llama", TOKENIZER), ROWS[:2])
    for with_adapter in (True, False):
        model = make_model("llama", TOKENIZER, read_with_adapter=with_adapter)
        before = model(**batch).latents
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(3)
        assert torch.equal(before, model(**batch).latents) is not with_adapter


def test_slots_take_no_positions(model):
    batch = make_batch(model, ROWS[:2])
    positions = model.span_of(batch["input_ids"], batch["attention_mask"]).positions(batch["attention_mask"])
    baseline = make_model("llama", TOKENIZER, reasoner=None)
    without = make_batch(baseline, ROWS[:2])
    expected = baseline.span_of(without["input_ids"], without["attention_mask"]).positions(without["attention_mask"])
    slots = batch["input_ids"] == model.slot_id
    assert torch.equal(positions[~slots].view(2, -1), expected)
    start = int(slots[0].int().argmax())
    assert torch.equal(positions[:, start : start + 6], positions[:, start - 1 : start].expand(-1, 6))


def test_a_tokenizer_without_a_reserved_token_gets_one_that_the_base_never_sees(tmp_path):
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(["<eos>", "a", "b", "3", "#", "<unk>"])}, "<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    shape = {
        "vocab_size": len(tokenizer),
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    base = GPT2LMHeadModel(GPT2Config(**shape, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)).eval()
    settings = ModelSettings(num_latents=3, target="answer", trm=SMALL_TRM, base_training="frozen")
    model = SmolLMv3WithTRM.from_base((base, tokenizer), settings=settings).eval()
    assert model.slot_id >= base.config.vocab_size
    batch = make_batch(model, [{"question": "a b a", "answer": "#### 3"}, {"question": "b", "answer": "#### 3"}])
    assert int((batch["labels"] == tokenizer.eos_token_id).sum()) == 2, "the end-of-text label must stay"
    assert torch.isfinite(model(**batch).loss)
    ids, mask = pad_left([model.encoder.encode_prompt("a b"), model.encoder.encode_prompt("b")], 0)
    written = model.generate(ids, mask, max_new_tokens=3, repetition_penalty=1.2)
    assert torch.equal(written[:, : ids.shape[1]], ids)
    model.save_pretrained(tmp_path)
    assert SmolLMv3WithTRM.from_pretrained(tmp_path, model_name=(base, tokenizer)).slot_id == model.slot_id


def test_the_read_pass_gives_the_bases_own_states_of_spread_layers_without_gradient(model):
    depth = model.config.num_hidden_layers
    assert model.read_layers == [round(depth / 3), round(2 * depth / 3), depth]
    ids = torch.tensor([model.encoder.encode_question(ROWS[0]["question"])])
    states = model.read(ids, torch.ones_like(ids))
    expected = model.base_model(input_ids=ids, output_hidden_states=True).hidden_states
    for layer, state in zip(model.read_layers, states, strict=True):
        assert torch.allclose(state, expected[layer], atol=1e-5) and not state.requires_grad


def test_latents_lie_around_the_closing_tag_at_the_size_of_the_embedding_table(model):
    table = model.causal_lm.get_input_embeddings().weight.detach()
    latents = model(**make_batch(model, ROWS[:2])).latents
    around = latents - table[TOKENIZER.convert_tokens_to_ids("</think>")]
    assert torch.isclose(around.square().mean(), table.square().mean(), rtol=1e-2)


def test_the_recursion_may_be_narrower_than_the_base():
    model = make_model("smollm3", TOKENIZER, trm=replace(SMALL_TRM, dim=16))
    assert model.reasoner.recursion.network.dim == 16 and model(**make_batch(model, ROWS[:2])).latents.shape[-1] == 32


def test_a_bf16_base_takes_the_latents_of_an_fp32_reasoner():
    settings = ModelSettings(num_latents=6, trm=SMALL_TRM, target="answer")
    base = make_base("smollm3", TOKENIZER).to(torch.bfloat16)
    model = SmolLMv3WithTRM.from_base((base, TOKENIZER), settings=settings).eval()
    output = model(**make_batch(model, ROWS[:2]))
    assert output.logits.dtype == torch.bfloat16 and output.latents.dtype == torch.float32
    assert torch.isfinite(output.loss)
    assert isinstance(model.generate_with_thinking(ROWS[0]["question"], max_new_tokens=2), str)


@pytest.mark.parametrize(
    ("changes", "learns"),
    [
        ({"base_training": "frozen", "reasoner": None}, set()),
        ({"base_training": "frozen", "reasoner": "static"}, {"reasoner.states", "reasoner.scale.gain"}),
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
    model = SmolLMv3WithTRM.from_base((make_base(architecture, TOKENIZER), TOKENIZER), settings=ModelSettings())
    names = [name.split(".") for name, _ in model.base_model.named_parameters() if "lora_A" in name]
    assert {parts[parts.index("lora_A") - 1] for parts in names} == adapted
    assert not any("mlp" in parts for parts in names)
    lora = model.base_model.peft_config["default"]
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (16, 32, 0.1)


def test_the_seed_alone_decides_the_new_weights():
    drawn = []
    for noise, seed in ((1, 3), (2, 3), (1, 4)):
        base = make_base("smollm3", TOKENIZER)
        torch.manual_seed(noise)
        settings = ModelSettings(num_latents=6, trm=SMALL_TRM)
        model = SmolLMv3WithTRM.from_base((base, TOKENIZER), settings=settings, seed=seed)
        drawn.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_the_loss_is_a_mean_over_supervised_tokens_whose_columns_alone_get_logits():
    model = make_model("smollm3", TOKENIZER)
    batch = make_batch(model, ROWS[:3])
    columns = int((batch["labels"] != -100).any(0).sum())
    batch["labels"][0, -columns + 1 :] = -100
    output = model(**batch)
    assert output.logits.shape[:2] == output.labels.shape == (3, columns)
    losses = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), output.labels.flatten(), reduction="none")
    assert torch.allclose(output.loss, losses.sum() / (batch["labels"] != -100).sum(), atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("read_with_adapter", [True, False])
def test_the_states_read_are_bitwise_those_that_hugging_face_keeps(model, read_with_adapter, training):
    model.settings = replace(model.settings, read_with_adapter=read_with_adapter)
    model.train(training)
    if training:
        model.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    batch = make_batch(model, ROWS[:3])
    start, _ = model.span_of(batch["input_ids"], batch["attention_mask"]).columns()
    ids, mask = batch["input_ids"][:, :start], batch["attention_mask"][:, :start]
    found = model.read(ids, mask)
    with torch.no_grad(), nullcontext() if read_with_adapter else model.base_model.disable_adapter():
        kept = model.causal_lm.base_model(
            inputs_embeds=model.embed(ids, model.span_of(ids, mask)),
            attention_mask=mask,
            position_ids=model.span_of(ids, mask).positions(mask),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
    assert all(torch.equal(state, kept[depth]) for depth, state in zip(model.read_layers, found, strict=True))


def test_the_read_pass_leaves_no_hook_and_asks_for_no_other_state(model, monkeypatch):
    batch = make_batch(model, ROWS[:2])
    asked = []
    handle = model.causal_lm.base_model.register_forward_pre_hook(
        lambda _, __, given: asked.append(given.get("output_hidden_states")), with_kwargs=True
    )
    model.think(batch["input_ids"], batch["attention_mask"])
    handle.remove()
    assert asked == [None] and not any(module._forward_pre_hooks for module in model.causal_lm.modules())


def test_the_states_of_a_decoder_inside_a_decoder_are_found_too():
    torch.manual_seed(0)
    opt = OPTModel(OPTConfig(vocab_size=50, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4))
    ids = torch.randint(50, (2, 7))
    with torch.no_grad():
        found = states_at(opt.eval(), [1, 2, 3], input_ids=ids)
        kept = opt(input_ids=ids, output_hidden_states=True).hidden_states
    assert all(torch.equal(state, kept[depth]) for depth, state in enumerate(found, start=1))
