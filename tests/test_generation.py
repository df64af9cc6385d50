"""Generation is Hugging Face's own, conditioned on the latents."""

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from twins import ARCHITECTURES, ROWS, make_model, make_tokenizer

from smollm_trm.models.generation import encode_prompts, fit_to_context
from smollm_trm.models.modeling import LatentReasoningModel
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.records import UserMistake

TOKENIZER = make_tokenizer()
QUESTIONS = [row["question"] for row in ROWS[:4]]
NEW = {"max_new_tokens": 8}
THINK = TOKENIZER.convert_tokens_to_ids("<think>")
NO_END = {"suppress_tokens": [TOKENIZER.eos_token_id]}


class WriteAt(LogitsProcessor):
    """Makes the model write one token when its text has a given length."""

    def __init__(self, token: int, length: int) -> None:
        self.token, self.length = token, length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == self.length:
            scores = torch.full_like(scores, -1e9)
            scores[:, self.token] = 0
        return scores


@pytest.fixture(params=ARCHITECTURES)
def model(request) -> SmolLMv3WithTRM:
    return make_model(request.param, TOKENIZER)


def prompts(model: SmolLMv3WithTRM, questions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    return encode_prompts(model.encoder, questions, max_new_tokens=8, context_length=512)


def written_logits(model: SmolLMv3WithTRM, ids: torch.Tensor, mask: torch.Tensor, **options) -> tuple:
    """What was generated and the raw logits it was chosen from, `(B, L)` and `(B, new, V)`."""
    found = model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, min_new_tokens=8, **NEW, **options
    )
    return found.sequences, torch.stack(found.logits, dim=1)


@pytest.mark.parametrize("reasoner", ["trm", "coconut", None])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_cache_gives_the_logits_of_the_forward_pass(architecture, reasoner):
    model = make_model(architecture, TOKENIZER, reasoner=reasoner)
    ids, mask = prompts(model, QUESTIONS)
    assert not mask.all(), "the batch must be padded to show anything"
    written, found = written_logits(model, ids, mask)
    whole = torch.cat([mask, torch.ones(len(ids), 8, dtype=torch.long)], dim=1)
    expected = model(written, attention_mask=whole).logits[:, ids.shape[1] - 1 : -1]
    assert torch.allclose(found, expected, atol=1e-5)
    for options in ({"use_cache": False}, {"cache_implementation": "static"}):
        same, others = written_logits(model, ids, mask, **options)
        assert torch.equal(written, same) and torch.allclose(others, expected, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_attention_implementation_gives_the_same_logits(model, implementation):
    ids, mask = prompts(model, QUESTIONS)
    _, expected = written_logits(model, ids, mask)
    model.set_attn_implementation(implementation)
    assert model.model.language_model.config._attn_implementation == implementation
    assert torch.allclose(written_logits(model, ids, mask)[1], expected, atol=1e-4)


def test_a_batch_answers_as_its_rows_do_alone(model):
    ids, mask = prompts(model, QUESTIONS)
    _, together = written_logits(model, ids, mask)
    for index, question in enumerate(QUESTIONS):
        _, alone = written_logits(model, *prompts(model, [question]))
        assert torch.allclose(together[index], alone[0], atol=1e-4)
    texts = model.generate_with_thinking(QUESTIONS, **NEW)
    assert texts == [model.generate_with_thinking(question, **NEW) for question in QUESTIONS]


def test_beams_and_samples_get_the_latents_of_their_row(model):
    ids, mask = prompts(model, QUESTIONS)
    beams = model.generate(ids, attention_mask=mask, num_beams=3, **NEW)
    assert torch.equal(beams, model.generate(ids, attention_mask=mask, num_beams=3, use_cache=False, **NEW))
    for index in range(2):
        alone_ids, alone_mask = prompts(model, [QUESTIONS[index]])
        alone = model.generate(alone_ids, attention_mask=alone_mask, num_beams=3, **NEW)[0, alone_ids.shape[1] :]
        text = TOKENIZER.decode(beams[index, ids.shape[1] :], skip_special_tokens=True)
        assert TOKENIZER.decode(alone, skip_special_tokens=True) == text
    torch.manual_seed(0)
    samples = model.generate(ids, attention_mask=mask, do_sample=True, num_return_sequences=3, **NEW)
    torch.manual_seed(0)
    assert torch.equal(samples, model.generate(ids, attention_mask=mask, do_sample=True, num_return_sequences=3, **NEW))
    assert samples.shape[0] == 12


@pytest.mark.parametrize("latents_given", [False, True])
@pytest.mark.parametrize("repeat", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
def test_rows_that_are_repeated_keep_the_latents_of_the_row_they_come_from(repeat, latents_given):
    model = make_model("smollm3", TOKENIZER)
    ids, mask = prompts(model, QUESTIONS[:2])
    latents = model.latents_for(ids, mask)
    given = {"latents": latents} if latents_given else {}
    seen = []
    model.model.language_model.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    model.generate(ids, attention_mask=mask, max_new_tokens=1, **given, **repeat)
    slots = ids.repeat_interleave(3, 0) == model.config.slot_token_id
    assert torch.equal(seen[-1][slots].view(6, 6, 32), latents[[0, 0, 0, 1, 1, 1]])


def test_one_question_with_several_texts_gives_them_all():
    model, options = make_model("smollm3", TOKENIZER), {"do_sample": True, "num_return_sequences": 3, **NEW}
    found = []
    for question in (QUESTIONS[0], QUESTIONS[:1]):
        torch.manual_seed(0)
        found.append(model.generate_with_thinking(question, **options))
    assert len(found[0]) == 3 and found[0] == found[1]
    assert isinstance(model.generate_with_thinking(QUESTIONS[0], **NEW), str)


def test_a_streamer_prints_what_is_returned(capsys):
    model = make_model("smollm3", TOKENIZER)
    streamer = TextStreamer(TOKENIZER, skip_prompt=True, skip_special_tokens=True)
    text = model.generate_with_thinking(QUESTIONS[0], streamer=streamer, **NEW)
    assert capsys.readouterr().out.strip() == text.strip()


def test_stopping_criteria_stop():
    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= length + 3)

    model = make_model("smollm3", TOKENIZER)
    length = prompts(model, QUESTIONS[:1])[0].shape[1]
    criteria = StoppingCriteriaList([AfterThree()])
    [found] = model.generate_with_thinking(
        QUESTIONS[:1], stopping_criteria=criteria, return_details=True, **NEW, **NO_END
    )
    assert found.n_tokens == 3


def test_other_latents_give_another_text():
    model = make_model("smollm3", TOKENIZER)

    def written(**options) -> list[str]:
        torch.manual_seed(0)
        return model.generate_with_thinking(QUESTIONS, max_new_tokens=16, do_sample=True, **options)

    assert written() == written(latents_from=QUESTIONS)
    assert written() != written(latents_from=QUESTIONS[1:] + QUESTIONS[:1])


@pytest.mark.parametrize("call", ["generate", "generate_with_thinking"])
@pytest.mark.parametrize("size", [1, 7, 30, 1000])
def test_a_prompt_in_chunks_is_refused_and_in_one_chunk_it_is_right(size, call):
    model = make_model("smollm3", TOKENIZER)
    ids, mask = prompts(model, QUESTIONS)

    def written(**options) -> object:
        if call == "generate_with_thinking":
            return model.generate_with_thinking(QUESTIONS, **NEW, **options)
        return model.generate(ids, attention_mask=mask, **NEW, **options).tolist()

    if size < ids.shape[1]:
        with pytest.raises(UserMistake, match=f"prefill_chunk_size={size}: .* latents depend on the whole prompt"):
            written(prefill_chunk_size=size)
    else:
        assert written(prefill_chunk_size=size) == written()


def test_a_user_s_generation_config_wins_and_slots_stay_suppressed():
    model = make_model("smollm3", TOKENIZER)
    ids, mask = prompts(model, QUESTIONS)
    slot = model.config.slot_token_id
    own = GenerationConfig(do_sample=True, top_k=5, max_new_tokens=3, pad_token_id=slot, eos_token_id=None)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.lm_head.weight[slot] = 100 * model.lm_head.weight.abs().max() * torch.randn(32)
    torch.manual_seed(0)
    sampled = model.generate(ids, attention_mask=mask, generation_config=own)
    assert sampled.shape[1] == ids.shape[1] + 3 and not bool((sampled[:, ids.shape[1] :] == slot).any())
    torch.manual_seed(1)
    assert not torch.equal(sampled, model.generate(ids, attention_mask=mask, generation_config=own))
    greedy = model.generate(ids, attention_mask=mask, **NEW)
    assert torch.equal(greedy, model.generate(ids, attention_mask=mask, **NEW)), "greedy is what is shipped"
    assert not bool((greedy[:, ids.shape[1] :] == slot).any())


def test_a_generation_config_reaches_generate_with_thinking_too():
    model = make_model("smollm3", TOKENIZER)
    beams = {"num_beams": 3, "max_new_tokens": 5, "num_return_sequences": 2, **NO_END}
    details = model.generate_with_thinking(QUESTIONS, generation_config=GenerationConfig(**beams), return_details=True)
    assert [found.n_tokens for found in details] == [5] * 8
    assert [found.text for found in details] == model.generate_with_thinking(QUESTIONS, **beams)
    with pytest.raises(UserMistake, match="rethink=True works neither with beams"):
        model.generate_with_thinking(QUESTIONS, rethink=True, generation_config=GenerationConfig(num_beams=2))
    own = GenerationConfig(max_new_tokens=5)
    assert model.generate_with_thinking(QUESTIONS, max_new_tokens=2, generation_config=own) == (
        model.generate_with_thinking(QUESTIONS, max_new_tokens=2)
    )


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_a_generated_slot_token_is_no_span(options):
    model = make_model("smollm3", TOKENIZER)
    ids, mask = prompts(model, QUESTIONS)
    slot = model.config.slot_token_id
    seen = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["inputs_embeds"]), with_kwargs=True
    )
    force = LogitsProcessorList([WriteAt(slot, ids.shape[1])])
    written, found = written_logits(model, ids, mask, logits_processor=force, **options, **NO_END)
    assert bool((written[:, ids.shape[1]] == slot).all())
    read = next(states for states in seen[1:] if states.shape[1] in (1, ids.shape[1] + 1))
    assert torch.equal(read[0, -1], model.get_input_embeddings().weight[slot])
    whole = torch.cat([mask, torch.ones(len(ids), 8, dtype=torch.long)], dim=1)
    assert torch.allclose(model(written, attention_mask=whole).logits[:, ids.shape[1] - 1 : -1], found, atol=1e-5)
    assert model.tokenizer.convert_ids_to_tokens(slot) not in model.generate_with_thinking(
        QUESTIONS[0], logits_processor=force, **NEW, **NO_END
    )


def test_halting_chooses_each_rows_own_step():
    model = make_model("smollm3", TOKENIZER)
    ids, mask = prompts(model, QUESTIONS)
    with torch.no_grad():
        model.reasoner.halting_head.weight.copy_(torch.randn(1, 32, generator=torch.Generator().manual_seed(0)))
        model.reasoner.halting_head.bias.zero_()
        model.reasoner.halting_head.bias.copy_(-model.think(ids, mask)[0].halting_logit.median())
    thoughts = model.think(ids, mask)
    halted = model.latents_for(ids, mask, halting=True)
    stops = thoughts[0].halting_logit > 0
    assert 0 < int(stops.sum()) < len(QUESTIONS), "the case must be mixed to show anything"
    for row, stop in enumerate(stops):
        assert torch.equal(halted[row], thoughts[0 if stop else 1].latents[row])


def test_the_number_of_steps_and_halting_reach_the_latents(monkeypatch):
    model = make_model("smollm3", TOKENIZER)
    ids, mask = prompts(model, QUESTIONS)
    first, last = (thought.latents for thought in model.think(ids, mask))
    assert torch.equal(model.latents_for(ids, mask, n_steps=1), first) and not torch.equal(first, last)
    asked, original = [], model.latents_for
    monkeypatch.setattr(model, "latents_for", lambda *args, **how: asked.append(how) or original(*args, **how))
    model.generate(ids, attention_mask=mask, n_steps=1, halting=True, **NEW)
    model.generate_with_thinking(QUESTIONS, n_steps=1, halting=True, **NEW)
    assert asked == [{"n_steps": 1, "halting": True}] * 2


def test_a_prompt_is_thought_about_once_a_call():
    model = make_model("smollm3", TOKENIZER)
    ids, mask = prompts(model, QUESTIONS)
    seen, original = [], model.reasoner.think
    model.reasoner.think = lambda *args, **how: seen.append("thought") or original(*args, **how)
    for number, options in enumerate(({}, {"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"})):
        model.generate(ids, attention_mask=mask, **NEW, **options)
        assert len(seen) == number + 1
    model.generate_with_thinking(QUESTIONS, **NEW)
    assert len(seen) == 5


def test_without_a_mask_padding_is_seen_by_its_id():
    model = make_model("smollm3", TOKENIZER)
    ids, mask = prompts(model, QUESTIONS)
    assert torch.equal(model.generate(ids, **NEW), model.generate(ids, attention_mask=mask, **NEW))


# The context


def test_a_short_prompt_is_never_touched_and_a_long_one_keeps_its_first_four_tokens():
    model = make_model("smollm3", TOKENIZER)
    ids = model.encoder.encode_prompt(" ".join(QUESTIONS))
    frame = len(model.encoder.encode_prompt(""))
    assert fit_to_context(ids, frame=frame, max_new_tokens=8, context_length=len(ids) + 8) == ids
    cut = fit_to_context(ids, frame=frame, max_new_tokens=8, context_length=len(ids) + 3)
    assert cut == ids[:4] + ids[9:]


def test_a_question_that_would_be_eaten_whole_is_refused():
    model = make_model("gpt2", TOKENIZER)
    assert model.generate_with_thinking("Why? " * 1000, max_new_tokens=4)
    with pytest.raises(UserMistake, match="nothing of it would be left; lower max_new_tokens or num_latents"):
        model.generate_with_thinking(QUESTIONS[0], max_new_tokens=600)


# Thinking again


def record_lengths(model: SmolLMv3WithTRM, monkeypatch) -> tuple[list[int], list[torch.Tensor]]:
    """What the model's `generate()` is going to be asked for: new tokens and latents of every call."""
    lengths, latents, original = [], [], model.generate

    def recorded(ids: torch.Tensor, *args, **options) -> torch.Tensor:
        written = original(ids, *args, **options)
        lengths.append(written.shape[1] - ids.shape[1])
        latents.append(options["latents"])
        return written

    monkeypatch.setattr(model, "generate", recorded)
    return lengths, latents


def write_think(model: SmolLMv3WithTRM, *, question: str, at: int) -> LogitsProcessorList:
    """Makes the model write `<think>` after so many tokens of its answer."""
    return LogitsProcessorList([WriteAt(THINK, prompts(model, [question])[0].shape[1] + at)])


def span_length(model: SmolLMv3WithTRM) -> int:
    """Tokens that a think block adds behind `<think>`."""
    return len(model.tokenizer(model.encoder.span_text, add_special_tokens=False)["input_ids"]) - 1


def test_a_think_tag_of_its_own_gets_a_span_and_the_text_goes_on():
    model = make_model("smollm3", TOKENIZER)
    force = write_think(model, question=QUESTIONS[0], at=2)
    seen = []
    original = model.reasoner.think
    model.reasoner.think = lambda *args, **kwargs: seen.append("thought") or original(*args, **kwargs)
    text = model.generate_with_thinking(QUESTIONS[:1], max_new_tokens=10, logits_processor=force)
    assert seen.count("thought") == 2
    assert "<think></think>" in text[0]
    written = TOKENIZER(text[0].replace("</think>", "", 1), add_special_tokens=False)["input_ids"]
    assert written.index(THINK) == 2
    off = model.generate_with_thinking(QUESTIONS[:1], max_new_tokens=10, logits_processor=force, rethink=False)
    assert seen.count("thought") == 3 and "<think></think>" not in off[0]
    options = {"logits_processor": force, "return_details": True, "max_new_tokens": 10, **NO_END}
    [counted] = model.generate_with_thinking(QUESTIONS[:1], **options)
    assert counted.n_tokens == 10, "what was put there, slots and </think>, is not the model's"


@pytest.mark.parametrize("option", [{"num_beams": 2}, {"streamer": TextStreamer(TOKENIZER)}])
def test_thinking_again_is_refused_with_beams_and_streamers(option):
    model = make_model("smollm3", TOKENIZER)
    with pytest.raises(UserMistake, match="rethink=True works neither with beams nor with a streamer"):
        model.generate_with_thinking(QUESTIONS[0], rethink=True, **NEW, **option)


@pytest.mark.parametrize("rethink", [None, False])
def test_end_of_text_and_the_limit_end_a_text(rethink, monkeypatch):
    model = make_model("smollm3", TOKENIZER)
    lengths, _ = record_lengths(model, monkeypatch)
    end = TOKENIZER.eos_token_id
    force = LogitsProcessorList([WriteAt(end, prompts(model, QUESTIONS[:1])[0].shape[1] + 2)])
    model.generate_with_thinking(QUESTIONS[0], logits_processor=force, rethink=rethink, **NEW)
    model.generate_with_thinking(QUESTIONS[0], suppress_tokens=[end], rethink=rethink, max_new_tokens=6)
    assert lengths == [3, 6]


def test_thinking_again_reads_the_latents_of_its_own_row_and_spends_what_is_left(monkeypatch):
    model = make_model("smollm3", TOKENIZER)
    lengths, latents = record_lengths(model, monkeypatch)
    read, original = [], LatentReasoningModel.prompt_before

    def recorded(self, ids, mask, slots, earlier_latents=None):
        read.append(earlier_latents)
        prompt = original(self, ids, mask, slots, earlier_latents)
        if earlier_latents is not None:
            filled = (ids[:, : prompt.mask.shape[1]] == self.config.slot_token_id)[0]
            assert torch.equal(prompt.embeddings[0, filled], earlier_latents[0])
        return prompt

    monkeypatch.setattr(LatentReasoningModel, "prompt_before", recorded)
    questions = [f"{n} apples. {QUESTIONS[0]}" for n in (3, 5)]  # of one length
    force = write_think(model, question=questions[0], at=2)
    model.generate_with_thinking(questions, logits_processor=force, **NEW, **NO_END)
    assert lengths == [3, 5, 5] and [found is None for found in read] == [True, False, False]
    for row, (earlier, given) in enumerate(zip(read[1:], latents[1:], strict=True)):
        assert torch.equal(earlier[0], latents[0][row]) and torch.equal(given[0, :6], latents[0][row])
        assert given.shape[1] == 12


def test_thinking_again_takes_the_steps_and_the_halting_that_were_asked_for(monkeypatch):
    model = make_model("smollm3", TOKENIZER)
    model.reasoner.halting_head.bias.data.fill_(5.0)  # every row stops after its first step
    force = write_think(model, question=QUESTIONS[0], at=2)
    given = {}
    for name, how in (("all", {}), ("one", {"n_steps": 1}), ("halted", {"halting": True})):
        _, latents = record_lengths(model, monkeypatch)
        model.generate_with_thinking(QUESTIONS[0], logits_processor=force, **NEW, **NO_END, **how)
        given[name] = latents[1][:, 6:]
    assert torch.equal(given["one"], given["halted"]) and not torch.equal(given["one"], given["all"])


@pytest.mark.parametrize("several", [False, True])
def test_stop_tokens_of_the_caller_end_a_text_that_thinks_again(several, monkeypatch):
    model = make_model("smollm3", TOKENIZER)
    stop = TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    length = prompts(model, QUESTIONS[:1])[0].shape[1]
    force = write_think(model, question=QUESTIONS[0], at=2)
    force.append(WriteAt(stop, length + 3 + span_length(model) + 1))
    lengths, _ = record_lengths(model, monkeypatch)
    ends = [stop, TOKENIZER.eos_token_id] if several else stop
    model.generate_with_thinking(QUESTIONS[0], logits_processor=force, eos_token_id=ends, **NEW, **NO_END)
    assert lengths == [3, 2]


def test_thinking_again_ends_where_the_context_does(monkeypatch):
    model = make_model("gpt2", TOKENIZER)
    span, length = span_length(model), prompts(model, QUESTIONS[:1])[0].shape[1]
    force = write_think(model, question=QUESTIONS[0], at=2)
    lengths, _ = record_lengths(model, monkeypatch)
    for context, expected in ((length + 3 + span + 2, [3, 2]), (length + 8, [3])):
        model.config.text_config.n_positions = context
        new = 8 if expected == [3] else 5 + span - 2
        model.generate_with_thinking(QUESTIONS[0], logits_processor=force, max_new_tokens=new, **NO_END)
        assert lengths == expected
        lengths.clear()


def test_a_model_that_never_stops_thinking_ends_at_its_limit(monkeypatch):
    model = make_model("smollm3", TOKENIZER)

    class Think(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = torch.full_like(scores, -1e9)
            scores[:, THINK] = 0
            return scores

    lengths, _ = record_lengths(model, monkeypatch)
    text = model.generate_with_thinking(QUESTIONS[0], logits_processor=LogitsProcessorList([Think()]), max_new_tokens=7)
    assert lengths == [1] * 7 and text.count("<think>") == 7


def test_a_question_with_the_slots_token_does_not_spoil_its_batch():
    model = make_model("smollm3", TOKENIZER)
    slot = TOKENIZER.convert_ids_to_tokens(model.config.slot_token_id)
    spoilt = [QUESTIONS[0], f"{slot}{QUESTIONS[1]}"]
    assert model.generate_with_thinking(spoilt, **NEW) == model.generate_with_thinking(QUESTIONS[:2], **NEW)
