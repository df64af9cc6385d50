"""What a tiny twin cannot show: the same promises on SmolLM2-135M's real weights (`make test` fetches them)."""

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from smollm_trm.data.batching import collate_examples, supervised_columns
from smollm_trm.data.prompts import padding_token_id
from smollm_trm.models.reasoners.reasoner import latent_variation
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.span import whole_spans
from smollm_trm.training.optim import OptimizerSettings, build_optimizer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from _smollm2 import smollm2_folder  # noqa: E402

SAMPLE = Path(__file__).parent / "data" / "gsm8k_sample.jsonl"
ROWS = sorted(map(json.loads, SAMPLE.read_text(encoding="utf-8").splitlines()), key=lambda row: len(str(row)))
QUESTION = "Tom has 3 bags of 4 apples. He eats 2. How many are left?"


@pytest.fixture(scope="module")
def folder() -> str:
    found = smollm2_folder(fetch=False)
    if found is None:
        pytest.skip("SmolLM2-135M is not here: `make real-base` fetches it, or set SMOLLM2_GGUF")
    return str(found)


@pytest.fixture(scope="module")
def plain(folder) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def on_the_base(plain, tokenizer) -> Callable[..., SmolLMv3WithTRM]:
    """Models around one and the same frozen base, which is loaded once."""
    return lambda **config: SmolLMv3WithTRM.from_base((plain, tokenizer), base_training="frozen", **config).eval()


def make_batch(model: SmolLMv3WithTRM, count: int) -> dict[str, torch.Tensor]:
    return collate_examples([model.encoder.encode(row) for row in ROWS[:count]], padding_token_id(model.tokenizer))


@torch.no_grad()
def loss_of(model: SmolLMv3WithTRM, count: int) -> float:
    batch = make_batch(model, count)
    return float(model(**batch, logits_to_keep=supervised_columns(batch["labels"])).loss)


def test_the_control_is_the_real_base_bit_for_bit(plain, on_the_base):
    model = on_the_base(reasoner=None)
    ids = torch.tensor([model.encoder.encode_prompt(QUESTION)])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_an_untuned_base_is_asked_without_a_think_block(plain, on_the_base):
    model = on_the_base(reasoner=None, think=False)
    asked = model.tokenizer(f"Question: {QUESTION}\nAnswer:", return_tensors="pt")
    row = plain.generate(**asked, max_new_tokens=16, do_sample=False)[0, asked["input_ids"].shape[1] :]
    written = model.tokenizer.decode(row, skip_special_tokens=True)
    assert model.generate_with_thinking(QUESTION, max_new_tokens=16) == written


def test_at_the_start_the_model_is_close_to_the_real_base(on_the_base):
    """On four problems; `benchmarks/distance_at_start.py` measures more of them, and holds 0.05 nat."""
    control, model = on_the_base(reasoner=None), on_the_base(num_latents=16)
    assert loss_of(model, count=4) - loss_of(control, count=4) <= 0.1
    model.reasoner.scale.gain.data.fill_(300.0)  # the check can fail: latents as large as normed states
    assert loss_of(model, count=1) - loss_of(control, count=1) > 0.1


@dataclass
class Trained:
    """A model after three steps, and what was seen before and meanwhile."""

    model: SmolLMv3WithTRM
    losses: list[float] = field(default_factory=list)
    """Before each step and after the last one."""
    variation: dict[str, float] = field(default_factory=dict)
    energy_of_five: dict[str, float] = field(default_factory=dict)
    """Share of the five largest dimensions in a layer's states, and in what is read of them."""


@pytest.fixture(scope="module")
def trained(plain, tokenizer) -> Trained:
    """The one training on the real base: its reasoner fitted, then three steps as a run takes them."""
    model = SmolLMv3WithTRM.from_base((deepcopy(plain), tokenizer), num_latents=8, target="answer", seed=0)
    model.fit_reasoner([row["question"] for row in ROWS[6:9]])
    seen, reasoner, batch = Trained(model), model.reasoner, make_batch(model, count=3)
    slots = whole_spans(batch["input_ids"], model.config.slot_token_id)
    with torch.no_grad():
        prompt = model.model.prompt_before(batch["input_ids"], batch["attention_mask"], slots)
        layers = prompt.hidden_states(reasoner.read_depths)
        read = reasoner.standardize(layers)[prompt.mask]
        seen.energy_of_five = {"layer": share_of_five(layers[1][prompt.mask]), "read": share_of_five(read)}
        seen.variation["compressed"] = float(latent_variation(reasoner.compress(layers, prompt.mask)))
    optimizer = build_optimizer(
        base=[p for name, p in model.named_parameters() if ".reasoner." not in name],
        reasoner=reasoner,
        settings=OptimizerSettings(),
    )
    columns = supervised_columns(batch["labels"])
    for step in range(4):
        with torch.set_grad_enabled(step < 3):
            output = model.train()(**batch, logits_to_keep=columns)
        seen.losses.append(output.loss.item())
        if step < 3:
            optimizer.zero_grad()
            output.loss.backward()
            assert all(float(p.grad.abs().sum()) > 0 for p in reasoner.compressor.parameters())
            optimizer.step()
    seen.variation["after"] = float(latent_variation(output.latents))
    return seen


def test_three_steps_lower_the_loss_and_a_saved_model_answers_as_before(trained, tmp_path):
    assert trained.losses[3] < trained.losses[0] - 0.1
    answer = trained.model.eval().generate_with_thinking(QUESTION, max_new_tokens=8)
    trained.model.save_pretrained(tmp_path)
    saved = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert saved < 60e6, "a copy of the base was saved"
    assert SmolLMv3WithTRM.from_pretrained(tmp_path).generate_with_thinking(QUESTION, max_new_tokens=8) == answer


def test_what_is_read_is_not_drowned_and_the_latents_stay_apart_through_the_first_steps(trained):
    """A few dimensions hold nearly all of a real layer's energy; on a twin none does."""
    assert trained.energy_of_five["layer"] > 0.9 and trained.energy_of_five["read"] < 0.05
    assert trained.variation["compressed"] > 0.3 and trained.variation["after"] > 0.1


def share_of_five(states: torch.Tensor) -> float:
    """The share of all energy that the five largest dimensions hold."""
    energy = states.float().square().mean(0)
    return float(energy.topk(5).values.sum() / energy.sum())
