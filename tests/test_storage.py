"""A saved model is small, plain, and the same model when it is loaded."""

import json
from pathlib import Path

import pytest
import torch
from processes import ended, started
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig
from twins import ROWS, SMALL, SMALL_TRM, make_base, make_model, make_tokenizer, nameless_base

from smollm_trm.models import pretrained
from smollm_trm.models.adapters import LoraSettings
from smollm_trm.models.configuration import LatentReasoningConfig
from smollm_trm.models.loading import load_base
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.records import UserMistake

TOKENIZER = make_tokenizer()
QUESTIONS = [row["question"] for row in ROWS[:3]]
NEW = {"max_new_tokens": 8}


def fresh_base(architecture: str = "smollm3"):
    return make_base(architecture, TOKENIZER), TOKENIZER


def base_folder(folder: Path, architecture: str = "smollm3") -> str:
    """A base on disk, as a user has one."""
    nameless_base(architecture, TOKENIZER).save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


def bend_adapter(model: SmolLMv3WithTRM) -> SmolLMv3WithTRM:
    """An adapter that is not at its (neutral) start."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def logits_and_texts(model: SmolLMv3WithTRM) -> tuple[torch.Tensor, list[str]]:
    ids = torch.tensor([model.encoder.encode_prompt(QUESTIONS[0])])
    return model(ids).logits.detach(), model.generate_with_thinking(QUESTIONS, **NEW)


def assert_same_model(one: SmolLMv3WithTRM, other: SmolLMv3WithTRM) -> None:
    (logits, texts), (other_logits, other_texts) = logits_and_texts(one), logits_and_texts(other)
    assert torch.allclose(logits, other_logits, atol=1e-6) and texts == other_texts


@pytest.fixture
def saved(tmp_path):
    model = make_model("smollm3", TOKENIZER)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


def rewrite_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# The same model


@pytest.mark.parametrize("architecture", ["smollm3", "gpt2"])
@pytest.mark.parametrize("reasoner", ["trm", "compressor", "static", "pause", "coconut", None])
def test_a_reloaded_model_is_the_same(tmp_path, architecture, reasoner):
    model = make_model(architecture, TOKENIZER, reasoner=reasoner)
    model.save_pretrained(tmp_path)
    loaded = SmolLMv3WithTRM.from_pretrained(tmp_path, model_name=fresh_base(architecture))
    assert_same_model(model, loaded)
    assert not loaded.training and loaded.config.reasoner_settings == model.config.reasoner_settings
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trainable


@pytest.mark.parametrize("architecture", ["smollm3", "llama", "gpt2"])
@pytest.mark.parametrize("training", ["full", "lora"])
def test_a_base_that_has_no_name_is_saved_with_the_model(tmp_path, training, architecture):
    base = nameless_base(architecture, TOKENIZER), TOKENIZER
    model = bend_adapter(
        SmolLMv3WithTRM.from_base(base, base_training=training, num_latents=4, reasoner_settings=SMALL_TRM)
    )
    model.save_pretrained(tmp_path)
    loaded = SmolLMv3WithTRM.from_pretrained(tmp_path)
    assert_same_model(model, loaded)
    assert loaded.config.base_model == ""
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[name], again[name]) for name in state)


def test_a_new_process_generates_the_same_through_the_auto_class(tmp_path):
    base = base_folder(tmp_path / "base")
    model = bend_adapter(SmolLMv3WithTRM.from_base(base, num_latents=4, reasoner_settings=SMALL_TRM))
    model.save_pretrained(tmp_path / "model")
    output = tmp_path / "answers"
    assert ended(started("auto_loading", "answer", str(tmp_path / "model"), QUESTIONS, str(output))) == 0
    assert json.loads(output.read_text()) == model.generate_with_thinking(QUESTIONS, **NEW)
    assert output.with_suffix(".err").read_text() == "", "loading says nothing"


def test_the_auto_classes_load_it_and_no_class_makes_up_a_base(tmp_path):
    base = base_folder(tmp_path / "base")
    model = bend_adapter(SmolLMv3WithTRM.from_base(base, num_latents=4, reasoner_settings=SMALL_TRM))
    model.save_pretrained(tmp_path / "model")
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "model"), LatentReasoningConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded) is SmolLMv3WithTRM
    assert_same_model(model, loaded)
    table = model.get_input_embeddings().weight
    for auto in (AutoModel, type(model.model)):
        backbone = auto.from_pretrained(tmp_path / "model")
        assert torch.equal(backbone.get_input_embeddings().weight, table)


def test_a_run_folder_with_the_model_in_it_will_do(tmp_path):
    model = make_model("smollm3", TOKENIZER)
    model.save_pretrained(tmp_path / "model")
    assert_same_model(model, SmolLMv3WithTRM.from_pretrained(tmp_path, model_name=fresh_base()))


@pytest.mark.parametrize("architecture", ["smollm3", "gpt2"])
def test_a_merged_model_is_whole_and_the_same(tmp_path, architecture):
    model = make_model(architecture, TOKENIZER)
    before, texts = logits_and_texts(model)
    merged = model.merge_and_unload()
    after, merged_texts = logits_and_texts(merged)
    assert torch.allclose(before, after, atol=1e-5) and texts == merged_texts
    assert not [name for name, _ in merged.named_parameters() if "lora" in name or "base_layer" in name]
    merged.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter").exists()
    assert_same_model(merged, SmolLMv3WithTRM.from_pretrained(tmp_path))


def test_a_deleted_adapter_leaves_the_base_as_it_was(saved, tmp_path):
    model, _ = saved
    model.set_adapter("default")
    with pytest.raises(UserMistake, match="adapter_names='other': a model has one adapter"):
        model.delete_adapter("other")
    model.disable_adapters()
    without = logits_and_texts(model)[0]
    model.delete_adapter("default")
    assert torch.equal(logits_and_texts(model)[0], without) and model.config.base_training == "frozen"
    with pytest.raises(UserMistake, match="has one adapter at most"):
        model.delete_adapter("default")
    model.save_pretrained(tmp_path / "without")
    assert_same_model(model, SmolLMv3WithTRM.from_pretrained(tmp_path / "without", model_name=fresh_base()))


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"use_rslora": True, "r": 64}, {"target_modules": "all-linear"}])
def test_pefts_own_kinds_of_adapter_train_merge_and_come_back(tmp_path, lora):
    model = SmolLMv3WithTRM.from_base(
        fresh_base(), lora=LoraSettings(**lora), num_latents=2, reasoner_settings=SMALL_TRM
    )
    bend_adapter(model).save_pretrained(tmp_path)
    names = [name for name, one in model.named_parameters() if one.requires_grad and ".reasoner." not in name]
    assert names and all("lora_" in name for name in names)
    assert any("mlp" in name for name in names) is (lora.get("target_modules") == "all-linear")
    loaded = SmolLMv3WithTRM.from_pretrained(tmp_path, model_name=fresh_base())
    assert_same_model(model, loaded)
    before = logits_and_texts(loaded)[0]
    assert torch.allclose(logits_and_texts(loaded.merge_and_unload())[0], before, atol=1e-4)


def test_merging_over_a_saved_adapter_takes_it_away(saved):
    model, folder = saved
    model.merge_and_unload().save_pretrained(folder)
    assert not (folder / "adapter").exists()
    assert_same_model(model, SmolLMv3WithTRM.from_pretrained(folder))


@pytest.mark.parametrize("training", ["lora", "full", "frozen"])
def test_statistics_anchors_constants_and_halting_survive_loading(tmp_path, training):
    model = make_model("smollm3", TOKENIZER, base_training=training, reasoner_settings={**SMALL_TRM, "start": "fixed"})
    model.save_pretrained(tmp_path)
    base, tokenizer = fresh_base()
    given = None if training == "full" else (base.to(torch.bfloat16), tokenizer)
    loaded = SmolLMv3WithTRM.from_pretrained(tmp_path, model_name=given, dtype=torch.bfloat16)
    state, again = model.reasoner.state_dict(), loaded.reasoner.state_dict()
    assert state.keys() == again.keys() and all(torch.equal(state[name], again[name]) for name in state)
    assert again["halting_head.bias"].item() == -5 and again["standardize.deviation"].min() < 0.9
    assert {p.dtype for p in loaded.reasoner.parameters()} == {torch.float32}
    assert loaded.get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("training", ["lora", "full"])
def test_making_and_loading_a_model_leave_the_random_state_as_it_was(tmp_path, training):
    base = base_folder(tmp_path / "base")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = SmolLMv3WithTRM.from_base(base, num_latents=4, base_training=training, reasoner_settings=SMALL_TRM)
    assert torch.equal(torch.get_rng_state(), before)
    model.save_pretrained(tmp_path / "model")
    SmolLMv3WithTRM.from_pretrained(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)
    pieces = SmolLMv3WithTRM.from_base("tiny", tiny_texts=QUESTIONS, reasoner=None)
    assert pieces.num_latents == 0 and torch.equal(torch.get_rng_state(), before)


# What lies in the folder


def test_the_folder_holds_adapter_and_reasoner_and_no_base_and_no_pickle(saved):
    model, folder = saved
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {name for name in files if name.endswith("safetensors")} == {
        "model.safetensors",
        "adapter/adapter_model.safetensors",
    }
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "README.md"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl", ".ckpt"))]
    tensors = load_file(folder / "model.safetensors") | load_file(folder / "adapter/adapter_model.safetensors")
    assert not any("embed_tokens" in name for name in tensors)
    held = {name for name in model.state_dict() if "lora_" in name or ".reasoner." in name}
    assert len(tensors) == len(held)


@pytest.mark.parametrize("training", ["lora", "full", "frozen", "merged"])
def test_no_local_path_is_saved_but_the_place_of_the_base(tmp_path, training):
    base = base_folder(tmp_path / "the-base-folder")
    config = {"base_training": "lora" if training == "merged" else training, "reasoner_settings": SMALL_TRM}
    model = SmolLMv3WithTRM.from_base(base, num_latents=4, **config)
    if training == "merged":
        model.merge_and_unload()
    model.save_pretrained(tmp_path / "model")
    loaded = SmolLMv3WithTRM.from_pretrained(tmp_path / "model")
    loaded.save_pretrained(tmp_path / "again")
    for folder in ("model", "again"):
        for path in (tmp_path / folder).rglob("*"):
            if path.is_file() and path.suffix != ".safetensors":
                text = path.read_text(encoding="utf-8")
                if path.name == "config.json" and training in ("lora", "frozen"):
                    assert json.loads(text)["base_model"] == base
                    text = text.replace(f'"base_model": "{base}"', "")
                assert str(tmp_path) not in text and "the-base-folder" not in text, path.name
            elif path.is_file():
                assert str(tmp_path).encode() not in path.read_bytes()


def test_notes_survive_a_reload_and_a_merge(tmp_path):
    model = make_model("smollm3", TOKENIZER)
    model.config.notes["training"] = {"dev_loss": 1.5}
    model.save_pretrained(tmp_path)
    loaded = SmolLMv3WithTRM.from_pretrained(tmp_path, model_name=fresh_base())
    assert loaded.config.notes == {"training": {"dev_loss": 1.5}} and loaded.config.num_latents == 6
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert SmolLMv3WithTRM.from_pretrained(tmp_path / "merged").config.notes == loaded.config.notes


def test_a_model_saved_before_a_setting_was_there_still_loads(saved):
    _, folder = saved
    content = json.loads((folder / "config.json").read_text())
    for name in ("keep_annotations", "think", "notes"):
        del content[name]
    del content["reasoner_settings"]["branch_scale"]
    (folder / "config.json").write_text(json.dumps(content))
    loaded = SmolLMv3WithTRM.from_pretrained(folder, model_name=fresh_base())
    assert loaded.encoder.think and not loaded.encoder.keep_annotations


def test_a_tiny_base_with_an_adapter_comes_back_as_it_was(tmp_path):
    texts = [f"{row['question']} {row['answer']}" for row in ROWS]
    for seed in (1, 3):  # the second over the first: a folder's own base is the model's
        model = SmolLMv3WithTRM.from_base(
            "tiny", num_latents=4, reasoner_settings=SMALL_TRM, tiny_texts=texts, seed=seed
        )
        bend_adapter(model).save_pretrained(tmp_path)
    assert_same_model(model, SmolLMv3WithTRM.from_pretrained(tmp_path))


# The base


def test_a_base_handed_over_is_named_by_where_it_came_from(tmp_path):
    base = load_base(base_folder(tmp_path / "base", "llama"))
    assert base.name == str(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), TOKENIZER
    model = SmolLMv3WithTRM.from_base(loaded, num_latents=2, reasoner_settings=SMALL_TRM)
    model.save_pretrained(tmp_path / "model")
    assert model.config.base_model == str(tmp_path / "base")
    assert SmolLMv3WithTRM.from_pretrained(tmp_path / "model").config.text_config.model_type == "llama"


def test_a_moved_base_is_one_clear_line_and_may_be_given(tmp_path):
    base = base_folder(tmp_path / "base")
    SmolLMv3WithTRM.from_base(base, num_latents=2, reasoner_settings=SMALL_TRM).save_pretrained(tmp_path / "model")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(UserMistake, match="no config.json in that folder"):
        SmolLMv3WithTRM.from_pretrained(tmp_path / "model")
    assert SmolLMv3WithTRM.from_pretrained(tmp_path / "model", model_name=str(tmp_path / "elsewhere")).num_latents == 2


def test_another_base_is_refused(saved):
    _, folder = saved
    with pytest.raises(UserMistake, match="'twins/gpt2' is not the one .*: model_type is gpt2, not smollm3"):
        SmolLMv3WithTRM.from_pretrained(folder, model_name=fresh_base("gpt2"))


def test_a_base_that_is_not_there_is_one_clear_line(tmp_path):
    for name, message in ((str(tmp_path), "no config.json in that folder"), ("tiny", "tiny.*pass a dataset")):
        with pytest.raises(UserMistake, match=message):
            load_base(name)


def test_pickled_weights_are_not_loaded(tmp_path):
    base = base_folder(tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(UserMistake, match="the weights of .*pickled weights are not read; convert") as refused:
        SmolLMv3WithTRM.from_base(base)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["llama", "unheard-of"])
def test_remote_code_never_runs_and_nothing_is_asked(tmp_path, monkeypatch, kind):
    def write_code(folder: Path) -> None:
        touch = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        (folder / "evil.py").write_text(f"{touch}class A:\n    pass\n")
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(f"{touch}def generate(model, **kwargs): ...\n")
        autos = {"AutoConfig": "evil.A", "AutoModel": "evil.A", "AutoModelForCausalLM": "evil.A"}
        rewrite_config(folder, auto_map=autos)
        path = folder / "tokenizer_config.json"
        content = {**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["evil.A", "evil.A"]}}
        path.write_text(json.dumps(content))

    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on standard input"))
    base = base_folder(tmp_path / "base", "llama")
    model = SmolLMv3WithTRM.from_base(base, num_latents=2, reasoner_settings=SMALL_TRM)
    model.save_pretrained(tmp_path / "model")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    for folder in ("base", "model", "merged"):
        write_code(tmp_path / folder)
    rewrite_config(tmp_path / "base", model_type="llama" if kind == "llama" else kind)
    calls = [lambda: SmolLMv3WithTRM.from_base(base)]
    calls += [lambda: SmolLMv3WithTRM.from_pretrained(tmp_path / "model")]
    for call in calls:
        if kind == "llama":
            assert call().config.text_config.model_type == "llama"
        else:
            with pytest.raises(UserMistake) as refused:
                call()
            assert "\n" not in str(refused.value)
    for load in (SmolLMv3WithTRM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        assert load(tmp_path / "merged").num_latents == 2
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), "torch.bfloat16 to cuda"), ((7, 5), "torch.float16 to cuda"), (None, "torch.float32 to cpu")],
)
def test_a_base_is_loaded_at_once_in_the_dtype_that_suits_its_device(saved, monkeypatch, capability, expected):
    asked = []

    def stop(name: str, *, dtype: torch.dtype, **_):
        asked.append(dtype)
        raise RuntimeError("asked")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(pretrained, "load_base", stop)
    for options in ({}, {"device": "cpu"}, {"device": "cpu", "dtype": torch.float16}, {"dtype": "bfloat16"}):
        with pytest.raises(RuntimeError, match="asked"):
            SmolLMv3WithTRM.from_pretrained(saved[1], **options)
    suited = getattr(torch, expected.split()[0].removeprefix("torch."))
    assert asked == [suited, torch.float32, torch.float16, torch.bfloat16]


# Refused, each in one line


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(UserMistake, match="no config.json there; give a folder that save_pretrained wrote"):
        SmolLMv3WithTRM.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "llama"}', '"text"'])
def test_a_configuration_that_is_not_ours_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserMistake, match="not a configuration of this program") as refused:
        SmolLMv3WithTRM.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_training": "Lora"}, "base_training='Lora': choose one of lora, frozen, full"),
        ({"reasoner": "oracle"}, "reasoner='oracle': choose one of trm"),
        ({"reasoner_settings": {"n_layer": 1}}, "unknown setting 'n_layer'; did you mean 'n_layers'"),
        ({"reasoner_settings": {"n_layers": "one"}}, "n_layers='one' must be int"),
        ({"num_latents": "six"}, "num_latents"),
        ({"num_latents": 0}, "num_latents=0: must be at least 1"),
        ({"num_latents": 2049}, "num_latents=2049: the base has only 2048 positions"),
        ({"reasoner_settings": {"n_layers": 65}}, "n_layers=65: must be at most 64"),
        ({"reasoner_settings": {"n_latent_steps": 1001}}, "n_latent_steps=1001: must be at most 1000"),
        ({"reasoner_settings": {"n_deep_recursions": 1001}}, "n_deep_recursions=1001: must be at most 1000"),
        ({"reasoner_settings": {"n_supervision_steps": 1001}}, "n_supervision_steps=1001: must be at most 1000"),
        ({"target": 3}, "target"),
        ({"target": "proof"}, "target='proof': choose one of steps, answer, think"),
        ({"prompt_format": "poem"}, "prompt_format='poem': choose one of plain"),
        ({"think": "yes"}, "think"),
        ({"slot_token_id": 10**6}, "slot_token_id=1000000, but .* tokenizer"),
        ({"slot_token_id": None}, "slot_token_id=None, but .* tokenizer"),
        ({"base_model": 7}, "base_model"),
        ({"notes": []}, "notes"),
        ({"text_config": {"model_type": "gemma3_text"}}, "'gemma3_text' is not supported: choose one of smollm3"),
        ({"text_config": None}, "hidden_size is 32, not 2048"),
        ({"text_config": "llama"}, "text_config"),
    ],
)
def test_a_wrong_value_in_the_configuration_is_refused_by_name(saved, changes, message):
    _, folder = saved
    rewrite_config(folder, **changes)
    with pytest.raises(UserMistake, match=message) as refused:
        SmolLMv3WithTRM.from_pretrained(folder, model_name=fresh_base())
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("training", ["lora", "full"])
def test_missing_foreign_and_misshapen_tensors_are_refused_by_name(tmp_path, training):
    make_model("smollm3", TOKENIZER, base_training=training).save_pretrained(tmp_path)
    path, name = tmp_path / "model.safetensors", "model.reasoner.compressor.queries"
    given = None if training == "full" else fresh_base()
    tensors = load_file(path)
    broken = [
        {key: t for key, t in tensors.items() if key != name},
        tensors | {name: torch.zeros(2, 2)},
        tensors | {"model.reasoner.another": torch.zeros(1)},
    ]
    if training == "full":
        broken.append({key: t for key, t in tensors.items() if "layers.1.mlp" not in key})
    for content in broken:
        save_file(content, path, metadata={"format": "pt"})
        with pytest.raises(UserMistake, match="compressor.queries|another|layers.1.mlp") as refused:
            SmolLMv3WithTRM.from_pretrained(tmp_path, model_name=given)
        assert "\n" not in str(refused.value)
    path.write_bytes(b"not safetensors")
    with pytest.raises(UserMistake, match="cannot be read"):
        SmolLMv3WithTRM.from_pretrained(tmp_path, model_name=given)
    path.unlink()
    with pytest.raises(UserMistake, match="cannot be read"):
        SmolLMv3WithTRM.from_pretrained(tmp_path, model_name=given)


def test_a_missing_damaged_or_foreign_adapter_is_refused(saved, tmp_path):
    _, folder = saved
    adapter = folder / "adapter"
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    whole, settings = weights.read_bytes(), config.read_text()
    tensors = load_file(weights)
    save_file(dict(list(tensors.items())[1:]), weights)
    with pytest.raises(UserMistake, match="the adapter does not fit this base .*lora_A"):
        SmolLMv3WithTRM.from_pretrained(folder, model_name=fresh_base())
    weights.write_bytes(whole)
    for path, content in ((weights, "x"), (config, "{"), (config, '{"peft_type": "MAGIC"}'), (config, None)):
        path.write_text(content) if content else path.unlink()
        with pytest.raises(UserMistake, match="the adapter cannot be read|does not fit") as refused:
            SmolLMv3WithTRM.from_pretrained(folder, model_name=fresh_base())
        assert "\n" not in str(refused.value)
        weights.write_bytes(whole), config.write_text(settings)
    weights.unlink()
    with pytest.raises(UserMistake, match="the adapter cannot be read"):
        SmolLMv3WithTRM.from_pretrained(folder, model_name=fresh_base())


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_damaged_file_beside_the_weights_is_one_clear_line(saved, file):
    _, folder = saved
    (folder / file).write_text("{")
    with pytest.raises(UserMistake) as refused:
        SmolLMv3WithTRM.from_pretrained(folder, model_name=fresh_base())
    assert "\n" not in str(refused.value)


def test_settings_that_no_reasoner_has_are_refused_before_anything_is_loaded():
    with pytest.raises(UserMistake, match="base_training='some': choose one of lora, frozen, full"):
        LatentReasoningConfig(text_config=LlamaConfig(), base_training="some")
    with pytest.raises(UserMistake, match="gain=0: must be above 0"):
        LatentReasoningConfig(text_config=LlamaConfig(), reasoner="static", reasoner_settings={"gain": 0})
    assert LatentReasoningConfig(text_config=LlamaConfig(), reasoner_settings=SMALL["trm"]).to_dict()
