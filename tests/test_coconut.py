"""Coconut: a slot holds the base's own final hidden state of the position before it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_recursion import HERE, ORACLES
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoConfig, GPT2Config, PreTrainedTokenizerFast
from twins import ROWS, make_batch, make_model, make_tokenizer

from smollm_trm.data.batching import collate_examples, pad_left, supervised_columns
from smollm_trm.data.prompts import EncodedExample, add_markers, padding_token_id
from smollm_trm.models.configuration import LatentReasoningConfig
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.records import UserMistake
from smollm_trm.training.module import SmolLMTRMLightningModule
from smollm_trm.training.settings import TrainSettings

TOKENIZER = make_tokenizer()
REFERENCE = GPT2Config(
    vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_inner=128, n_positions=512,
    attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def load_oracle(file: Path) -> tuple[dict[str, torch.Tensor], SmolLMv3WithTRM, float]:
    """The reference's tensors, our model with its weights, and its loss."""
    oracle = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    base = AutoConfig.for_model(**json.loads(metadata["config"])) if "config" in metadata else REFERENCE
    config = LatentReasoningConfig(
        text_config=base,
        reasoner="coconut",
        num_latents=6,
        slot_token_id=base.vocab_size - 1,
        base_training="full",
    )
    model = SmolLMv3WithTRM(config).eval()
    weights = {name.removeprefix("weights."): v for name, v in oracle.items() if name.startswith("weights.")}
    named = {f"model.language_model.{name.split('.', 1)[1]}": v for name, v in weights.items() if "lm_head" not in name}
    found = model.load_state_dict(named, strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) <= {"lm_head.weight"}
    model.tie_weights()
    return oracle, model, json.loads(metadata["line"])["loss"]


@pytest.mark.parametrize("file", [HERE / "coconut_qwen2_small.safetensors", ORACLES / "coconut_gpt2.safetensors"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_matches_the_reference_with_rows_of_different_numbers_of_latents(file, checkpointing):
    """The small file comes from a plain reimplementation (a pass per latent over the whole row, no batch, no cache)
    that reproduces the large one, the reference's own."""
    if not file.is_file():
        pytest.skip(f"the reference outputs {file.name} are not here (set ORACLES_DIR)")
    oracle, model, loss = load_oracle(file)
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    batch = {name.removeprefix("batch."): v for name, v in oracle.items() if name.startswith("batch.")}
    counts = (batch["input_ids"] == model.config.slot_token_id).sum(1)
    assert {5, 6} <= set(counts.tolist())
    output = model(**batch)
    assert abs(output.loss.item() - loss) < 2e-4
    real = batch["attention_mask"].bool()
    assert torch.allclose(output.logits[real], oracle["logits"][real], atol=2e-4)
    output.loss.backward()
    for name, expected in oracle.items():
        if name.startswith("grads.") and "lm_head" not in name:
            found = model.model.language_model.get_parameter(name.removeprefix("grads.").split(".", 1)[1])
            assert torch.allclose(found.grad, expected, atol=2e-4), name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["smollm3", "qwen2", "gpt2"])
def test_rows_of_five_and_six_latents_are_each_as_alone(architecture, side):
    model = make_model(architecture, TOKENIZER, reasoner="coconut")
    rows = [model.encoder.encode(row) for row in ROWS[:4]]
    slot = model.config.slot_token_id
    ids = [example.prompt + example.completion for example in rows]
    ids[0].remove(slot), ids[2].remove(slot)
    padding = padding_token_id(TOKENIZER)
    batch, mask = pad_left(ids if side == "left" else [row[::-1] for row in ids], padding)
    if side == "right":
        batch, mask = batch.flip(1), mask.flip(1)
    together = model(batch, attention_mask=mask)
    for index, row in enumerate(ids):
        alone = model(torch.tensor([row]))
        n_slots = row.count(slot)
        assert n_slots == (5 if index in (0, 2) else 6)
        assert torch.allclose(together.logits[index][mask[index].bool()], alone.logits[0], atol=1e-5)
        assert torch.allclose(together.latents[index, :n_slots], alone.latents[0], atol=1e-5)


def test_a_latent_is_the_final_hidden_state_of_the_position_before_it():
    model = make_model("llama", TOKENIZER, reasoner="coconut")
    batch = make_batch(model, ROWS[:1])
    output = model(**batch, output_hidden_states=True)
    first = int((batch["input_ids"][0] == model.config.slot_token_id).int().argmax())
    states = output.hidden_states[-1][0, first - 1 : first + 5]
    assert torch.allclose(output.latents[0], states, atol=1e-5)


def test_gradients_go_through_every_thought():
    model = make_model("llama", TOKENIZER, reasoner="coconut", base_training="full")
    batch = make_batch(model, ROWS[:2])
    latents = model.think(batch["input_ids"], batch["attention_mask"])[-1].latents
    latents.retain_grad()
    model(**batch, latents=latents).loss.backward()
    assert bool((latents.grad.abs().sum(-1) > 0).all())
    through, table = [p.grad.clone() for p in model.parameters()], model.get_input_embeddings()
    model.zero_grad()
    model(**batch, latents=latents.detach()).loss.backward()
    assert not torch.allclose(through[0], table.weight.grad)


def test_nothing_of_its_own_is_trained_or_saved(tmp_path):
    model = make_model("smollm3", TOKENIZER, reasoner="coconut")
    assert model.reasoner.parameter_groups(1e-3) == [] and not list(model.reasoner.parameters())
    model.merge_and_unload().save_pretrained(tmp_path)
    loaded = SmolLMv3WithTRM.from_pretrained(tmp_path)
    questions = [row["question"] for row in ROWS[:3]]
    assert loaded.generate_with_thinking(questions, max_new_tokens=6) == model.generate_with_thinking(
        questions, max_new_tokens=6
    )


def rows_of_several_numbers(model: SmolLMv3WithTRM, counts: tuple[int, ...]) -> list[EncodedExample]:
    """Rows with so many slots each, under a curriculum that allows it."""
    encoder = model.encoder
    model.write_prompts(num_slots=model.num_latents)
    return [encoder.encode(row, n_slots=count) for row, count in zip(ROWS, counts, strict=False)]


@pytest.mark.parametrize(
    ("architecture", "prompt_format", "counts"),
    [
        ("smollm3", "coconut", (0, 2, 6, 5)),
        ("qwen2", "plain", (0, 2, 6, 5)),
        ("gpt2", "coconut", (0, 2, 6, 5)),
        ("gpt2", "plain", (6, 6, 6)),
        ("gpt2", "coconut", (0, 1)),
        ("gpt2", "coconut", (0, 0)),
    ],
)
def test_the_last_pass_from_the_thoughts_cache_equals_a_pass_over_everything(architecture, counts, prompt_format):
    options = {"reasoner": "coconut", "base_training": "full", "prompt_format": prompt_format}
    model = make_model(architecture, TOKENIZER, **options)
    rows = rows_of_several_numbers(model, counts)
    padding, seen = padding_token_id(TOKENIZER), []
    batch = collate_examples(rows, padding)
    kept = supervised_columns(batch["labels"])
    whole = model(**batch)
    whole.loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    decoder = model.model.language_model
    count = lambda _, args, given: seen.append(given["inputs_embeds"].shape[1])  # noqa: E731
    decoder.register_forward_pre_hook(count, with_kwargs=True)
    found = model(**batch, logits_to_keep=kept, use_cache=False)
    before = max(len(row.prompt) - row.n_behind for row in rows)
    expected_columns = batch["input_ids"].shape[1] - before - min(*counts, max(counts) - 1)
    assert not max(counts) or seen[-1] == expected_columns, "the last pass read again what the thoughts had read"
    found.loss.backward()
    assert torch.allclose(found.logits, whole.logits[:, -kept:], atol=2e-5) and torch.isclose(found.loss, whole.loss)
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], atol=1e-5), name
    for index, row in enumerate(rows):
        alone = model(**collate_examples([row], padding))
        n_behind = row.n_behind + len(row.completion)
        begin = batch["input_ids"].shape[1] - max(one.n_behind + len(one.completion) for one in rows)
        mine = whole.logits[index, begin : begin + n_behind]
        assert torch.allclose(mine, alone.logits[0, -n_behind:], atol=2e-5), "a row depends on its neighbours"


def test_thoughts_do_not_see_what_is_behind_them():
    model = make_model("gpt2", TOKENIZER, reasoner="coconut")
    batch = collate_examples(rows_of_several_numbers(model, (3, 0, 6)), padding_token_id(TOKENIZER))
    kept = supervised_columns(batch["labels"])
    before = model(**batch, logits_to_keep=kept, use_cache=False)
    batch["input_ids"][:, -4:] = 7
    after = model(**batch, logits_to_keep=kept, use_cache=False)
    assert torch.equal(before.latents, after.latents)
    assert torch.allclose(before.logits[:, : kept - 4], after.logits[:, : kept - 4], atol=1e-6)
    assert not torch.allclose(before.logits[:, -1], after.logits[:, -1])


@pytest.mark.parametrize("slots", [0, 4])
def test_generation_with_a_cache_writes_what_it_writes_without(slots):
    model = make_model("gpt2", TOKENIZER, reasoner="coconut", prompt_format="coconut")
    model.write_prompts(num_slots=slots)
    questions = [row["question"] for row in ROWS[:4]]
    cached = model.generate_with_thinking(questions, max_new_tokens=8)
    assert model.generate_with_thinking(questions, max_new_tokens=8, use_cache=False) == cached
    assert [model.generate_with_thinking(question, max_new_tokens=8) for question in questions] == cached
    rows = [model.encoder.encode_prompt(question) for question in questions[:2]]
    batch, mask = pad_left(rows, padding_token_id(TOKENIZER))
    own = model.latents_for(batch, mask)
    assert own.shape[1] == slots
    lent = model(batch, attention_mask=mask, latents=own.flip(0)).logits
    assert torch.equal(lent, model(batch, attention_mask=mask, latents=own).logits) is (slots == 0)


def test_a_prompt_without_a_span_is_refused_unless_a_curriculum_allows_it():
    model = make_model("gpt2", TOKENIZER, reasoner="coconut", prompt_format="coconut")
    ids = torch.tensor([TOKENIZER("no span here")["input_ids"]])
    with pytest.raises(UserMistake, match="a prompt without a latent span"):
        model(ids)
    model.write_prompts(num_slots=0)
    assert model(ids).latents is None


def test_a_base_in_bf16_weights_is_told_by_name_once(caplog):
    model = make_model("gpt2", TOKENIZER, reasoner="coconut").to(torch.bfloat16)
    batch = make_batch(model, ROWS[:2])
    with torch.no_grad():
        model(**batch), model(**batch)
    assert caplog.text.count("reasoner 'coconut' on a base in bfloat16 weights: they hurt it") == 1
    assert TrainSettings(reasoner="coconut", precision="bf16-mixed").wants_fp32_base
    assert not TrainSettings(precision="bf16-mixed").wants_fp32_base


def test_the_references_loss_comes_out_of_the_whole_path():
    """Text to ids by the Coconut format, rows of 5 and 6 latents, the collated batch, the module's training step."""
    file = ORACLES / "coconut_gpt2.safetensors"
    if not file.is_file():
        pytest.skip(f"the reference outputs {file.name} are not here (set ORACLES_DIR)")
    oracle, model, loss = load_oracle(file)
    names = ["E", "u", *map(str, range(2, 509))]
    words = Tokenizer(models.WordLevel({name: at for at, name in enumerate(names)}, unk_token="u"))
    words.pre_tokenizer, words.normalizer = pre_tokenizers.WhitespaceSplit(), normalizers.Replace("###", " ")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="E", pad_token="E", unk_token="u")
    assert add_markers(tokenizer) == [509, 510, 511]
    for name, value in {"prompt_format": "coconut", "num_slots": 6, "target": "steps"}.items():
        setattr(model.config, name, value)
    model.use_tokenizer(tokenizer)
    examples = []
    for ids, mask in zip(oracle["batch.input_ids"].tolist(), oracle["batch.attention_mask"].bool(), strict=True):
        row = [token for token, real in zip(ids, mask.tolist(), strict=True) if real]
        start, end = row.index(509), row.index(510)
        question, tail = (" ".join(names[token] for token in part) for part in (row[:start], row[end + 1 : -2]))
        answer = f"{tail}\n#### {row[-2]}"
        examples.append(model.encoder.encode({"question": question, "answer": answer}, n_slots=end - start - 1))
        assert examples[-1].prompt + examples[-1].completion == row
    module = SmolLMTRMLightningModule(model=model)
    module.log = lambda *args, **options: None
    module._trainer = SimpleNamespace(world_size=1, global_step=0, accumulate_grad_batches=1)
    found = module.training_step(collate_examples(examples, 0), 0)
    found.backward()
    assert abs(found.item() - loss) < 2e-4
    for name, expected in oracle.items():
        if name.startswith("grads.") and "lm_head" not in name:
            ours = model.model.language_model.get_parameter(name.removeprefix("grads.").split(".", 1)[1])
            assert torch.allclose(ours.grad, expected, atol=2e-4), name
