"""The tokenizer of 16 tokens and the decoder in its sizes, as Hugging Face loads them."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from smollm_trm.arithmetic.commands import pick_device
from smollm_trm.arithmetic.model import (
    ARITHMETIC_TOKENS,
    arithmetic_config,
    build_arithmetic_model,
    build_arithmetic_tokenizer,
    load_arithmetic_model,
    save_arithmetic_model,
)
from smollm_trm.arithmetic.rules import count_tokens
from smollm_trm.arithmetic.settings import ARITHMETIC_SIZES
from smollm_trm.finetune import train_gsm8k
from smollm_trm.models.smollm import SmolLMv3WithTRM

CHAIN = "658+189=<think>8+9=17 5+8+1=14 6+1+1=8</think>847<end>"


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_arithmetic_model(build_arithmetic_model("tiny", seed=3), folder)
    return folder


def test_the_vocabulary_has_the_16_tokens_of_the_document():
    tokenizer = build_arithmetic_tokenizer()
    assert len(tokenizer) == len(ARITHMETIC_TOKENS) == 16
    assert set(tokenizer.get_vocab()) == {*"0123456789+=", "<end>", "<think>", "</think>", "<noop>"}
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<end>", "<noop>")


def test_a_space_is_one_noop_and_is_shown_as_a_space():
    tokenizer = build_arithmetic_tokenizer()
    ids = tokenizer(CHAIN)["input_ids"]
    assert len(ids) == count_tokens(CHAIN)
    assert tokenizer.convert_ids_to_tokens(ids).count("<noop>") == 2
    assert tokenizer(CHAIN.replace(" ", "<noop>"))["input_ids"] == ids
    assert tokenizer.decode(ids) == CHAIN


def test_a_saved_tokenizer_is_the_same_through_auto_tokenizer(tiny_folder):
    loaded = AutoTokenizer.from_pretrained(tiny_folder)
    assert loaded(CHAIN)["input_ids"] == build_arithmetic_tokenizer()(CHAIN)["input_ids"]
    assert loaded.decode(loaded(CHAIN)["input_ids"]) == CHAIN
    assert loaded.model_max_length == 128


@pytest.mark.parametrize("text", ["3-5=", "a", "3+5=\n", "<start>"])
def test_other_characters_are_refused_by_the_tokenizer(text):
    with pytest.raises(Exception, match="Missing"):
        build_arithmetic_tokenizer()(text)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("tiny", 395_904), ("small", 2_103_552), ("medium", 12_597_760), ("large", 25_182_720)],
)
def test_sizes_have_the_parameters_the_documentation_states(size, parameters):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(arithmetic_config(size))
    assert model.num_parameters() == parameters


def test_the_documents_shapes_are_kept():
    assert ARITHMETIC_SIZES["small"] == (4, 256, 4, 512)
    assert ARITHMETIC_SIZES["medium"] == (6, 512, 8, 1024)
    assert ARITHMETIC_SIZES["large"] == (8, 512, 8, 2048)


def test_a_saved_model_is_the_same_through_auto_model(tiny_folder):
    assert (tiny_folder / "model.safetensors").is_file()
    model = build_arithmetic_model("tiny", seed=3)
    loaded = AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = torch.tensor([build_arithmetic_tokenizer()(CHAIN)["input_ids"]])
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_seed_fixes_the_weights_and_leaves_the_global_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (build_arithmetic_model("tiny", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.model.embed_tokens.weight, again.model.embed_tokens.weight)
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_left_padding_changes_no_logit(tiny_folder):
    model, tokenizer = load_arithmetic_model(tiny_folder), build_arithmetic_tokenizer()
    alone = tokenizer("1+2=", return_tensors="pt", return_token_type_ids=False)
    padded = tokenizer(["1+2=", "123+456="], padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        expected = model(**alone).logits[0, -1]
        position_ids = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
        found = model(
            input_ids=padded["input_ids"], attention_mask=padded["attention_mask"], position_ids=position_ids
        ).logits[0, -1]
    torch.testing.assert_close(found, expected)


def test_the_weights_file_or_its_folder_name_the_checkpoint(tiny_folder):
    for path in (tiny_folder, tiny_folder / "model.safetensors"):
        model = load_arithmetic_model(path, model_size="tiny")
        assert model.config.hidden_size == 128
        assert not model.training


def test_a_checkpoint_of_another_size_is_refused_with_both_names(tiny_folder):
    with pytest.raises(ValueError, match="holds a model of size tiny, not small: leave --model-size out"):
        load_arithmetic_model(tiny_folder, model_size="small")


def test_a_missing_checkpoint_says_how_to_train_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: train a model with 'smollm-trm arithmetic train"):
        load_arithmetic_model(tmp_path / "model.safetensors")


def test_a_damaged_or_foreign_checkpoint_is_one_clear_line(tiny_folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    weights = (tiny_folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="could not load the weights of .*damaged") as caught:
        load_arithmetic_model(tmp_path)
    assert "\n" not in str(caught.value)
    save_arithmetic_model(build_arithmetic_model("tiny"), tmp_path)
    (tmp_path / "config.json").write_text(
        (tmp_path / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(ValueError, match="is no whole arithmetic model"):
        load_arithmetic_model(tmp_path)


@pytest.mark.parametrize(
    ("size", "length", "message"), [("huge", 128, "model_size='huge'"), ("tiny", 0, "max_length=0")]
)
def test_an_impossible_shape_is_refused(size, length, message):
    with pytest.raises(ValueError, match=message):
        arithmetic_config(size, max_length=length)


def test_devices_are_checked():
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device='tpu': choose one of auto, cpu, cuda"):
        pick_device("tpu")
    if not torch.cuda.is_available():
        assert pick_device("auto") == torch.device("cpu")
        with pytest.raises(ValueError, match="there is no GPU"):
            pick_device("cuda")


def test_a_reasoner_is_put_on_it_trained_reloaded_and_answers(tiny_folder, tmp_path):
    sums = [{"question": f"{a}+{b}=", "answer": f"#### {a + b}"} for a in range(10, 20) for b in range(20, 24)]
    trainer, module = train_gsm8k(
        train_dataset=sums[:32],
        test_dataset=sums[32:],
        model_name=str(tiny_folder),
        prompt_format="bare",
        target="answer",
        num_latents=4,
        max_length=32,
        trm_kwargs={"n_heads": 4, "compression_heads": 4, "n_supervision_steps": 2},
        max_steps=2,
        output_dir=str(tmp_path / "run"),
        progress=False,
    )
    reloaded = SmolLMv3WithTRM.from_pretrained(tmp_path / "run" / "model")
    assert reloaded.generate_with_thinking("12+21=", max_new_tokens=4) == module.model.generate_with_thinking(
        "12+21=", max_new_tokens=4
    )
    encoded = reloaded.encoder.encode(sums[0])
    assert reloaded.tokenizer.decode(encoded.prompt[:7]) == "10+20=<think>"
    assert reloaded.tokenizer.decode(encoded.completion) == "30<end>"


def test_code_that_comes_with_a_checkpoint_never_runs(tiny_folder, tmp_path, monkeypatch):
    folder = tmp_path / "foreign"
    shutil.copytree(tiny_folder, folder)
    proof = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(proof)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "unheard_of", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="it brings code of its own, which is not run"):
        load_arithmetic_model(folder)
    assert not proof.exists()
