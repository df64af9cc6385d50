"""Prompts: the plain, bare and chat formats, which token begins a text, which ids mark slots and padding."""

import pytest
from tokenizers.processors import TemplateProcessing
from twins import make_model, make_tokenizer

from smollm_trm.data.prompts import PromptEncoder, padding_token_id, slot_token_id
from smollm_trm.records import UserMistake

# As SmolLM3's does, it writes today's date unless the system message says /system_override.
CHAT_TEMPLATE = (
    "<|im_start|>system\n{% if '/system_override' in messages[0].content %}"
    "{{ messages[0].content.replace('/system_override', '') }}{% else %}"
    "Today Date: {{ strftime_now('%d %B %Y') }}{% endif %}<|im_end|>\n"
    "{% for message in messages if message.role != 'system' %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANSWER = "2 and 2 make <<2+2=4>>4.\n#### 4"
ROW = {"question": "Why?", "answer": ANSWER}
ASKED, TOLD = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": " 2 and 2 make 4.\n#### 4"}


def make_encoder(**changes) -> PromptEncoder:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return PromptEncoder(tokenizer=tokenizer, **{"num_latents": 2, **changes})


def span_of(encoder: PromptEncoder) -> str:
    return f"<think>{2 * encoder.tokenizer.convert_ids_to_tokens(slot_token_id(encoder.tokenizer))}</think>"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "Question: Why?\nAnswer: {span}"),
        ({"num_latents": 0}, "Question: Why?\nAnswer: <think></think>"),
        ({"think": False}, "Question: Why?\nAnswer:"),
        ({"prompt_format": "bare"}, "Why?{span}"),
        (
            {"prompt_format": "chat"},
            "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n{span}",
        ),
        (
            {"prompt_format": "chat", "think": False},
            "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_the_slots_stand_inside_the_think_block_where_the_answer_begins(changes, text):
    encoder = make_encoder(**changes)
    expected = text.format(span=span_of(encoder))
    assert encoder.prompt_text("Why?") == expected
    assert encoder.encode_prompt("Why?") == encoder.tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_the_chat_format_holds_no_date():
    encoder = make_encoder(prompt_format="chat")
    dated = encoder.tokenizer.apply_chat_template([ASKED], tokenize=False)
    assert "Today Date: " in dated, "the template must write a date where nothing keeps it from it"
    assert "Today Date" not in encoder.prompt_text("Why?")


@pytest.mark.parametrize("prompt_format", ["plain", "bare", "chat"])
def test_a_conversation_with_its_answer_is_the_training_row(prompt_format):
    encoder = make_encoder(prompt_format=prompt_format)
    row = encoder.encode(ROW)
    encoder.tokenizer.chat_template = encoder.template
    for messages, expected in (([ASKED], row.prompt), ([ASKED, TOLD], row.prompt + row.completion)):
        options = {"add_generation_prompt": messages == [ASKED]}
        assert encoder.tokenizer.apply_chat_template(messages, **options)["input_ids"] == expected


@pytest.mark.parametrize("prompt_format", ["plain", "bare", "chat"])
def test_a_conversation_has_one_span_before_its_last_answer(prompt_format):
    encoder = make_encoder(prompt_format=prompt_format)
    encoder.tokenizer.chat_template = encoder.template
    messages = [ASKED, TOLD, {"role": "user", "content": "And then?"}]
    text = encoder.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text.count("<think>") == 1 and text.endswith(span_of(encoder))
    assert text.index("Why?") < text.index("#### 4") < text.index("And then?")


@pytest.mark.parametrize("prompt_format", ["plain", "chat"])
def test_a_saved_models_template_makes_the_same_template_again(prompt_format):
    encoder = make_encoder(prompt_format=prompt_format)
    again = make_encoder(prompt_format=prompt_format)
    again.tokenizer.chat_template = encoder.template
    assert again.template == encoder.template
    model = make_model("smollm3", again.tokenizer, num_latents=2, prompt_format=prompt_format)
    assert model.encoder.prompt_text("Why?") == encoder.prompt_text("Why?")
    more = make_encoder(prompt_format=prompt_format, num_latents=3)
    more.tokenizer.chat_template = encoder.template
    assert len(more.encode_prompt("Why?")) == len(encoder.encode_prompt("Why?")) + 1


@pytest.mark.parametrize("question", ["It's 5\\n o'clock {{ 1 }} {% if %}", "'", "  spaces  ", "\\'", "ünï\n\ncode"])
def test_a_question_is_written_as_it_is(question):
    encoder = make_encoder()
    assert encoder.prompt_text(question) == f"Question: {question}\nAnswer: {span_of(encoder)}"


@pytest.mark.parametrize(("prompt_format", "begins"), [("plain", True), ("chat", False)])
def test_a_tokenizer_that_begins_texts_does_so_once_where_no_template_does(prompt_format, begins):
    encoder = make_encoder(prompt_format=prompt_format)
    encoder.tokenizer.bos_token = "<|begin_of_text|>"
    without = encoder.encode(ROW)
    first = ("<|begin_of_text|>", encoder.tokenizer.bos_token_id)  # as Llama 3's, which has no add_bos_token
    processor = TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[first])
    encoder.tokenizer.backend_tokenizer.post_processor = processor
    assert not getattr(encoder.tokenizer, "add_bos_token", False)
    found = PromptEncoder(tokenizer=encoder.tokenizer, num_latents=2, prompt_format=prompt_format).encode(ROW)
    assert found.prompt == [encoder.tokenizer.bos_token_id] * begins + without.prompt
    assert found.completion == without.completion


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"target": "steps"}, " 2 and 2 make 4.\n#### 4"),
        ({"target": "steps", "keep_annotations": True}, " 2 and 2 make <<2+2=4>>4.\n#### 4"),
        ({"target": "answer"}, " #### 4"),
        ({"target": "answer", "prompt_format": "bare"}, "4"),
    ],
)
def test_the_target_decides_what_is_written_and_end_of_text_ends_it(changes, text):
    encoder = make_encoder(**changes)
    assert encoder.tokenizer.decode(encoder.encode_completion(ANSWER)) == text + "<|im_end|>"


def test_slot_padding_and_end_of_text_are_three_tokens():
    tokenizer = make_tokenizer()  # names its end token as padding, as SmolLM3's does
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert len({slot_token_id(tokenizer), padding_token_id(tokenizer), tokenizer.eos_token_id}) == 3


def test_the_slots_own_token_is_left_out_of_a_question_with_a_message(caplog):
    encoder = make_encoder()
    slot = encoder.tokenizer.convert_ids_to_tokens(slot_token_id(encoder.tokenizer))
    assert encoder.encode_prompt(f"Why{slot}?") == encoder.encode_prompt("Why?")
    assert "left the latent slot's own token out of a question: 'Why" in caplog.text and len(caplog.records) == 1


@pytest.mark.parametrize("prompt_format", ["plain", "chat"])
def test_a_slot_in_a_users_text_opens_no_span_through_the_template(prompt_format):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    encoder = PromptEncoder(tokenizer=tokenizer, num_latents=2, prompt_format=prompt_format)
    tokenizer.chat_template = encoder.template
    for turns in (("Why?",), ("Why?", "So.", "And?"), ("Why?", "So.")):
        roles = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(turns)]
        asked = [one | {"content": f"{encoder.slot_token}{one['content']}"} for one in roles[:1]] + roles[1:]
        clean, dirty = (
            tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in (roles, asked)
        )
        assert clean == dirty and clean.count(encoder.slot_token) == 2


def test_settings_that_do_not_exist_are_refused_by_name():
    tokenizer = make_tokenizer()
    for changes, message in (
        ({"target": "proof"}, "target='proof': choose one of steps, answer, think"),
        ({"prompt_format": "poem"}, "prompt_format='poem': choose one of plain, bare, chat"),
        ({"prompt_format": "chat"}, "this tokenizer has no chat template; choose 'plain'"),
    ):
        with pytest.raises(UserMistake, match=message):
            PromptEncoder(tokenizer=tokenizer, num_latents=2, **changes)


def test_thinking_in_text_writes_the_steps_before_the_end_of_the_think_block():
    tokenizer = make_tokenizer()
    encoder = PromptEncoder(tokenizer=tokenizer, num_latents=0, target="think")
    answer = "She has 2*3=<<2*3=6>>6 pears.\n6+1=<<6+1=7>>7.\n#### 7"
    assert encoder.prompt_text("How many?") == "Question: How many?\nAnswer: <think>"
    assert encoder.completion_text(answer) == " She has 2*3=6 pears.\n6+1=7.\n</think> 7"
    ids = encoder.encode_completion(answer)
    assert ids.count(tokenizer.convert_tokens_to_ids("</think>")) == 1 and ids[-1] == tokenizer.eos_token_id
    for wrong in ({"num_latents": 2}, {"think": False}, {"prompt_format": "coconut"}):
        with pytest.raises(UserMistake, match="target='think' thinks in text"):
            PromptEncoder(**{"tokenizer": tokenizer, "num_latents": 0, "target": "think", **wrong})
