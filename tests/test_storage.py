"""A saved model is small, plain, and the same model when it is loaded."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from twins import ROWS, SMALL_TRM, make_base, make_model, make_tokenizer, nameless_base

from smollm_trm.hub import model_card
from smollm_trm.models import assembly
from smollm_trm.models.loading import adapt_base, load_base
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.storage import ModelSettings

TOKENIZER = make_tokenizer()
QUESTIONS = [row["question"] for row in ROWS[:3]]


def fresh_base(architecture: str = "smollm3"):
    return make_base(architecture, TOKENIZER), TOKENIZER


@pytest.fixture
def saved(tmp_path):
    model = make_model("smollm3", TOKENIZER)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@pytest.mark.parametrize("architecture", ["smollm3", "gpt2"])
@pytest.mark.parametrize("reasoner", ["trm", "compressor", "static", None])
def test_a_reloaded_model_generates_the_same_text(tmp_path, architecture, reasoner):
    model = make_model(architecture, TOKENIZER, reasoner=reasoner)
    model.save_pretrained(tmp_path)
    loaded = SmolLMv3WithTRM.from_pretrained(tmp_path, model_name=fresh_base(architecture))
    options = {"max_new_tokens": 12, "do_sample": True}
    torch.manual_seed(3)
    before = model.generate_with_thinking(QUESTIONS, **options)
    torch.manual_seed(3)
    assert loaded.generate_with_thinking(QUESTIONS, **options) == before


def test_the_folder_holds_no_base_and_no_pickle(saved):
    model, folder = saved
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "reasoner.safetensors", "smollm_trm.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".ckpt"))]
    tensors = load_file(folder / "adapter_model.safetensors") | load_file(folder / "reasoner.safetensors")
    assert not any("embed_tokens" in name for name in tensors)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(t.numel() for name, t in tensors.items()) <= trained + 3 * 32 + 1


def test_a_base_trained_whole_is_saved_whole(tmp_path):
    model = make_model("smollm3", TOKENIZER, base_training="full", reasoner="trm")
    model.save_pretrained(tmp_path)
    loaded = SmolLMv3WithTRM.from_pretrained(tmp_path)
    assert loaded.generate_with_thinking(QUESTIONS, max_new_tokens=8) == model.generate_with_thinking(
        QUESTIONS, max_new_tokens=8
    )


def test_the_adapter_merges_into_the_base():
    model = make_model("smollm3", TOKENIZER)
    before = model.generate_with_thinking(QUESTIONS, max_new_tokens=8)
    merged = model.merge_and_unload()
    assert not hasattr(merged.base_model, "peft_config")
    assert merged.generate_with_thinking(QUESTIONS, max_new_tokens=8) == before


def test_a_folder_without_our_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no smollm_trm.json there; give a folder that save_pretrained wrote"):
        SmolLMv3WithTRM.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"format_version": 99}', '{"format_version": 1}', "[]"])
def test_a_configuration_that_is_not_ours_is_refused(tmp_path, content):
    (tmp_path / "smollm_trm.json").write_text(content)
    with pytest.raises(ValueError, match="not a smollm-trm configuration"):
        SmolLMv3WithTRM.from_pretrained(tmp_path)


def test_missing_foreign_and_misshapen_tensors_are_refused_by_name(saved):
    _, folder = saved
    path = folder / "reasoner.safetensors"
    tensors = load_file(path)
    broken = {
        "missing": {name: t for name, t in tensors.items() if name != "compressor.queries"},
        "has shape": tensors | {"compressor.queries": torch.zeros(2, 2)},
        "unknown tensor": tensors | {"another": torch.zeros(1)},
    }
    for message, content in broken.items():
        save_file(content, path)
        with pytest.raises(ValueError, match=message):
            SmolLMv3WithTRM.from_pretrained(folder, model_name=fresh_base())
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        SmolLMv3WithTRM.from_pretrained(folder, model_name=fresh_base())
    path.unlink()
    with pytest.raises(ValueError, match="reasoner.safetensors: cannot be read"):
        SmolLMv3WithTRM.from_pretrained(folder, model_name=fresh_base())


def test_a_missing_adapter_and_a_foreign_base_are_refused(saved):
    _, folder = saved
    with pytest.raises(ValueError, match="does not fit this base"):
        SmolLMv3WithTRM.from_pretrained(folder, model_name=fresh_base("gpt2"))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="adapter_model.safetensors is missing"):
        SmolLMv3WithTRM.from_pretrained(folder, model_name=fresh_base())


def test_the_settings_say_what_was_measured(tmp_path):
    make_model("smollm3", TOKENIZER).save_pretrained(tmp_path, training={"dev_loss": 1.5})
    content = json.loads((tmp_path / "smollm_trm.json").read_text())
    assert content["training"] == {"dev_loss": 1.5} and content["num_latents"] == 6


def test_a_base_that_is_not_there_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="no config.json in that folder"):
        load_base(str(tmp_path))
    with pytest.raises(ValueError, match="tiny.*pass a dataset"):
        load_base("tiny")


def test_an_unknown_way_to_train_the_base_is_refused():
    with pytest.raises(ValueError, match="base_training='some': choose 'lora', 'frozen' or 'full'"):
        adapt_base(make_base("llama", TOKENIZER), training="some", lora=None)


def test_a_tiny_base_with_an_adapter_comes_back_as_it_was(tmp_path):
    texts = [f"{row['question']} {row['answer']}" for row in ROWS]
    model = SmolLMv3WithTRM.from_base(
        "tiny", settings=ModelSettings(num_latents=4, trm=SMALL_TRM), tiny_texts=texts, seed=3
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.eval().save_pretrained(tmp_path)
    loaded = SmolLMv3WithTRM.from_pretrained(tmp_path)
    options = {"max_new_tokens": 12}
    assert loaded.generate_with_thinking(QUESTIONS, **options) == model.generate_with_thinking(QUESTIONS, **options)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trainable


def test_adapter_and_reasoner_are_the_only_weights_in_the_folder_and_the_tokenizer_is_beside_them(saved):
    _, folder = saved
    weights = {path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors")}
    assert weights == {"adapter_model.safetensors", "reasoner.safetensors"}
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    assert (folder / "tokenizer.json").is_file()


def test_a_reloaded_model_has_its_settings_and_is_ready_to_answer(tmp_path):
    model = make_model("smollm3", TOKENIZER, read_with_adapter=False)
    model.save_pretrained(tmp_path)
    loaded = SmolLMv3WithTRM.from_pretrained(tmp_path, model_name=fresh_base())
    assert loaded.settings == model.settings and not loaded.training


def test_an_adapter_that_the_read_pass_goes_without_is_not_merged():
    with pytest.raises(ValueError, match="read_with_adapter=False: .* cannot be merged"):
        make_model("smollm3", TOKENIZER, read_with_adapter=False).merge_and_unload()


def test_a_model_of_another_format_is_refused(saved):
    _, folder = saved
    content = json.loads((folder / "smollm_trm.json").read_text())
    (folder / "smollm_trm.json").write_text(json.dumps({**content, "format_version": 99}))
    with pytest.raises(ValueError, match="another format version"):
        SmolLMv3WithTRM.from_pretrained(folder, model_name=fresh_base())


def test_what_was_measured_survives_a_reload(saved, tmp_path):
    _, folder = saved
    content = json.loads((folder / "smollm_trm.json").read_text())
    noted = {"training": {"dev_loss": 1.5}, "evaluations": {"dev": {"accuracy": 0.5}}}
    (folder / "smollm_trm.json").write_text(json.dumps({**content, **noted}))
    loaded = SmolLMv3WithTRM.from_pretrained(folder, model_name=fresh_base())
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "smollm_trm.json").read_text()) == {**content, **noted}
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "smollm_trm.json").read_text())["training"] == noted["training"]


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), "torch.bfloat16 to cuda"), ((7, 5), "torch.float16 to cuda"), (None, "torch.float32 to cpu")],
)
def test_a_base_is_loaded_at_once_in_the_dtype_that_suits_its_device(saved, monkeypatch, capability, expected):
    class Base:
        def __init__(self, name: str, *, dtype: torch.dtype) -> None:
            self.dtype = dtype

        def to(self, device: torch.device) -> None:
            raise RuntimeError(f"{self.dtype} to {device}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(assembly, "load_base", lambda name, **how: (Base(name, **how), None))
    with pytest.raises(RuntimeError, match=expected):
        SmolLMv3WithTRM.from_pretrained(saved[1])
    with pytest.raises(RuntimeError, match="torch.float16 to cpu"):
        SmolLMv3WithTRM.from_pretrained(saved[1], dtype=torch.float16, device="cpu")


def test_a_base_that_was_left_in_the_folder_is_not_taken_for_another_models(tmp_path):
    base, tokenizer = fresh_base()
    base.save_pretrained(tmp_path / "other"), tokenizer.save_pretrained(tmp_path / "other")
    make_base("llama", TOKENIZER).save_pretrained(tmp_path / "model" / "base")
    settings = ModelSettings(num_latents=2, trm=SMALL_TRM)
    SmolLMv3WithTRM.from_base(str(tmp_path / "other"), settings=settings).save_pretrained(tmp_path / "model")
    assert SmolLMv3WithTRM.from_pretrained(tmp_path / "model").config.model_type == "smollm3"


def test_a_second_tiny_model_in_a_folder_brings_its_own_base(tmp_path):
    texts = [f"{row['question']} {row['answer']}" for row in ROWS]
    settings = ModelSettings(num_latents=2, trm=SMALL_TRM)
    for seed in (1, 2):
        model = SmolLMv3WithTRM.from_base("tiny", settings=settings, tiny_texts=texts, seed=seed)
        model.save_pretrained(tmp_path)
    loaded = SmolLMv3WithTRM.from_pretrained(tmp_path)
    assert torch.equal(*(one.causal_lm.get_input_embeddings().weight for one in (model, loaded)))


def test_a_model_saved_before_a_setting_was_there_still_loads(saved):
    _, folder = saved
    content = json.loads((folder / "smollm_trm.json").read_text())
    del content["keep_annotations"]
    (folder / "smollm_trm.json").write_text(json.dumps(content))
    assert not SmolLMv3WithTRM.from_pretrained(folder, model_name=fresh_base()).encoder.keep_annotations


def test_a_base_that_was_handed_over_is_named_by_where_it_came_from(tmp_path):
    base, tokenizer = fresh_base("llama")
    base.save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    settings = ModelSettings(num_latents=2, trm=SMALL_TRM)
    model = SmolLMv3WithTRM.from_base(load_base(str(tmp_path / "base")), settings=settings)
    model.save_pretrained(tmp_path / "model")
    assert model.settings.base == str(tmp_path / "base")
    assert SmolLMv3WithTRM.from_pretrained(tmp_path / "model").config.model_type == "llama"


def test_a_base_without_a_name_is_asked_for_unless_it_goes_along(tmp_path):
    def model(**settings) -> SmolLMv3WithTRM:
        base = nameless_base("smollm3", TOKENIZER), TOKENIZER
        return SmolLMv3WithTRM.from_base(base, settings=ModelSettings(num_latents=2, trm=SMALL_TRM, **settings))

    model().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="trained on a base without a name: give it as model_name=") as caught:
        SmolLMv3WithTRM.from_pretrained(tmp_path / "model")
    assert "\n" not in str(caught.value)
    base = nameless_base("smollm3", TOKENIZER), TOKENIZER
    assert SmolLMv3WithTRM.from_pretrained(tmp_path / "model", model_name=base).num_latents == 2
    model(base_training="full").save_pretrained(tmp_path / "whole")
    assert SmolLMv3WithTRM.from_pretrained(tmp_path / "whole").settings.base == ""
    assert "# Latent reasoning with a base of its own" in model_card(tmp_path / "whole")
    assert model(base="me/base").settings.base == "me/base", "what the caller says stands where the base says nothing"
