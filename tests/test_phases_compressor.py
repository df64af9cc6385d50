"""The compressor: PCA is what it says, states are streamed, a part that does not fit is refused."""

import gc
import json
import os
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from thinkers import FIXTURES, generate, save_thinker
from twins import make_base, make_tokenizer

from smollm_trm import commands
from smollm_trm.evaluation.loading import load_for_evaluation
from smollm_trm.models.dimension import DimensionCompressor, StateMoments, base_fingerprint
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.phases.compressor import compressor_command, pretrain_compressor, stream_moments
from smollm_trm.phases.parts import load_compressor, part_card
from smollm_trm.phases.settings import CompressorRunSettings
from smollm_trm.phases.text import TextStream, all_texts, final_states, part_of_text
from smollm_trm.records import UserMistake


@pytest.fixture(scope="module")
def thinker(tmp_path_factory) -> str:
    return save_thinker(tmp_path_factory.mktemp("thinker") / "base")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"Tom has {n} apples and {n * 7 % 13} pears in bag {n % 5}." for n in range(150)))
    return str(path)


def settings(thinker: str, text: str, folder: Path, **changes) -> CompressorRunSettings:
    given = {"model_name": thinker, "data": text, "output_dir": str(folder), "d_compressed": 8, "sweep": [4, 16],
             "num_samples": 150, "batch_size": 16, "num_epochs": 2, "progress": False}  # fmt: skip
    return CompressorRunSettings(**{**given, **changes})


@pytest.fixture(scope="module")
def stage_1a(thinker, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stage_1a")
    return folder, pretrain_compressor(settings(thinker, text, folder))


def states_of(thinker: str, text: str, part: str) -> torch.Tensor:
    model = load_for_evaluation(thinker)
    stream = TextStream(model, settings(thinker, text, Path("unused")), text, part)
    return torch.cat([final_states(model, batch)[batch["attention_mask"].bool()] for batch in stream])


def test_streamed_pca_is_the_pca_of_all_states_at_once():
    torch.manual_seed(0)
    states = torch.randn(500, 12) @ torch.randn(12, 12) + 5 * torch.randn(12)
    moments = StateMoments(12)
    for part in states.split(37):
        moments.add(part)
    directions = torch.linalg.svd((states - states.mean(0)).double()).Vh[:5].T
    wanted = states.mean(0) + (states - states.mean(0)) @ (directions @ directions.T).float()
    compressor = moments.principal(5)
    torch.testing.assert_close(compressor(states), wanted, atol=1e-3, rtol=1e-3)
    left = (compressor(states) - states).square().sum(1).mean()
    torch.testing.assert_close(left.double(), moments.spectrum()[0][5:].sum(), atol=1e-4, rtol=1e-4)


def test_a_compressor_is_one_matrix_and_its_transpose():
    compressor = DimensionCompressor(hidden_size=10, d_compressed=10)
    states = torch.randn(3, 4, 10)
    assert compressor.compress(states).shape == (3, 4, 10)
    torch.testing.assert_close(compressor(states), states)  # orthogonal, and nothing is left out
    assert sum(parameter.numel() for parameter in compressor.parameters()) == 100
    with pytest.raises(UserMistake, match="d_compressed=11: the states have only 10 dimensions"):
        DimensionCompressor(hidden_size=10, d_compressed=11)


def test_the_report_has_what_the_states_themselves_say(thinker, text, stage_1a):
    folder, report = stage_1a
    held_out, fitted = states_of(thinker, text, "held-out"), states_of(thinker, text, "train")
    mean = fitted.mean(0)
    figures = report["held_out"]["mean vector"]
    assert figures["cosine"] == pytest.approx(float(torch.cosine_similarity(held_out, mean[None]).mean()), abs=1e-4)
    assert figures["mse"] == pytest.approx(float((held_out - mean).square().mean()), rel=1e-4)
    compressor = load_compressor(str(folder), fingerprint=fingerprint_of(thinker), here="here")[0]
    error = float((compressor(held_out) - held_out).square().mean().detach())
    assert report["held_out"]["kept 8"]["mse"] == pytest.approx(error, rel=1e-4)


def fingerprint_of(thinker: str) -> str:
    return base_fingerprint(load_for_evaluation(thinker).model.language_model)


def test_wider_is_better_and_none_is_worse_than_pca(stage_1a):
    _, report = stage_1a
    errors = [report["held_out"][f"kept {width}"]["mse"] for width in (4, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    for width in (4, 8, 16):
        own, pca = report["held_out"][f"kept {width}"], report["held_out"][f"PCA {width}"]
        assert own["mse"] <= 1.05 * pca["mse"]
    assert report["held_out"]["base"]["mse"] == 0 and report["held_out"]["base"]["loss"] > 0


def test_gradient_descent_from_random_directions_comes_near_pca(thinker, text, tmp_path):
    given = settings(thinker, text, tmp_path, start="random", num_epochs=12, sweep=[], learning_rate=2e-2)
    found = pretrain_compressor(given)["held_out"]
    assert found["start 8"]["mse"] > 1.5 * found["PCA 8"]["mse"]
    assert found["kept 8"]["mse"] < 1.25 * found["PCA 8"]["mse"]


def test_the_base_is_never_part_of_a_checkpoint(stage_1a):
    folder, _ = stage_1a
    for path in (folder / "checkpoints").glob("*.ckpt"):
        names = torch.load(path, weights_only=True)["state_dict"]
        assert names and all(name.startswith("compressors.") for name in names)


def test_a_text_is_in_one_part_wherever_it_stands(text):
    texts = list(all_texts(text, None))
    assert len(texts) == 150
    parts = {one: part_of_text(one) for one in texts}
    assert parts == {one: part_of_text(one) for one in reversed(texts)}
    assert {"train", "dev", "held-out"} == set(parts.values())


def test_memory_does_not_grow_with_the_number_of_texts(thinker, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"Tom has {n} apples, {n % 7} bags and {n % 3} friends." for n in range(1000)))
    model, process, peaks = load_for_evaluation(thinker), psutil.Process(), {}
    for count in (10, 10, 1000):
        stream = TextStream(model, settings(thinker, str(path), tmp_path, num_samples=count), str(path), "train")
        gc.collect()
        before, highest = process.memory_info().rss, 0
        add = StateMoments.add

        def measured(self, states, add=add):
            nonlocal highest
            add(self, states)
            highest = max(highest, process.memory_info().rss)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StateMoments, "add", measured)
            moments = stream_moments(model, stream)
        peaks[count] = highest - before
        assert moments.products.shape == (32, 32)
    kept_whole = int(moments.count) * 32 * 4
    assert peaks[1000] - peaks[10] < max(kept_whole / 2, 4 * 2**20), peaks


def test_stage_1b_goes_on_from_1a_on_thoughts(thinker, stage_1a, tmp_path):
    generate(thinker, str(tmp_path / "pairs"), dataset="gsm8k,aime,mbpp,apps,humaneval", num_samples=26)
    given = settings(thinker, str(tmp_path / "pairs"), tmp_path / "1b", stage="1b", sweep=[], num_samples=400,
                     compressor_checkpoint=str(stage_1a[0]), num_epochs=6, learning_rate=1e-2)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # so few thoughts: every third is held out
        parts = ("train", "dev", "held-out")
        patch.setattr("smollm_trm.phases.text.part_of_text", lambda one: parts[len(one) % 3])
        found = pretrain_compressor(given)["held_out"]
    assert found["kept 8"]["mse"] < found["start 8"]["mse"]


def test_a_finished_run_is_not_trained_again_and_says_the_same(thinker, text, stage_1a):
    folder, report = stage_1a
    again = pretrain_compressor(settings(thinker, text, folder))
    assert again["held_out"] == report["held_out"]


def test_sums_of_other_text_are_not_taken_for_these(thinker, text, tmp_path):
    """A session killed before its first checkpoint leaves its sums; another text's run does not go on with them."""
    pretrain_compressor(settings(thinker, text, tmp_path, num_samples=90, num_epochs=0))
    (tmp_path / "results.json").unlink()
    after = pretrain_compressor(settings(thinker, text, tmp_path, num_epochs=0))
    fresh = pretrain_compressor(settings(thinker, text, tmp_path / "fresh", num_epochs=0))
    assert after["states"] == fresh["states"] and after["held_out"] == fresh["held_out"]


def test_a_run_begun_anew_reads_its_text_anew(thinker, text, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text(Path(text).read_text())
    before = pretrain_compressor(settings(thinker, str(own), tmp_path / "run", num_epochs=0))["states"]
    own.write_text(own.read_text()[: len(own.read_text()) // 2])
    anew = settings(thinker, str(own), tmp_path / "run", num_epochs=0, resume="never")
    assert pretrain_compressor(anew)["states"] < before


def test_another_base_or_width_is_refused(thinker, text, stage_1a, tmp_path):
    folder, _ = stage_1a
    tokenizer = make_tokenizer()
    other = make_base("llama", tokenizer)
    other.save_pretrained(tmp_path / "other"), tokenizer.save_pretrained(tmp_path / "other")
    fingerprint = fingerprint_of(str(tmp_path / "other"))
    with pytest.raises(UserMistake, match="was made with another base, 32 wide: it does not fit me/other") as refused:
        load_compressor(str(folder), fingerprint=fingerprint, here="me/other")
    assert "\n" not in str(refused.value)
    given = settings(thinker, text, tmp_path / "1b", stage="1b", sweep=[], d_compressed=4,
                     compressor_checkpoint=str(folder))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("smollm_trm.phases.compressor.read_index", lambda *_, **__: None)
        with pytest.raises(UserMistake, match="compresses to 8, not to d_compressed=4"):
            pretrain_compressor(given)


def test_a_fingerprint_is_of_the_base_whatever_it_wears(thinker):
    plain = SmolLMv3WithTRM.from_pretrained(thinker)
    adapted = SmolLMv3WithTRM.from_base(SmolLMv3WithTRM.from_pretrained(thinker), num_latents=2, calibration=(),
                                        reasoner="static")  # fmt: skip
    half = SmolLMv3WithTRM.from_pretrained(thinker, dtype="bfloat16")
    assert len({base_fingerprint(one.model.language_model) for one in (plain, adapted, half)}) == 1


def test_a_damaged_or_foreign_part_is_one_line(stage_1a, tmp_path):
    for name, damage in (("cut", lambda path: path.write_bytes(path.read_bytes()[:100])),
                         ("other", lambda path: save_file({"weight": torch.zeros(2, 2)}, path))):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        for path in (stage_1a[0] / "model").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        damage(folder / "model.safetensors")
        fingerprint = json.loads((folder / "config.json").read_text())["base_fingerprint"]
        with pytest.raises(UserMistake) as refused:
            load_compressor(str(folder), fingerprint=fingerprint, here="here")
        assert "\n" not in str(refused.value) and str(folder) in str(refused.value)
    config = json.loads((stage_1a[0] / "model" / "config.json").read_text())
    for damaged in ({**config, "d_compressed": "8"}, {"part": "compressor"}):
        (tmp_path / "cut" / "config.json").write_text(json.dumps(damaged))
        with pytest.raises(UserMistake, match="its config.json does not say its base and widths"):
            load_compressor(str(tmp_path / "cut"), fingerprint=config["base_fingerprint"], here="here")
    (tmp_path / "config.json").write_text('{"part": ["compressor"]}')
    with pytest.raises(UserMistake, match="no compressor there; make one with `smollm-trm phases compressor`"):
        load_compressor(str(tmp_path), fingerprint="", here="here")


def test_a_part_is_pushed_with_a_card_of_what_was_measured(stage_1a, monkeypatch):
    from test_hub import StandIn

    monkeypatch.setattr("smollm_trm.models.hub.HfApi", StandIn)
    StandIn.calls = {}
    told = commands.push(str(stage_1a[0]), "me/compressor")
    assert told == "pushed to me/compressor: README.md, config.json, model.safetensors"
    uploaded = StandIn.calls["upload"]
    card, config = uploaded["README.md"].decode(), json.loads(uploaded["config.json"])
    assert card == part_card(config) and "the mean vector alone 0." in card and "D' = 8" in card
    assert not any(os.sep + "tmp" in text.decode("latin1") for text in uploaded.values())
    assert set(load_file(stage_1a[0] / "model" / "model.safetensors")) == {"weight", "mean"}
    with pytest.raises(UserMistake, match="no name that the Hub takes"):
        commands.push(str(stage_1a[0]), "nothing", dry_run=True)


def test_a_source_that_is_not_there_is_one_line(thinker, tmp_path):
    with pytest.raises(FileNotFoundError, match="give fineweb-edu, gsm8k, a text file or a folder"):
        list(all_texts(str(tmp_path / "none.txt"), None))
    with pytest.raises(UserMistake, match="no .txt, .md or .jsonl file in that folder"):
        list(all_texts(str(tmp_path), None))
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n\n{"txt": 1}\n')
    with pytest.raises(UserMistake, match='bad.jsonl, line 3: not an object with "text"'):
        list(all_texts(str(tmp_path), None))
    (tmp_path / "bad.jsonl").unlink()
    (tmp_path / "index.json").write_text("{}")
    (tmp_path / "a.txt").write_text("of a folder with an index of its own")
    assert list(all_texts(str(tmp_path), None)) == ["of a folder with an index of its own"]
    assert sum(1 for _ in all_texts("gsm8k", str(FIXTURES / "as_gsm8k"))) == 14


def test_too_few_texts_are_refused_before_anything_is_computed(thinker, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("Tom has 3 apples.\n\nAnn has 2 pears.")
    with pytest.raises(UserMistake, match="no (dev|held-out) text among the first texts"):
        pretrain_compressor(settings(thinker, str(few), tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [({"stage": "2"}, "stage='2': choose one of 1a, 1b"), ({"stage": "1b"}, "name stage 1a's compressor"),
     ({"compressor_checkpoint": "x"}, "it is for stage 1b"), ({"d_compressed": 0}, "d_compressed=0"),
     ({"sweep": [0]}, "every D' must be at least 1"), ({"learning_rate": 0.0}, "learning_rate=0.0"),
     ({"precision": "half"}, "precision='half': choose one of auto"), ({"output_dir": ""}, "output_dir: it is empty"),
     ({"seed": 2**44}, "seed=17592186044416: must be at most")],
)  # fmt: skip
def test_a_setting_that_cannot_be_is_refused(change, line, tmp_path):
    with pytest.raises(UserMistake, match=line):
        replace(settings("m", "t", tmp_path, sweep=[]), **change)


def test_the_command_prints_the_table(thinker, text, stage_1a):
    told = compressor_command(settings(thinker, text, stage_1a[0]))
    assert "held-out text" in told and "mean vector" in told and "PCA 16" in told
