"""A base in 4 bits, and PEFT's own kinds of LoRA."""

import importlib
from importlib.util import find_spec

import pytest
import torch
from runs import train_tiny
from twins import ROWS, SMALL_TRM, make_batch, make_tokenizer

from smollm_trm.models.adapters import LoraSettings
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.tiny import build_tiny_model
from smollm_trm.records import UserMistake
from smollm_trm.training.settings import TrainSettings

pytestmark = pytest.mark.filterwarnings("ignore")  # of bitsandbytes
QUANTIZED = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """Linear layers of whole blocks of 64."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), make_tokenizer()
    build_tiny_model(tokenizer, hidden_size=64, n_layers=2, n_heads=4, intermediate_size=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def made(base: str, *, lora: LoraSettings | None = None, **options) -> SmolLMv3WithTRM:
    lora = lora or LoraSettings(dropout=0.0)
    return SmolLMv3WithTRM.from_base(base, num_latents=2, reasoner_settings=SMALL_TRM, lora=lora, **options)


def gradients(model: SmolLMv3WithTRM) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    model.zero_grad()
    model.train()(**make_batch(model, ROWS[:4])).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@QUANTIZED
def test_a_base_in_four_bits_has_the_gradients_of_its_own_weights(base):
    from bitsandbytes.functional import dequantize_4bit

    model, plain = made(base, load_in_4bit=True), made(base)
    model.eval().generate_with_thinking("Why?", max_new_tokens=2)  # an evaluation before changes nothing
    layers = dict(model.named_modules())
    quantized = [name for name, p in model.named_parameters() if p.dtype == torch.uint8]
    assert len(quantized) == 14, "seven linear layers in two blocks"
    for name in quantized:
        weight = layers[name.rpartition(".")[0]].weight
        with torch.no_grad():
            plain.get_parameter(name).copy_(dequantize_4bit(weight.data, weight.quant_state))
    plain.model.reasoner.load_state_dict(model.model.reasoner.state_dict())  # with what it measured
    found, expected = gradients(model), gradients(plain)
    assert found.keys() == expected.keys() and any("layers.0" in name for name in found)
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-5), name


@QUANTIZED
@pytest.mark.parametrize("lora", [{}, {"target_modules": "all-linear"}, {"use_dora": True}])
def test_a_run_on_a_base_in_four_bits_leaves_a_model_for_any_precision(base, lora, tmp_path):
    train_tiny(base, tmp_path, load_in_4bit=True, num_epochs=1, max_dev_samples=2, lora_kwargs={"r": 4, **lora})
    assert "quantization" not in (tmp_path / "model" / "config.json").read_text()
    four, whole = (SmolLMv3WithTRM.from_pretrained(tmp_path, load_in_4bit=one) for one in (True, False))
    assert any(p.dtype == torch.uint8 for p in four.parameters())
    assert not any(p.dtype == torch.uint8 for p in whole.parameters())
    for name, parameter in four.named_parameters():
        if "lora" in name or ".reasoner." in name:
            assert torch.equal(parameter, whole.get_parameter(name)), name
    assert isinstance(four.generate_with_thinking("Why?", max_new_tokens=2), str)
    with pytest.raises(UserMistake, match="the base is in 4 bits: save the adapter"):
        four.merge_and_unload()
    whole.merge_and_unload()


def test_without_bitsandbytes_four_bits_are_refused_in_a_line(base, monkeypatch):
    loading = importlib.import_module("smollm_trm.models.loading")
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(
        UserMistake, match=r"load_in_4bit=True needs bitsandbytes: pip install 'smollm-trm\[quantized\]'"
    ):
        made(base, load_in_4bit=True)
    for name in ("tiny", "a/b.gguf"):
        with pytest.raises(UserMistake, match="is for a base on the Hub or in a folder"):
            made(name, load_in_4bit=True)
    with pytest.raises(UserMistake, match="cannot do with 4 bits"):
        TrainSettings(load_in_4bit=True, base_training="full")


@pytest.mark.parametrize(
    ("lora", "n_layers"),
    [({"target_modules": "all-linear"}, 14), ({"use_rslora": True}, 8), ({"use_dora": True}, 8)],
)
def test_pefts_own_kinds_of_lora_train_and_come_back(base, lora, n_layers, tmp_path):
    model = made(base, lora=LoraSettings(r=4, alpha=8, dropout=0.0, **lora))
    found = gradients(model)
    assert sum("lora_B" in name for name in found) == n_layers and not any("lm_head" in name for name in found)
    assert any("magnitude" in name for name in found) is ("use_dora" in lora)
    layer = model.model.language_model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == (8 / 4**0.5 if "use_rslora" in lora else 2.0)
    model.eval().save_pretrained(tmp_path / "model")
    again = SmolLMv3WithTRM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([model.encoder.encode_prompt("Why?")])
    assert torch.equal(again(ids).logits, model(ids).logits)
    merged = again.merge_and_unload()(ids).logits
    assert torch.allclose(merged, model(ids).logits, atol=1e-4)
