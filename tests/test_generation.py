"""Generation is Hugging Face's own, conditioned on the latents."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, TextStreamer
from twins import ARCHITECTURES, ROWS, make_model, make_tokenizer

from smollm_trm.models.generation import encode_prompts, fit_to_context
from smollm_trm.models.smollm import SmolLMv3WithTRM

TOKENIZER = make_tokenizer()
QUESTIONS = [row["question"] for row in ROWS[:4]]
NEW = {"max_new_tokens": 8}


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


def test_the_cache_changes_nothing(model):
    ids, mask = prompts(model, QUESTIONS)
    dynamic = model.generate(ids, mask, **NEW)
    assert torch.equal(dynamic, model.generate(ids, mask, use_cache=False, **NEW))
    assert torch.equal(dynamic, model.generate(ids, mask, cache_implementation="static", **NEW))


def test_greedy_generation_follows_the_forward_pass(model):
    ids, mask = prompts(model, QUESTIONS)
    written = model.generate(ids, mask, **NEW, min_new_tokens=8)
    whole = torch.ones_like(written)
    whole[:, : mask.shape[1]] = mask
    logits = model(written, whole).logits[:, ids.shape[1] - 1 : -1]
    logits[:, :, TOKENIZER.eos_token_id] = -torch.inf
    assert torch.equal(logits.argmax(-1), written[:, ids.shape[1] :])


def test_a_batch_answers_as_its_rows_do_alone(model):
    together = model.generate_with_thinking(QUESTIONS, **NEW)
    assert together == [model.generate_with_thinking(question, **NEW) for question in QUESTIONS]


def test_beams_samples_and_streamers_get_the_latents_of_their_row(model):
    ids, mask = prompts(model, QUESTIONS)
    beams = model.generate(ids, mask, num_beams=3, **NEW)
    assert torch.equal(beams, model.generate(ids, mask, num_beams=3, use_cache=False, **NEW))
    for index in range(2):
        alone_ids, alone_mask = prompts(model, [QUESTIONS[index]])
        alone = model.generate(alone_ids, alone_mask, num_beams=3, **NEW)[0, alone_ids.shape[1] :]
        text = TOKENIZER.decode(beams[index, ids.shape[1] :], skip_special_tokens=True)
        assert TOKENIZER.decode(alone, skip_special_tokens=True) == text
    torch.manual_seed(0)
    samples = model.generate(ids, mask, do_sample=True, num_return_sequences=3, **NEW)
    torch.manual_seed(0)
    assert torch.equal(samples, model.generate(ids, mask, do_sample=True, num_return_sequences=3, **NEW))
    assert samples.shape[0] == 12


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


def test_other_latents_give_another_text():
    model = make_model("smollm3", TOKENIZER)

    def written(**options) -> list[str]:
        torch.manual_seed(0)
        return model.generate_with_thinking(QUESTIONS, max_new_tokens=16, do_sample=True, **options)

    assert written() == written(latents_from=QUESTIONS)
    assert written() != written(latents_from=QUESTIONS[1:] + QUESTIONS[:1])


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


def test_a_think_tag_of_its_own_gets_a_span_and_the_text_goes_on():
    model = make_model("smollm3", TOKENIZER)
    think = TOKENIZER.convert_tokens_to_ids("<think>")
    ids, _ = prompts(model, QUESTIONS[:1])
    force = LogitsProcessorList([WriteAt(think, ids.shape[1] + 2)])
    seen = []
    original = model.reasoner.think
    model.reasoner.think = lambda *args, **kwargs: seen.append("thought") or original(*args, **kwargs)
    text = model.generate_with_thinking(QUESTIONS[:1], max_new_tokens=10, logits_processor=force)
    assert seen.count("thought") == 2
    assert "<think></think>" in text[0]
    written = TOKENIZER(text[0].replace("</think>", "", 1), add_special_tokens=False)["input_ids"]
    assert written.index(think) == 2
    off = model.generate_with_thinking(QUESTIONS[:1], max_new_tokens=10, logits_processor=force, rethink=False)
    assert seen.count("thought") == 3 and "<think></think>" not in off[0]


@pytest.mark.parametrize("option", [{"num_beams": 2}, {"streamer": TextStreamer(TOKENIZER)}])
def test_thinking_again_is_refused_with_beams_and_streamers(option):
    model = make_model("smollm3", TOKENIZER)
    with pytest.raises(ValueError, match="rethink=True works neither with beams nor with a streamer"):
        model.generate_with_thinking(QUESTIONS[0], rethink=True, **NEW, **option)


def test_a_short_question_is_never_touched_and_a_long_one_keeps_its_first_four_tokens():
    model = make_model("smollm3", TOKENIZER)
    ids = model.encoder.encode_question(" ".join(QUESTIONS))
    span = len(model.encoder.encode_span())
    exact = len(ids) + span + 8
    assert fit_to_context(ids, encoder=model.encoder, max_new_tokens=8, context_length=exact) == ids
    cut = fit_to_context(ids, encoder=model.encoder, max_new_tokens=8, context_length=exact - 5)
    assert cut == ids[:4] + ids[9:]


def test_a_question_that_would_be_eaten_whole_is_refused():
    model = make_model("gpt2", TOKENIZER)
    assert model.generate_with_thinking("Why? " * 1000, max_new_tokens=4)
    with pytest.raises(ValueError, match="nothing of it would be left; lower max_new_tokens or num_latents"):
        model.generate_with_thinking(QUESTIONS[0], max_new_tokens=600)


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


def test_slots_hold_their_latents_in_order_in_both_passes():
    model = make_model("smollm3", TOKENIZER)
    ids, mask = prompts(model, QUESTIONS[:2])
    thought = model.think(ids, mask)[-1]
    seen = []
    model.causal_lm.model.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    model(ids, mask, thought=thought)
    model.generate(ids, mask, latents=thought.latents, max_new_tokens=1)
    start, end = model.span_of(ids, mask).columns()
    assert len(seen) == 2 and all(torch.equal(states[:, start:end], thought.latents) for states in seen)


def test_without_a_mask_padding_is_seen_by_its_id(monkeypatch):
    model = make_model("smollm3", TOKENIZER)
    ids, mask = prompts(model, QUESTIONS)
    asked, original = [], model.latents_for
    monkeypatch.setattr(model, "latents_for", lambda ids, given, **how: asked.append(given) or original(ids, given))
    model.generate(ids, **NEW)
    assert not mask.all() and torch.equal(asked[0], mask)


def test_the_number_of_steps_and_halting_reach_the_latents(monkeypatch):
    model = make_model("smollm3", TOKENIZER)
    ids, mask = prompts(model, QUESTIONS)
    first, last = (thought.latents for thought in model.think(ids, mask))
    assert torch.equal(model.latents_for(ids, mask, n_steps=1), first) and not torch.equal(first, last)
    asked, original = [], model.latents_for
    monkeypatch.setattr(model, "latents_for", lambda *args, **how: asked.append(how) or original(*args, **how))
    model.generate(ids, mask, n_steps=1, halting=True, **NEW)
    model.generate_with_thinking(QUESTIONS, n_steps=1, halting=True, **NEW)
    assert asked == [{"n_steps": 1, "halting": True}] * 2


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
    read, original = [], model.read

    def recorded(ids: torch.Tensor, mask: torch.Tensor, earlier_latents: torch.Tensor | None = None):
        read.append(earlier_latents)
        return original(ids, mask, earlier_latents)

    monkeypatch.setattr(model, "read", recorded)
    think = TOKENIZER.convert_tokens_to_ids("<think>")
    questions = [f"{n} apples. {QUESTIONS[0]}" for n in (3, 5)]  # of one length
    force = LogitsProcessorList([WriteAt(think, prompts(model, questions)[0].shape[1] + 2)])
    options = {"logits_processor": force, "suppress_tokens": [TOKENIZER.eos_token_id]}
    model.generate_with_thinking(questions, **NEW, **options)
    assert lengths == [3, 5, 5] and [found is None for found in read] == [True, False, False]
    for row, (earlier, given) in enumerate(zip(read[1:], latents[1:], strict=True)):
        assert torch.equal(earlier[0], latents[0][row]) and torch.equal(given[0, :6], latents[0][row])
        assert given.shape[1] == 12


@pytest.mark.parametrize("repeat", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
def test_rows_that_are_repeated_keep_the_latents_of_the_row_they_come_from(repeat):
    model = make_model("smollm3", TOKENIZER)
    ids, mask = prompts(model, QUESTIONS[:2])
    latents = model.latents_for(ids, mask)
    seen = []
    model.causal_lm.model.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    model.generate(ids, mask, latents=latents, max_new_tokens=1, **repeat)
    start, end = model.span_of(ids, mask).columns()
    assert torch.equal(seen[0][:, start:end], latents[[0, 0, 0, 1, 1, 1]])


def write_think(model: SmolLMv3WithTRM, *, question: str, at: int) -> LogitsProcessorList:
    """Makes the model write `<think>` after so many tokens of its answer."""
    return LogitsProcessorList(
        [WriteAt(TOKENIZER.convert_tokens_to_ids("<think>"), prompts(model, [question])[0].shape[1] + at)]
    )


def test_thinking_again_takes_the_steps_and_the_halting_that_were_asked_for(monkeypatch):
    model = make_model("smollm3", TOKENIZER)
    model.reasoner.halting_head.bias.data.fill_(5.0)  # every row stops after its first step
    force = write_think(model, question=QUESTIONS[0], at=2)
    options = {"logits_processor": force, "suppress_tokens": [TOKENIZER.eos_token_id]}
    given = {}
    for name, how in (("all", {}), ("one", {"n_steps": 1}), ("halted", {"halting": True})):
        _, latents = record_lengths(model, monkeypatch)
        model.generate_with_thinking(QUESTIONS[0], **NEW, **options, **how)
        given[name] = latents[1][:, 6:]
    assert torch.equal(given["one"], given["halted"]) and not torch.equal(given["one"], given["all"])


@pytest.mark.parametrize("several", [False, True])
def test_stop_tokens_of_the_caller_end_a_text_that_thinks_again(several, monkeypatch):
    model = make_model("smollm3", TOKENIZER)
    stop = TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    length = prompts(model, QUESTIONS[:1])[0].shape[1]
    force = write_think(model, question=QUESTIONS[0], at=2)
    force.append(WriteAt(stop, length + 3 + len(model.encoder.encode_span()) + 1))
    lengths, _ = record_lengths(model, monkeypatch)
    given = {"eos_token_id": [stop, TOKENIZER.eos_token_id] if several else stop}
    options = {"suppress_tokens": [TOKENIZER.eos_token_id], **given}
    model.generate_with_thinking(QUESTIONS[0], logits_processor=force, **NEW, **options)
    assert lengths == [3, 2]


def test_thinking_again_ends_where_the_context_does(monkeypatch):
    model = make_model("gpt2", TOKENIZER)
    span, length = len(model.encoder.encode_span()), prompts(model, QUESTIONS[:1])[0].shape[1]
    force = write_think(model, question=QUESTIONS[0], at=2)
    lengths, _ = record_lengths(model, monkeypatch)
    options = {"logits_processor": force, "suppress_tokens": [TOKENIZER.eos_token_id]}
    for context, expected in ((length + 3 + span + 2, [3, 2]), (length + 8, [3])):
        model.config.n_positions = context
        model.generate_with_thinking(QUESTIONS[0], max_new_tokens=8 if expected == [3] else 5 + span - 2, **options)
        assert lengths == expected
        lengths.clear()


def test_a_model_that_never_stops_thinking_ends_at_its_limit(monkeypatch):
    model = make_model("smollm3", TOKENIZER)

    class Think(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = torch.full_like(scores, -1e9)
            scores[:, TOKENIZER.convert_tokens_to_ids("<think>")] = 0
            return scores

    lengths, _ = record_lengths(model, monkeypatch)
    text = model.generate_with_thinking(QUESTIONS[0], logits_processor=LogitsProcessorList([Think()]), max_new_tokens=7)
    assert lengths == [1] * 7 and text.count("<think>") == 7


def test_a_question_with_the_slots_token_does_not_spoil_its_batch():
    model = make_model("smollm3", TOKENIZER)
    slot = TOKENIZER.convert_ids_to_tokens(model.slot_id)
    spoilt = [QUESTIONS[0], f"{slot}{QUESTIONS[1]}"]
    assert model.generate_with_thinking(spoilt, **NEW) == model.generate_with_thinking(QUESTIONS[:2], **NEW)
