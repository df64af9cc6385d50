"""The recursion learns what is in its input and nothing else; assembled, it answers from the states it is given."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from thinkers import generate, save_thinker
from twins import ROWS, make_base, make_tokenizer

from smollm_trm import commands
from smollm_trm.data.rows import write_jsonl
from smollm_trm.evaluation.evaluate import evaluate_gsm8k
from smollm_trm.models.dimension import StateMoments
from smollm_trm.models.generation import encode_prompts
from smollm_trm.models.reasoners.sequence_trm import SequenceTRM
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.phases.assemble import assemble
from smollm_trm.phases.datagen import OF_A_PAIR, file_digest, read_index, read_shards
from smollm_trm.phases.parts import fill, read_part, save_part
from smollm_trm.phases.settings import AssembleSettings, CompareStatesSettings, DatagenSettings, SequenceSettings
from smollm_trm.phases.states import compare_states, give_states
from smollm_trm.phases.trm import (
    SequenceModule,
    compress_pairs,
    part_of_problem,
    train_sequence_trm,
    trm_command,
)
from smollm_trm.records import UserMistake
from smollm_trm.training.ema import AverageWeights

SIZE, WIDTH = 16, 8
SMALL = {"n_layers": 1, "n_heads": 2, "n_latent_steps": 1, "n_deep_recursions": 2, "n_supervision_steps": 2,
         "batch_size": 16, "progress": True}  # fmt: skip


def write_pairs(folder: Path, count: int, *, learnable: bool) -> Path:
    """Pairs whose target is a function of the first token of the context, not of the last; or of nothing there."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    lengths = [3 + at % 4 for at in range(count)]
    before = [torch.randn(length, SIZE) for length in lengths]
    mixing = torch.randn(SIZE, SIZE) / SIZE**0.5
    noise = torch.randn(count, SIZE)
    after = torch.stack([(one[0] @ mixing).tanh() for one in before]) if learnable else noise
    plain = {name: [f"{name} {at}" for at in range(count)] for name in OF_A_PAIR} | {"seq_lengths": lengths}
    path = folder / "pairs-00000.safetensors"
    save_file({"hidden_pre": torch.cat(before), "hidden_post": 7 + after}, path)
    index = {"base": "me/base", "base_fingerprint": "f", "hidden_size": SIZE, "n_pairs": count,
             "shards": {path.name: {"sha256": file_digest(path), **plain}}}  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def write_compressor(folder: Path, pairs: Path, width: int = WIDTH, **changes) -> str:
    moments = StateMoments(SIZE)
    for before, after, _ in read_shards(pairs, read_index(pairs)):
        moments.add(torch.cat([before, after[None]]))
    named = {"base": "me/base", "base_fingerprint": "f", "hidden_size": SIZE, "d_compressed": width, "measured": {}}
    save_part(folder, "compressor", moments.principal(width), **{**named, **changes})
    return str(folder)


@pytest.fixture(scope="module")
def learnable(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learnable")
    pairs = write_pairs(folder / "pairs", 600, learnable=True)
    return pairs, write_compressor(folder / "compressor", pairs, SIZE)


def settings(pairs: Path, compressor: str, folder: Path, **changes) -> SequenceSettings:
    given = {**SMALL, "data": str(pairs), "compressor_checkpoint": compressor, "output_dir": str(folder)}
    return SequenceSettings(**{**given, **changes})


def test_what_is_in_the_context_is_learned_where_ridge_regression_cannot(learnable, tmp_path):
    given = settings(*learnable, tmp_path, num_epochs=8, learning_rate=1e-2, n_heads=4)
    found = train_sequence_trm(given)["held_out"]
    assert found["SequenceTRM"]["unexplained"] < 0.85 < 0.95 < found["ridge"]["unexplained"]
    assert found["mean target"]["unexplained"] == pytest.approx(1, abs=0.05)
    assert found["mean target"]["cosine"] > 0.95, "which is why a cosine alone proves nothing"
    told = trm_command(given)
    assert "SequenceTRM: cosine" in told and "mean target: cosine" in told and "held-out problems" in told


def test_noise_is_not_predicted_so_nothing_leaks(tmp_path):
    pairs = write_pairs(tmp_path / "pairs", 200, learnable=False)
    compressor = write_compressor(tmp_path / "compressor", pairs)
    found = train_sequence_trm(settings(pairs, compressor, tmp_path / "run", num_epochs=4, learning_rate=1e-2))
    assert found["held_out"]["SequenceTRM"]["unexplained"] > 0.95


def test_no_problem_is_in_two_parts(learnable, tmp_path):
    pairs, _ = learnable
    assert part_of_problem("Tom has 3 apples.") == part_of_problem("tom has  3 apples")
    names = [plain["problems"] for _, _, plain in read_shards(pairs, read_index(pairs))]
    counts = {part: sum(part_of_problem(name) == part for name in names) for part in ("train", "dev", "held_out")}
    assert sum(counts.values()) == len(names) and min(counts.values()) > 30


def one_batch(settings: SequenceSettings, learnable) -> tuple[SequenceModule, dict[str, torch.Tensor]]:
    moments = StateMoments(SIZE)
    for before, after, _ in read_shards(learnable[0], read_index(learnable[0])):
        moments.add(torch.cat([before, after[None]]))
    parts = compress_pairs(learnable[0], read_index(learnable[0]), moments.principal(WIDTH))
    torch.manual_seed(0)
    trm = SequenceTRM(d_compressed=WIDTH, **settings.network())
    trm.fit(torch.cat(parts["train"].contexts), torch.stack(parts["train"].targets))
    return SequenceModule(trm, settings, steps=10), parts["train"][list(range(16))]


def test_padding_and_neighbours_change_nothing(learnable):
    module, batch = one_batch(SequenceSettings(**SMALL), learnable)
    together = module.trm(batch["context"], batch["mask"])
    for row in range(4):
        length = int(batch["mask"][row].sum())
        alone = module.trm(batch["context"][row : row + 1, -length:], batch["mask"][row : row + 1, -length:])
        for (state, logit), (its_state, its_logit) in zip(together, alone, strict=True):
            torch.testing.assert_close(state[row], its_state[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(logit[row], its_logit[0], atol=1e-4, rtol=1e-4)


def test_the_halting_losses_are_the_guides(learnable):
    for changes in ({}, {"bce_halt_loss": True}, {"use_halting": False}):
        module, batch = one_batch(replace(SequenceSettings(**SMALL), **changes), learnable)
        trm = module.trm
        question, mask = trm.augment(batch["context"], batch["mask"])
        answer, _ = trm.recursion.refine(question, *trm.recursion.start(question), mask)
        state, logit = trm.read(answer)
        cosine = torch.cosine_similarity(state - trm.target_mean, batch["target"] - trm.target_mean)
        wanted = ((state - batch["target"]) / trm.target_scale).square().mean()
        if changes.get("use_halting", True):
            target = (cosine > 0.7).float() if changes else cosine.clamp(0, 1)
            probability = logit.sigmoid()
            squared = (probability - target).square().mean()
            bce = -(target * probability.log() + (1 - target) * (1 - probability).log()).mean()
            wanted = wanted + 0.5 * (bce if changes else squared)
        torch.testing.assert_close(module.losses(answer, batch["target"])[0], wanted)


class Recorder:
    """Stands in for Lightning: counts what the module asks of it."""

    def __init__(self, module: SequenceModule, monkeypatch) -> None:
        self.optimizer = torch.optim.SGD(module.trm.parameters(), lr=1e-3)
        self.steps, step = 0, self.optimizer.step

        def counted():
            self.steps += 1
            step()

        self.optimizer.step = counted
        own = {"optimizers": lambda: self.optimizer, "manual_backward": lambda loss: loss.backward(),
               "clip_gradients": lambda *_, **__: None, "log": lambda *_, **__: None,
               "lr_schedulers": lambda: SimpleNamespace(step=lambda: None)}  # fmt: skip
        for name, value in own.items():
            monkeypatch.setattr(module, name, value, raising=False)
        monkeypatch.setattr(SequenceModule, "current_epoch", 0)


@pytest.mark.parametrize(("changes", "steps"), [({}, 2), ({"per_step_updates": False}, 1)])
def test_an_update_follows_every_supervision_step(learnable, monkeypatch, changes, steps):
    module, batch = one_batch(replace(SequenceSettings(**SMALL), **changes), learnable)
    recorder = Recorder(module, monkeypatch)
    module.training_step(batch, 0)
    assert recorder.steps == steps


def test_training_on_a_batch_stops_early_only_when_every_row_would(learnable, monkeypatch):
    for bias, steps in ((-5.0, 2), (5.0, 1)):
        module, batch = one_batch(SequenceSettings(**SMALL), learnable)
        torch.nn.init.constant_(module.trm.halt_head.bias, bias)
        recorder = Recorder(module, monkeypatch)
        module.training_step(batch, 0)
        assert recorder.steps == steps


def test_the_threshold_follows_the_epochs_mean_cosine(learnable):
    module, _ = one_batch(replace(SequenceSettings(**SMALL), bce_halt_loss=True), learnable)
    module.cosines.copy_(torch.tensor([6.0, 10.0]))
    module.on_train_epoch_end()
    assert float(module.threshold) == pytest.approx(0.95 * 0.6) and float(module.cosines.sum()) == 0
    fixed, _ = one_batch(replace(SequenceSettings(**SMALL), adaptive_halt_threshold=False), learnable)
    fixed.cosines.copy_(torch.tensor([6.0, 10.0]))
    fixed.on_train_epoch_end()
    assert float(fixed.threshold) == pytest.approx(0.7)


def test_the_average_moves_once_for_every_optimizer_step_of_a_batch():
    class Stand:
        global_step = 0

    one, several = AverageWeights(limit=0.9), AverageWeights(limit=0.9)
    module = torch.nn.Linear(1, 1, bias=False)
    for average in (one, several):
        torch.nn.init.zeros_(module.weight)
        average.on_fit_start(Stand, module)
        torch.nn.init.ones_(module.weight)
    for step in (1, 2, 3):
        Stand.global_step = step
        one.on_train_batch_end(Stand, module)
    several.on_train_batch_end(Stand, module)
    torch.testing.assert_close(one.averages, several.averages)


def test_a_stopped_run_goes_on_to_the_same_end(learnable, tmp_path):
    given = settings(*learnable, tmp_path / "whole", num_epochs=3, learning_rate=1e-3, bce_halt_loss=True)
    whole = train_sequence_trm(given)
    fit = SequenceModule.on_train_epoch_end

    def stop(self):
        fit(self)
        if self.current_epoch == 1:
            raise KeyboardInterrupt

    broken = replace(given, output_dir=str(tmp_path / "broken"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceModule, "on_train_epoch_end", stop)
        with pytest.raises(KeyboardInterrupt):
            train_sequence_trm(broken)
    again = train_sequence_trm(broken)
    assert again["held_out"] == whole["held_out"] and again["halt_threshold"] == whole["halt_threshold"]


def test_another_compressor_is_refused(learnable, tmp_path):
    pairs, _ = learnable
    other = write_compressor(tmp_path / "other", pairs, base_fingerprint="g", base="you/base")
    with pytest.raises(UserMistake, match="was made with you/base, 16 wide: it does not fit the pairs in"):
        train_sequence_trm(settings(pairs, other, tmp_path / "run"))


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    """All of it on a tiny thinker: pairs, compressor, recursion, assembled model."""
    folder = tmp_path_factory.mktemp("assembled")
    rows = [{"question": row["question"], "answer": row["answer"]} for row in ROWS]
    write_jsonl(folder / "data" / "train.jsonl", rows[:50])
    write_jsonl(folder / "data" / "test.jsonl", rows[50:])
    thinker = save_thinker(folder / "base")
    generate(thinker, str(folder / "pairs"), dataset="gsm8k", data_dir=str(folder / "data"), num_samples=50,
             checkpoint_every=25, max_new_tokens=24, batch_size=25)  # fmt: skip
    index = read_index(folder / "pairs")
    moments = StateMoments(32)
    for before, _, _ in read_shards(folder / "pairs", index):
        moments.add(before)
    of_base = {name: index[name] for name in ("base", "base_fingerprint", "hidden_size")}
    save_part(folder / "compressor", "compressor", moments.principal(WIDTH), **of_base, d_compressed=WIDTH, measured={})
    with pytest.MonkeyPatch.context() as patch:
        parts = ("train", "train", "dev", "held_out")
        patch.setattr("smollm_trm.phases.trm.part_of_problem", lambda one: parts[len(one) % 4])
        patch.setattr("smollm_trm.phases.assemble.part_of_problem", lambda one: parts[len(one) % 4])
        train_sequence_trm(SequenceSettings(**{**SMALL, "data": str(folder / "pairs"), "num_epochs": 2,
                                               "compressor_checkpoint": str(folder / "compressor"),
                                               "output_dir": str(folder / "trm")}))  # fmt: skip
        given = AssembleSettings(
            model_name=thinker, data_path=str(folder / "pairs"), compressor_checkpoint=str(folder / "compressor"),
            trm_checkpoint=str(folder / "trm"), max_steps=4, batch_size=8, output_dir=str(folder / "model"),
            progress=False,
        )  # fmt: skip
        assemble(given)
    return folder, thinker, given


def test_the_assembled_model_loads_answers_and_is_evaluated_like_any_other(assembled):
    folder, _, _ = assembled
    model = SmolLMv3WithTRM.from_pretrained(folder / "model")
    assert model.config.reasoner == "sequence_trm" and model.num_latents == 1
    assert isinstance(model.generate_with_thinking("Tom has 3 apples.", max_new_tokens=4), str)
    result = evaluate_gsm8k(model, ROWS[50:54], progress=False, latents="shuffled", max_new_tokens=4)
    assert result["total"] == 4
    assert "model.safetensors" in commands.push(str(folder / "model"), "me/model", dry_run=True)


def test_it_reads_the_states_that_its_recursion_was_trained_on(assembled):
    """The read pass is of the base as it was, without the adapter, and ends before `<think>`."""
    folder, _, _ = assembled
    model = SmolLMv3WithTRM.from_pretrained(folder / "model")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    reasoner = model.reasoner
    for before, _, plain in list(read_shards(folder / "pairs", read_index(folder / "pairs")))[:4]:
        context = reasoner.compressor.compress(before)[None]
        wanted = reasoner.to_latent(reasoner.trm(context, torch.ones(context.shape[:2]).bool())[-1][0])
        found = model.latents_for(torch.tensor([model.encoder.encode_prompt(plain["problems"])]))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    assert all(not layer.disable_adapters for layer in model.modules() if hasattr(layer, "disable_adapters")
               and not callable(layer.disable_adapters))  # fmt: skip


def test_too_few_problems_to_read_are_one_line(assembled, tmp_path):
    folder, _, given = assembled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smollm_trm.phases.assemble.part_of_problem", lambda one: "train")
        with pytest.raises(UserMistake, match="no dev problem there has a number as its answer; generate more"):
            assemble(replace(given, output_dir=str(tmp_path)))


def test_only_the_adapter_is_trained_to_read(assembled):
    folder, _, _ = assembled
    model = SmolLMv3WithTRM.from_pretrained(folder / "model")
    trained = SequenceTRM(d_compressed=WIDTH, **SequenceSettings(**SMALL).network())
    fill(trained, read_part(str(folder / "trm"), "sequence_trm")[1], "trm")
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(model.reasoner.trm.state_dict()[name], tensor)
    assert any(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)


def test_every_arm_answers_the_same_problems(assembled):
    folder, thinker, _ = assembled
    comparison, record = compare_states(CompareStatesSettings(
        model=str(folder / "model"), thinking=thinker, data_dir=str(folder / "data"), max_samples=6, max_new_tokens=24,
        output_dir=str(folder / "states"), progress=False,
    ))  # fmt: skip
    names = [arm.name for arm in comparison.arms]
    assert names == ["thinks in text", "predicted state", "predicted state, latents shuffled", "true state",
                     "mean state", "state of another problem"]  # fmt: skip
    assert {arm.total for arm in comparison.arms} == {6} and 0 <= record["not_closed"] < 6
    assert (folder / "states" / "comparison.png").is_file()


def test_states_of_another_base_are_refused_before_it_thinks(assembled, tmp_path):
    folder, _, _ = assembled
    tokenizer = make_tokenizer()
    make_base("llama", tokenizer).save_pretrained(tmp_path / "other"), tokenizer.save_pretrained(tmp_path / "other")
    given = CompareStatesSettings(
        model=str(folder / "model"), thinking=str(tmp_path / "other"), data_dir=str(folder / "data"), max_samples=2,
        max_new_tokens=4, output_dir=str(tmp_path / "states"), progress=False,
    )  # fmt: skip
    with pytest.raises(UserMistake, match="thinking='.*other': its states are not those that .*model reads"):
        compare_states(given)


def test_given_states_are_what_the_span_gets(assembled):
    folder, _, _ = assembled
    model = SmolLMv3WithTRM.from_pretrained(folder / "model")
    state = torch.randn(32)
    give_states(model, {"a": state})
    latents = model.latents_for(*encode_prompts(model.encoder, ["a", "b"], max_new_tokens=1, context_length=99))
    torch.testing.assert_close(latents[:1], model.reasoner.latents_of_states(state[None]))
    mean = model.reasoner.to_latent(model.reasoner.trm.target_mean[None])
    torch.testing.assert_close(latents[1:], mean, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(mean[0, 0], model.reasoner.scale.anchor)


def test_parts_that_do_not_belong_together_are_refused(assembled, tmp_path):
    folder, _, given = assembled
    index = read_index(folder / "pairs")
    of_base = {name: index[name] for name in ("base", "base_fingerprint", "hidden_size")}
    moments = StateMoments(32)
    for _, after, _ in read_shards(folder / "pairs", index):
        moments.add(after[None])
    save_part(tmp_path / "c", "compressor", moments.principal(WIDTH), **of_base, d_compressed=WIDTH, measured={})
    with pytest.raises(UserMistake, match="was trained with another compressor: name that one"):
        assemble(replace(given, compressor_checkpoint=str(tmp_path / "c"), output_dir=str(tmp_path / "o")))
    with pytest.raises(UserMistake, match="this is a compressor, not a sequence_trm"):
        assemble(replace(given, trm_checkpoint=str(tmp_path / "c"), output_dir=str(tmp_path / "o")))
    with pytest.raises(UserMistake, match="num_latents=2: the reasoner 'sequence_trm' predicts one state"):
        model = SmolLMv3WithTRM.from_pretrained(folder / "model")
        SmolLMv3WithTRM.from_base(copy.deepcopy(model), reasoner="sequence_trm", num_latents=2)


@pytest.mark.parametrize("kind", [AssembleSettings, CompareStatesSettings, DatagenSettings])
def test_a_precision_or_a_folder_that_cannot_be_is_refused(kind):
    with pytest.raises(UserMistake, match="precision='half': choose one of auto, fp32, bf16, fp16"):
        kind(precision="half")
    with pytest.raises(UserMistake, match="output_dir: it is empty; name a folder"):
        kind(output_dir=" ")
