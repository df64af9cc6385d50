"""Prompts: the plain and the chat format, which token begins a text, which ids mark slots and padding."""

import pytest
from tokenizers.processors import TemplateProcessing
from twins import make_tokenizer

from smollm_trm.data.prompts import PromptEncoder, padding_token_id, slot_token_id

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


def make_encoder(**changes) -> PromptEncoder:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return PromptEncoder(tokenizer=tokenizer, **{"num_latents": 2, **changes})


def test_the_plain_format_has_the_slots_inside_the_think_block():
    encoder = make_encoder()
    slot = encoder.tokenizer.convert_ids_to_tokens(slot_token_id(encoder.tokenizer))
    text = encoder.tokenizer.decode(encoder.encode_prompt("Why?"))
    assert text == f"Question: Why?\nAnswer: <think>{slot}{slot}</think>"


def test_the_chat_format_holds_no_date_and_opens_the_think_block():
    encoder = make_encoder(prompt_format="chat")
    dated = encoder.tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False)
    assert "Today Date: " in dated, "the template must write a date where nothing keeps it from it"
    expected = "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>"
    assert encoder.question_text("Why?") == expected
    assert encoder.encode_question("Why?") == encoder.tokenizer(expected, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("prompt_format", "begins"), [("plain", True), ("chat", False)])
def test_a_tokenizer_that_begins_texts_does_so_once_where_no_template_does(prompt_format, begins):
    encoder = make_encoder(prompt_format=prompt_format)
    encoder.tokenizer.bos_token = "<|begin_of_text|>"
    without = encoder.encode({"question": "Why?", "answer": ANSWER})
    first = ("<|begin_of_text|>", encoder.tokenizer.bos_token_id)  # as Llama 3's, which has no add_bos_token
    processor = TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[first])
    encoder.tokenizer.backend_tokenizer.post_processor = processor
    assert not getattr(encoder.tokenizer, "add_bos_token", False)
    found = encoder.encode({"question": "Why?", "answer": ANSWER})
    assert found.prompt == [encoder.tokenizer.bos_token_id] * begins + without.prompt
    assert found.completion == without.completion


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"target": "steps"}, " 2 and 2 make 4.\n#### 4"),
        ({"target": "steps", "keep_annotations": True}, " 2 and 2 make <<2+2=4>>4.\n#### 4"),
        ({"target": "answer"}, " #### 4"),
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
    assert encoder.encode_question(f"Why{slot}?") == encoder.encode_question("Why?")
    assert "left the latent slot's own token out of a question: 'Why" in caplog.text and len(caplog.records) == 1
