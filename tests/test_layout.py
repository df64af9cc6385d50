"""The model is an ordinary Hugging Face model: what that layout does by itself must not break ours."""

import copy
import json

import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer
from transformers import (
    BertConfig,
    BertModel,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    pipeline,
)
from twins import ARCHITECTURES, ROWS, SMALL_TRM, make_base, make_batch, make_model, make_tokenizer, nameless_base

from smollm_trm.models.adapters import LoraSettings
from smollm_trm.models.configuration import LatentReasoningConfig
from smollm_trm.models.modeling import LatentReasoningModel
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.tiny import train_tiny_tokenizer
from smollm_trm.records import UserMistake

TOKENIZER = make_tokenizer()
QUESTIONS = [row["question"] for row in ROWS[:3]]
FIXED_START = {**SMALL_TRM, "start": "fixed"}


def untied(architecture: str):
    base = nameless_base(architecture, TOKENIZER)
    base.config.tie_word_embeddings = False
    base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach() + 0.1)
    return base


@pytest.mark.parametrize("kind", [LatentReasoningModel, SmolLMv3WithTRM])
def test_a_fresh_model_keeps_what_its_reasoner_was_made_with(kind):
    config = LatentReasoningConfig(
        text_config=make_base("llama", TOKENIZER).config, num_latents=4, slot_token_id=3, reasoner_settings=FIXED_START
    )
    model = kind(config)
    reasoner = (model if kind is LatentReasoningModel else model.model).reasoner
    assert reasoner.halting_head.bias.item() == -5 and not reasoner.halting_head.weight.any()
    assert reasoner.scale.gain.item() == 1 and torch.equal(reasoner.standardize.deviation, torch.ones(3, 32))
    for start in (reasoner.recursion.initial_answer, reasoner.recursion.initial_latent):
        assert 0.5 < start.std() < 1.5 and start.abs().max() < 2.4, "from the truncated normal of deviation 1"


def test_all_that_a_reasoner_keeps_is_saved(tmp_path):
    """Buffers that are not persistent are garbage after `from_pretrained`."""
    model = make_model("llama", TOKENIZER, reasoner_settings=FIXED_START)
    kept = {f"model.reasoner.{name}" for name, _ in model.reasoner.named_buffers()}
    assert kept and kept <= model.state_dict().keys()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_are_tied_where_the_base_ties_them(tmp_path, architecture, tied):
    base = untied(architecture) if not tied else nameless_base(architecture, TOKENIZER)
    if tied:
        base.config.tie_word_embeddings = True
        base.lm_head.weight = base.get_input_embeddings().weight
    head = base.lm_head.weight.detach().clone()
    model = SmolLMv3WithTRM.from_base((base, TOKENIZER), num_latents=2, reasoner_settings=SMALL_TRM).eval()
    other = SmolLMv3WithTRM.from_base((untied("llama"), TOKENIZER), num_latents=2, reasoner_settings=SMALL_TRM)
    assert not other.config.tie_word_embeddings and model.config.tie_word_embeddings is tied
    model.save_pretrained(tmp_path)
    loaded = SmolLMv3WithTRM.from_pretrained(tmp_path)
    ids = torch.tensor([model.encoder.encode_prompt(QUESTIONS[0])])
    weights = loaded.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name], weight), name
    # Not bit for bit: some CPUs' kernels add in another order where a tensor lies at another address.
    torch.testing.assert_close(model(ids).logits, loaded(ids).logits)
    for one in (model, loaded):
        assert (one.lm_head.weight is one.get_input_embeddings().weight) is tied
        assert torch.equal(one.lm_head.weight, head)
        one.resize_token_embeddings(800)
        assert (one.lm_head.weight is one.get_input_embeddings().weight) is tied and len(one.lm_head.weight) == 800


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapter_and_reasoner_are_fp32_on_a_half_precision_base(tmp_path, dtype):
    base = make_base("smollm3", TOKENIZER).to(dtype)
    model = SmolLMv3WithTRM.from_base((base, TOKENIZER), num_latents=6, reasoner_settings=SMALL_TRM).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype} == {model.dtype}
    output = model(**make_batch(model, ROWS[:2]))
    assert output.logits.dtype == dtype and output.latents.dtype == torch.float32 and torch.isfinite(output.loss)
    for cache in (None, "static"):
        text = model.generate_with_thinking(QUESTIONS, max_new_tokens=2, cache_implementation=cache)
        assert len(text) == 3
    model.save_pretrained(tmp_path)
    base = make_base("smollm3", TOKENIZER).to(dtype)
    loaded = SmolLMv3WithTRM.from_pretrained(tmp_path, model_name=(base, TOKENIZER))
    assert {p.dtype for p in loaded.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("reasoner", ["trm", "compressor", "static", "coconut", None])
def test_a_model_cast_to_half_precision_computes_and_saves(tmp_path, reasoner):
    model = make_model("smollm3", TOKENIZER, reasoner=reasoner).to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert torch.isfinite(model(**make_batch(model, ROWS[:2])).loss)
    texts = model.generate_with_thinking(QUESTIONS, max_new_tokens=3)
    model.save_pretrained(tmp_path)
    base = make_base("smollm3", TOKENIZER).to(torch.bfloat16)
    loaded = SmolLMv3WithTRM.from_pretrained(tmp_path, model_name=(base, TOKENIZER))
    assert len(texts) == len(loaded.generate_with_thinking(QUESTIONS, max_new_tokens=3)) == 3


def test_all_linear_layers_are_the_bases_own():
    model = make_model("llama", TOKENIZER, base_training="frozen")
    model.add_adapter(LoraConfig(target_modules="all-linear", r=2))
    adapted = {name for name, _ in model.named_modules() if name.endswith("lora_A")}
    assert len(adapted) == 3 * 7 and not any("reasoner" in name or "lm_head" in name for name in adapted)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "reasoner" in name for name in trained)


def test_layers_that_the_base_does_not_have_are_refused_by_name():
    with pytest.raises(UserMistake, match=r"lora target_modules=.*nowhere") as refused:
        SmolLMv3WithTRM.from_base(
            (make_base("llama", TOKENIZER), TOKENIZER), lora=LoraSettings(target_modules=["nowhere"])
        )
    assert "\n" not in str(refused.value)


def test_model_and_backbone_have_pefts_own_methods(capsys):
    model = make_model("smollm3", TOKENIZER)
    assert model.base_model is model.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for one in (model, model.base_model):
        one.print_trainable_parameters()
        assert f"trainable params: {trained:,} || all params: " in capsys.readouterr().out
    ids = torch.tensor([model.encoder.encode_prompt(QUESTIONS[0])])
    adapted = model(ids).logits
    model.disable_adapters()
    assert (model(ids).logits - adapted).abs().max() > 1e-3
    model.enable_adapters()
    assert torch.equal(model(ids).logits, adapted)
    assert model.base_model.merge_and_unload() is model.base_model
    assert torch.allclose(model(ids).logits, adapted, atol=1e-5) and model.merge_and_unload() is model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_usual_attributes_are_there(architecture):
    model = make_model(architecture, TOKENIZER)
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.num_parameters(only_trainable=True) < model.num_parameters()
    assert model.dtype == torch.float32 and model.device == torch.device("cpu")
    assert model.generation_config.eos_token_id == TOKENIZER.eos_token_id and not model.generation_config.do_sample
    assert model.generation_config.pad_token_id == TOKENIZER.convert_tokens_to_ids("<|finetune_right_pad_id|>")
    assert model.config.get_text_config() is model.config.text_config
    assert model.get_decoder() is not None and model.get_output_embeddings() is model.lm_head
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings
    again = copy.deepcopy(model)
    batch = make_batch(model, ROWS[:2])
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_a_base_whose_head_is_more_than_a_linear_layer_is_refused_by_name(tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = GemmaForCausalLM(GemmaConfig(vocab_size=len(TOKENIZER), **shape, num_key_value_heads=1, head_dim=8))
    base.save_pretrained(tmp_path), TOKENIZER.save_pretrained(tmp_path)
    bert = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48))
    for given in ((base, TOKENIZER), str(tmp_path), (bert, TOKENIZER)):
        with pytest.raises(UserMistake, match="'(gemma|bert)' is not supported: choose one of smollm3, llama, qwen2"):
            SmolLMv3WithTRM.from_base(given)


def test_a_model_with_a_reasoner_is_no_base_but_one_without_is():
    with pytest.raises(UserMistake, match="has a reasoner already: give the base that it was trained from"):
        SmolLMv3WithTRM.from_base((make_model("llama", TOKENIZER), TOKENIZER))
    tuned = make_model("llama", TOKENIZER, reasoner=None).merge_and_unload()
    model = SmolLMv3WithTRM.from_base((tuned, tuned.tokenizer), num_latents=2, reasoner_settings=SMALL_TRM)
    assert model.config.text_config.model_type == "llama" and model.config.base_model == ""


def test_a_misspelt_setting_is_refused():
    with pytest.raises(UserMistake, match="unknown setting 'num_latent'; .*num_latents"):
        SmolLMv3WithTRM.from_base((make_base("llama", TOKENIZER), TOKENIZER), num_latent=3)


def test_a_tokenizer_without_a_spare_token_gets_one_and_the_table_grows_by_it(tmp_path):
    tokenizer = train_tiny_tokenizer([f"{row['question']} {row['answer']}" for row in ROWS])
    content = json.loads(tokenizer.backend_tokenizer.to_str().replace("<|reserved_special_token_2|>", "<|other|>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    base = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, eos_token_id=5,
                                      bos_token_id=5, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0))  # fmt: skip
    torch.manual_seed(1)
    state = torch.get_rng_state()
    model = SmolLMv3WithTRM.from_base((base, tokenizer), num_latents=3, reasoner_settings=SMALL_TRM).eval()
    assert torch.equal(state, torch.get_rng_state())
    size = len(tokenizer)
    assert model.config.slot_token_id == size == model.config.vocab_size - 1 and len(model.tokenizer) == size + 1
    assert model.lm_head.weight is model.get_input_embeddings().weight and len(model.lm_head.weight) == size + 1
    batch = make_batch(model, ROWS[:2])
    assert int((batch["labels"] == tokenizer.eos_token_id).sum()) == 2, "the end-of-text label must stay"
    assert torch.isfinite(model(**batch).loss)
    model.save_pretrained(tmp_path)
    loaded = SmolLMv3WithTRM.from_pretrained(tmp_path)
    assert loaded.generate_with_thinking(QUESTIONS, max_new_tokens=4) == model.generate_with_thinking(
        QUESTIONS, max_new_tokens=4
    )


@pytest.mark.parametrize("reasoner", ["trm", "coconut", None])
def test_a_pipeline_answers_chat_messages_as_the_model_itself_does(reasoner):
    model = make_model("smollm3", TOKENIZER, reasoner=reasoner)
    ask = pipeline("text-generation", model=model, tokenizer=model.tokenizer)
    for question in QUESTIONS:
        found = ask([{"role": "user", "content": question}], max_new_tokens=8, return_full_text=False)
        assert found[0]["generated_text"] == model.generate_with_thinking(question, max_new_tokens=8)


def test_a_pipeline_may_be_given_the_folder(tmp_path):
    model = SmolLMv3WithTRM.from_base(
        (nameless_base("smollm3", TOKENIZER), TOKENIZER), num_latents=2, reasoner_settings=SMALL_TRM
    ).eval()
    model.save_pretrained(tmp_path)
    ask = pipeline("text-generation", model=str(tmp_path))
    found = ask([{"role": "user", "content": QUESTIONS[0]}], max_new_tokens=6, return_full_text=False)
    assert found[0]["generated_text"] == model.generate_with_thinking(QUESTIONS[0], max_new_tokens=6)


def test_what_transformers_loading_takes_is_taken(tmp_path):
    SmolLMv3WithTRM.from_base(
        (nameless_base("smollm3", TOKENIZER), TOKENIZER), num_latents=2, reasoner_settings=SMALL_TRM
    ).save_pretrained(tmp_path)
    model = SmolLMv3WithTRM.from_pretrained(tmp_path, dtype="bfloat16", attn_implementation="eager")
    assert model.dtype == torch.bfloat16 and model.model.language_model.config._attn_implementation == "eager"
    with pytest.raises(UserMistake, match="dtype: choose 'auto', 'float32'"):
        SmolLMv3WithTRM.from_pretrained(tmp_path, dtype="flot32")


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_half_precision_base_generates_under_autocast_with_every_cache(cache):
    base = make_base("smollm3", TOKENIZER).to(torch.bfloat16)
    model = SmolLMv3WithTRM.from_base((base, TOKENIZER), num_latents=4, reasoner_settings=SMALL_TRM).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert len(model.generate_with_thinking(QUESTIONS, max_new_tokens=4, cache_implementation=cache)) == 3


def test_a_model_from_a_gguf_file_computes_as_before():
    from smollm_trm.models.loading import without_quantization

    base = make_base("llama", make_tokenizer()).eval()
    ids = torch.arange(1, 9).view(2, 4)
    expected = base(ids).logits
    plain = without_quantization(base)
    assert torch.equal(plain(ids).logits, expected)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"device_map": {"": 0}}, "device_map is not supported"),
        ({"load_in_8bit": True}, "load_in_8bit is not supported"),
    ],
)
def test_what_loading_does_not_do_is_refused_by_name(options, line, tmp_path):
    with pytest.raises(UserMistake, match=line):
        SmolLMv3WithTRM.from_pretrained(tmp_path, **options)


def test_a_slot_token_in_a_question_is_no_span_in_the_saved_template_either():
    model = make_model("smollm3", make_tokenizer())
    slot = model.encoder.slot_token
    asked = [{"role": "user", "content": f"Tom {slot} has 3."}]
    text = model.tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert text.count(slot) == model.num_latents


def test_a_span_behind_a_filled_cache_is_refused():
    model = make_model("smollm3", make_tokenizer())
    ids = torch.tensor([model.encoder.encode_prompt("Tom has 3.")])
    with torch.no_grad():
        cache = model(ids).past_key_values
        with pytest.raises(UserMistake, match="behind a filled cache"):
            model(ids, past_key_values=cache)


def test_every_end_of_text_of_the_base_ends_an_answer():
    base, tokenizer = make_base("llama", make_tokenizer()), make_tokenizer()
    base.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    model = SmolLMv3WithTRM.from_base((base, tokenizer), reasoner=None)
    assert model.generation_config.eos_token_id == sorted([tokenizer.eos_token_id, 7])
