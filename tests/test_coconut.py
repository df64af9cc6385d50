"""Coconut: a slot holds the base's own final hidden state of the position before it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_recursion import HERE, ORACLES
from transformers import AutoConfig, GPT2Config
from twins import ROWS, make_batch, make_model, make_tokenizer

from smollm_trm.data.batching import pad_left
from smollm_trm.data.prompts import padding_token_id
from smollm_trm.models.configuration import LatentReasoningConfig
from smollm_trm.models.smollm import SmolLMv3WithTRM

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
