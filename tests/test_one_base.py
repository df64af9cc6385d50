"""One base, loaded once: handed from model to model, trained around, exported with the adapter merged into it."""

import json

import pytest
import torch
from runs import TINY_RUN, save_tiny_base, train_tiny, trainable_weights
from twins import ROWS, SMALL_TRM, make_batch, make_model, make_tokenizer

from smollm_trm.finetune import run_identity
from smollm_trm.models.adapters import adapter_layers
from smollm_trm.models.export import export_merged
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.training.settings import TrainSettings

TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def frozen(folder: str) -> SmolLMv3WithTRM:
    return SmolLMv3WithTRM.from_base(folder, reasoner=None, base_training="frozen").eval()


def test_a_base_that_is_handed_on_is_bit_for_bit_what_it_was(folder):
    base = frozen(folder)
    ids = torch.arange(1, 15).view(2, 7)
    before = base(input_ids=ids).logits
    first = SmolLMv3WithTRM.from_base(base.unload(), num_latents=3, reasoner_settings=SMALL_TRM)
    with torch.no_grad():
        for name, parameter in first.named_parameters():
            if "lora_" in name:
                parameter.fill_(0.5)
    assert not torch.equal(base(input_ids=ids).logits, before)  # the adapter stands in the shared decoder
    second = SmolLMv3WithTRM.from_base(base.unload(), reasoner=None).eval()
    assert torch.equal(second(input_ids=ids).logits, before)
    assert len(adapter_layers(base.model.language_model)) == len(adapter_layers(second.model.language_model)) > 0
    base.unload()
    assert torch.equal(base(input_ids=ids).logits, before) and not adapter_layers(base.model.language_model)


def test_training_around_a_loaded_base_is_training_by_its_name(folder, tmp_path):
    base = frozen(folder)
    options = {"max_steps": 2, "target": "answer"}
    for use_trm in (False, True):
        _, by_name = train_tiny(folder, tmp_path / f"name-{use_trm}", use_trm=use_trm, **options)
        _, loaded = train_tiny(folder, tmp_path / f"loaded-{use_trm}", use_trm=use_trm, base=base.unload(), **options)
        expected, found = trainable_weights(by_name), trainable_weights(loaded)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        configs = [
            json.loads((tmp_path / f"{how}-{use_trm}/model/config.json").read_text()) for how in ("name", "loaded")
        ]
        assert configs[0]["base_model"] == configs[1]["base_model"] != ""
    reloaded = SmolLMv3WithTRM.from_pretrained(tmp_path / "loaded-True/model", model_name=base.unload())
    question = ROWS[0]["question"]
    assert reloaded.generate_with_thinking(question, max_new_tokens=4) == by_name.model.generate_with_thinking(
        question, max_new_tokens=4
    )


@pytest.mark.parametrize("architecture", ["smollm3", "qwen2", "gpt2"])
def test_a_merged_export_needs_no_base_and_answers_as_the_model_which_stays_as_it_is(architecture, tmp_path):
    model = make_model(architecture, TOKENIZER)
    batch = make_batch(model, ROWS[:3])
    before = model(**batch).logits
    export_merged(model, tmp_path)
    assert torch.equal(model(**batch).logits, before) and adapter_layers(model.model.language_model)
    alone = SmolLMv3WithTRM.from_pretrained(tmp_path, dtype=torch.float32, device="cpu")
    assert alone.config.base_model == "" and not adapter_layers(alone.model.language_model)
    assert (alone(**batch).logits - before).abs().max() < 5e-3  # 16 bits
    assert not list(tmp_path.glob("*.bin")) and (tmp_path / "README.md").is_file()


def test_runs_share_an_identity_where_one_may_go_on_as_the_other():
    def identity(split: str = "s", **changes) -> str:
        known = {name: value for name, value in TINY_RUN.items() if name != "trm_kwargs"}
        return run_identity(TrainSettings(**{**known, **changes}), split=split)

    assert identity() == identity(output_dir="elsewhere", resume="never", progress=True, eval_batch_size=2)
    assert len({identity(), identity(seed=1), identity(num_latents=4), identity(split="t")}) == 4
    assert identity(use_trm=False) == identity(use_trm=False, num_latents=9, trm_learning_rate=0.1)
    assert identity(use_trm=False) != identity(use_trm=False, learning_rate=1e-4)
