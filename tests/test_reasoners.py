"""The seam: what a reasoner may ask of a prompt, what it pays for, and how a new one comes in."""

import math

import pytest
import torch
from torch import nn
from twins import ROWS, SMALL, SMALL_TRM, make_base, make_batch, make_model, make_tokenizer

from smollm_trm.data.batching import pad_left
from smollm_trm.evaluation.evaluate import evaluate_gsm8k
from smollm_trm.models.configuration import LatentReasoningConfig
from smollm_trm.models.prompt import Prompt
from smollm_trm.models.reasoners.compressor import CLAMPED_AT
from smollm_trm.models.reasoners.known import REASONERS, build_reasoner
from smollm_trm.models.reasoners.reasoner import LatentScale, Reasoner, Thought, latent_variation
from smollm_trm.models.recursion import RecursiveReasoningBase
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.records import UserMistake

TOKENIZER = make_tokenizer()
QUESTIONS = [row["question"] for row in ROWS[:4]]
SIZES = {"num_latents": 5, "hidden_size": 8, "depth": 3}


class MeanReader(Reasoner):
    """The mean of the prompt's states, projected: the newcomer of ten lines."""

    def __init__(self, settings, *, num_latents, hidden_size, depth):
        super().__init__(settings, num_latents=num_latents, hidden_size=hidden_size, depth=depth)
        self.project = nn.Linear(hidden_size, num_latents * hidden_size)
        self.scale = LatentScale(hidden_size=hidden_size, gain=settings.gain)

    def think(self, prompt, *, n_steps=None, gradient_at_every_step=False):
        [states] = prompt.hidden_states([1])
        real = prompt.mask.unsqueeze(-1)
        mean = (states * real).sum(1) / real.sum(1)
        return [Thought(self.scale(self.project(mean).unflatten(-1, (-1, mean.shape[-1]))))]


def test_a_reasoner_of_ten_lines_trains_saves_reloads_generates_and_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.setitem(REASONERS, "mean", MeanReader)
    model = make_model("smollm3", TOKENIZER, reasoner="mean", reasoner_settings={"gain": 0.5})
    assert model.reasoner.scale.gain.item() == 0.5 and model.reasoner.scale.anchor.any(), "it starts near the base"
    before = {name: value.clone() for name, value in model.reasoner.state_dict().items()}
    groups = [group._asdict() for group in model.reasoner.parameter_groups(1e-2)]
    optimizer = torch.optim.AdamW([{"params": g["parameters"], "lr": g["learning_rate"]} for g in groups])
    model.train()(**make_batch(model, ROWS[:4])).loss.backward()
    optimizer.step()
    model.eval().save_pretrained(tmp_path)
    assert not torch.equal(model.reasoner.project.weight, before["project.weight"])
    loaded = SmolLMv3WithTRM.from_pretrained(tmp_path, model_name=(make_base("smollm3", TOKENIZER), TOKENIZER))
    batch = make_batch(model, ROWS[:4])
    assert torch.allclose(loaded(**batch).logits, model(**batch).logits, atol=1e-6)
    options = {"max_new_tokens": 6}
    assert loaded.generate_with_thinking(QUESTIONS, **options) == model.generate_with_thinking(QUESTIONS, **options)
    for latents in ("own", "shuffled"):
        result = evaluate_gsm8k(loaded, ROWS[:6], batch_size=3, latents=latents, progress=False, **options)
        assert result["total"] == 6
    for cache in ({"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 2}):
        assert len(loaded.generate_with_thinking(QUESTIONS, **options, **cache)) == 4
    variation = model.reasoner.logs(model.think(batch["input_ids"], batch["attention_mask"])[-1])["latent_variation"]
    assert variation > 0


def test_a_reasoner_that_is_not_there_is_refused_by_name():
    with pytest.raises(UserMistake, match="reasoner='mean': choose one of trm, compressor, static, pause, coconut"):
        make_model("smollm3", TOKENIZER, reasoner="mean")


# What each costs


@pytest.mark.parametrize(
    ("reasoner", "passes"), [("static", 0), ("pause", 0), ("compressor", 1), ("trm", 1), ("coconut", 6), (None, 0)]
)
def test_a_reasoner_pays_only_for_what_it_asks(reasoner, passes):
    model = make_model("smollm3", TOKENIZER, reasoner=reasoner)
    counted = []
    model.model.language_model.register_forward_pre_hook(lambda *_: counted.append(1))
    model(**make_batch(model, ROWS[:2]))
    assert len(counted) == passes + 1
    counted.clear()
    model.generate_with_thinking(QUESTIONS, max_new_tokens=3, min_new_tokens=3)
    assert len(counted) == passes + 3


def test_static_latents_are_the_same_for_every_row_and_pause_tokens_for_every_slot():
    batch = make_batch(make_model("smollm3", TOKENIZER), ROWS[:3])
    static = make_model("smollm3", TOKENIZER, reasoner="static")(**batch).latents
    assert torch.equal(static[0], static[1]) and not torch.allclose(static[0, 0], static[0, 1])
    pause = make_model("smollm3", TOKENIZER, reasoner="pause")
    latents = pause(**batch).latents
    assert torch.equal(latents, latents[:1, :1].expand_as(latents)) and pause.reasoner.states.shape == (1, 32)
    assert pause.reasoner.logs(Thought(latents)) == {}


def test_what_is_read_carries_gradients_into_the_adapter_and_never_into_a_frozen_base():
    for base_training, adapted in (("lora", {"lora_A", "lora_B"}), ("frozen", set())):
        model = make_model("smollm3", TOKENIZER, base_training=base_training)
        batch = make_batch(model, ROWS[:2])
        model.think(batch["input_ids"], batch["attention_mask"])[-1].latents.square().sum().backward()
        moved = [name for name, p in model.named_parameters() if p.grad is not None and ".reasoner." not in name]
        assert {part for name in moved for part in name.split(".") if "lora" in part} == adapted
        assert all("lora" in name for name in moved)


# Statistics and scales


def make_prompts(model: SmolLMv3WithTRM, *, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = pad_left([model.encoder.encode_prompt(row["question"]) for row in ROWS], 0)
    zeros = torch.zeros(len(ids), padding, dtype=torch.long)
    return torch.cat([zeros, ids], dim=1), torch.cat([zeros, mask], dim=1)


def test_fitted_states_have_mean_0_and_deviation_1_over_real_tokens_without_the_first():
    model = make_model("smollm3", TOKENIZER)
    ids, mask = make_prompts(model)
    model.model.fit_reasoner(ids, mask)
    reasoner = model.reasoner
    slots = ids == model.config.slot_token_id
    prompt = model.model.prompt_before(ids, mask, slots)
    states = prompt.hidden_states(reasoner.read_depths)
    counted = prompt.mask & (prompt.mask.cumsum(1) > 1)
    assert int(counted.sum()) == int(prompt.mask.sum()) - len(ids)
    free = [
        (state - mean) / deviation
        for state, mean, deviation in zip(
            states, reasoner.standardize.mean, reasoner.standardize.deviation, strict=True
        )
    ]
    for standard in free:
        assert torch.allclose(standard[counted].mean(0), torch.zeros(32), atol=1e-4)
        assert torch.allclose(standard[counted].std(0), torch.ones(32), atol=1e-4)
    expected = torch.cat(free, dim=-1).clamp(-CLAMPED_AT, CLAMPED_AT)
    assert torch.allclose(reasoner.standardize(states), expected, atol=1e-5)


def test_padding_changes_no_statistics():
    fitted = []
    for padding in (0, 7):
        model = make_model("smollm3", TOKENIZER)
        model.model.fit_reasoner(*make_prompts(model, padding=padding))
        fitted.append(model.reasoner.standardize.state_dict())
    assert all(torch.allclose(fitted[0][name], fitted[1][name], atol=1e-5) for name in ("mean", "deviation"))


def test_dropout_changes_no_statistics_and_every_module_keeps_its_mode():
    model = make_model("gpt2", TOKENIZER)
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert len(dropouts) > 3
    model.fit_reasoner(QUESTIONS)
    expected = model.reasoner.standardize.mean.clone()
    model.train().reasoner.eval()
    for module in dropouts:
        module.p = 0.9
    modes = [module.training for module in model.modules()]
    model.fit_reasoner(QUESTIONS)
    assert torch.equal(expected, model.reasoner.standardize.mean)
    assert [module.training for module in model.modules()] == modes


def test_one_massive_dimension_does_not_drown_the_others():
    torch.manual_seed(0)
    reasoner = build_reasoner("compressor", {"compression_heads": 2, "n_read_layers": 2}, **SIZES)
    states = [torch.randn(40, 7, 8), torch.randn(40, 7, 8)]
    massive = [state.clone() for state in states]
    for state in massive:
        state[..., 3] = 1000 + 10 * torch.randn(40, 7)
    mask = torch.ones(40, 7, dtype=torch.bool)
    variations = {}
    for name in ("raw", "fitted"):
        if name == "fitted":
            reasoner.standardize.fit(massive, mask)
        variations[name] = float(latent_variation(reasoner.compress(massive, mask)))
    assert variations["fitted"] > 2 * variations["raw"] and variations["fitted"] > 0.5


def test_the_constants_that_a_fixed_recursion_starts_from_have_deviation_1():
    torch.manual_seed(0)
    settings = {"dim": 4096, "n_heads": 2, "compression_heads": 2, "n_layers": 1, "start": "fixed", "n_read_layers": 1}
    with torch.device("meta"):
        assert build_reasoner("trm", settings, **SIZES).recursion.initial_answer.shape == (4096,)

    class Network(nn.Module):
        dim = 50_000

    recursion = RecursiveReasoningBase(network=Network())
    for start in (recursion.initial_answer, recursion.initial_latent):
        assert math.isclose(start.std().item(), 1, rel_tol=0.05) and start.abs().max() < 2.4
    assert not torch.equal(recursion.initial_answer, recursion.initial_latent)


def test_the_gain_is_the_size_of_a_latent_around_its_anchor():
    torch.manual_seed(0)
    table = 0.05 * torch.randn(100, 16)
    for gain in (0.5, 2.0):
        scale = LatentScale(hidden_size=16, gain=gain)
        scale.match(table, table[3])
        around = scale(torch.ones(16)) - table[3]
        assert torch.isclose(around.square().mean().sqrt(), gain * table.square().mean().sqrt())
    with pytest.raises(UserMistake, match="gain=-1: must be above 0, or no gradient reaches the reasoner"):
        build_reasoner("static", {"gain": -1}, **SIZES)


# The TRM


def small_trm(**settings):
    torch.manual_seed(0)
    return build_reasoner("trm", {**SMALL_TRM, "dim": 16, "n_read_layers": 1, **settings}, **SIZES)


def test_a_thought_is_the_answer_and_halting_reads_its_first_latent():
    reasoner = small_trm()
    torch.nn.init.normal_(reasoner.halting_head.weight)
    states, mask = [torch.randn(2, 7, 8)], torch.ones(2, 7, dtype=torch.bool)
    thoughts = reasoner.reason(states, mask, n_steps=None, gradient_at_every_step=False)
    for thought, answer in zip(thoughts, reasoner.recursion(reasoner.compress(states, mask)), strict=True):
        assert torch.allclose(thought.latents, reasoner.to_latents(answer), atol=1e-5)
        assert torch.allclose(thought.halting_logit, reasoner.halting_head(answer[:, 0])[:, 0], atol=1e-5)


def test_every_supervision_steps_latents_may_be_asked_for():
    reasoner = small_trm()
    states, mask = torch.randn(2, 7, 8), torch.ones(2, 7, dtype=torch.bool)
    steps = reasoner(states, mask, return_all_steps=True)
    assert len(steps) == 2 and all(latents.requires_grad and latents.shape == (2, 5, 8) for latents in steps)
    assert torch.equal(reasoner(states, mask), steps[-1]) and not torch.equal(*steps)


def test_more_and_fewer_steps_than_trained_may_be_asked_for():
    model = make_model("smollm3", TOKENIZER)
    batch = make_batch(model, ROWS[:2])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    counts = [len(model.think(ids, mask, n_steps=n)) for n in (1, 2, 4)]
    assert counts == [1, 2, 4]
    only_last = model.think(ids, mask, n_steps=3)
    network = list(model.reasoner.recursion.parameters())
    reached = [
        torch.autograd.grad(thought.latents.sum(), network, retain_graph=True, allow_unused=True)[0] is not None
        for thought in only_last
    ]
    assert reached == [False, False, True]
    every = model.think(ids, mask, n_steps=3, gradient_at_every_step=True)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(only_last, every, strict=True))
    with pytest.raises(UserMistake, match="n_steps=0"):
        model.think(ids, mask, n_steps=0)


def test_the_recursion_moves_slower_by_its_calls_with_gradient():
    reasoner = small_trm(n_latent_steps=3)
    groups = {group.name: group for group in reasoner.parameter_groups(1e-3)}
    assert groups["recursion"].learning_rate == 1e-3 / 4 and groups["reasoner"].learning_rate == 1e-3
    grouped = [id(p) for group in groups.values() for p in group.parameters]
    assert sorted(grouped) == sorted(id(p) for p in reasoner.parameters())


def test_a_wide_reasoner_moves_slower_by_its_width():
    for name, slower in (("compressor", 1), ("trm", 3)):
        for dim, factor in ((64, 1), (128, 1), (256, 2)):
            settings = {"dim": dim} | ({"n_latent_steps": 2} if name == "trm" else {})
            reasoner = build_reasoner(name, settings, num_latents=2, hidden_size=32, depth=2)
            rates = {group.name: group.learning_rate for group in reasoner.parameter_groups(1e-3)}
            assert rates["reasoner"] == pytest.approx(1e-3 / factor)
            assert rates.get("recursion", 1e-3 / factor / slower) == pytest.approx(1e-3 / factor / slower)


def test_the_papers_preset_is_trm_as_published():
    config = LatentReasoningConfig(reasoner_settings={"preset": "paper", "n_heads": 4})
    expected = {"n_latent_steps": 6, "n_deep_recursions": 3, "n_supervision_steps": 16, "branch_scale": None}
    assert expected.items() <= config.reasoner_settings.items() and config.reasoner_settings["start"] == "fixed"
    assert config.reasoner_settings["n_heads"] == 4
    with pytest.raises(UserMistake, match="preset='page': choose one of paper"):
        LatentReasoningConfig(reasoner_settings={"preset": "page"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_layer": 1}, "unknown setting 'n_layer'; did you mean 'n_layers'"),
        ({"n_layers": 0}, "n_layers=0: must be at least 1"),
        ({"n_latent_steps": 0}, "n_latent_steps=0: must be at least 1"),
        ({"n_heads": 2.5}, "n_heads=2.5 must be int"),
        ({"dropout": 1.0}, r"dropout=1.0: must be in \[0, 1\)"),
        ({"start": "anywhere"}, "start='anywhere': choose one of question, fixed"),
        ({"compression_heads": 3}, "compression_heads=3 must divide"),
        ({"n_heads": 5}, "n_heads=5 must divide"),
        ({"n_read_layers": 0}, "n_read_layers=0: must be at least 1"),
        ({"dim": 0}, "dim=0: must be at least 1"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, message):
    with pytest.raises(UserMistake, match=message):
        build_reasoner("trm", {**SMALL_TRM, **settings}, **SIZES)


@pytest.mark.parametrize("reasoner", ["trm", "compressor"])
def test_a_branch_of_the_prompt_that_is_padding_is_never_read(reasoner):
    torch.manual_seed(0)
    built = build_reasoner(reasoner, SMALL[reasoner], **SIZES)
    states, mask = [torch.randn(1, 7, 8) for _ in range(3)], torch.ones(1, 7, dtype=torch.bool)
    padded = [torch.cat([torch.full((1, 4, 8), 50.0), state], dim=1) for state in states]
    wide = torch.cat([torch.zeros(1, 4, dtype=torch.bool), mask], dim=1)
    assert torch.allclose(built(states, mask), built(padded, wide), atol=1e-5)


def test_a_prompt_computes_nothing_before_it_is_asked():
    def never(*_, **__):
        raise AssertionError("the base was run")

    prompt = Prompt(decoder=never, embeddings=torch.zeros(2, 3, 8), mask=torch.ones(2, 3).bool(), n_slots=torch.ones(2))
    built = build_reasoner("static", {}, **SIZES)
    assert built.think(prompt)[0].latents.shape == (2, 5, 8)
    with pytest.raises(AttributeError):
        prompt.hidden_states([1])
