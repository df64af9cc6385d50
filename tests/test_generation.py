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
