"""The model in lm-eval: the same prompt, the same texts, lm-eval's own score. Offline."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
import torch
import yaml
from twins import SMALL_TRM

from smollm_trm import cli
from smollm_trm.data.batching import collate_examples
from smollm_trm.data.prompts import PromptEncoder, padding_token_id
from smollm_trm.data.rows import write_jsonl
from smollm_trm.data.word_problems import generate_word_problems
from smollm_trm.evaluation.evaluate import evaluate_gsm8k
from smollm_trm.evaluation.lm_eval import LM_EVAL_TASK, evaluate_with_lm_eval, files, lm_eval_task
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.tiny import build_tiny_model, train_tiny_tokenizer
from smollm_trm.records import UserMistake

pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval and what it imports


@pytest.fixture(scope="module")
def problems() -> list[dict]:
    return generate_word_problems(count=12, seed=1)


def twin(problems: list[dict], **config) -> SmolLMv3WithTRM:
    tokenizer = train_tiny_tokenizer([row["question"] + "\n" + row["answer"] for row in problems], vocab_size=600)
    base = build_tiny_model(tokenizer, hidden_size=64, n_layers=2, intermediate_size=128)
    return SmolLMv3WithTRM.from_base((base, tokenizer), base_training="full", target="answer", **config)


@pytest.fixture(scope="module")
def model(problems) -> SmolLMv3WithTRM:
    """A twin that knows some of its problems by heart, so that texts differ and some are right."""
    torch.manual_seed(0)
    model = twin(problems, num_latents=4, reasoner_settings=SMALL_TRM)
    batch = collate_examples([model.encoder.encode(row) for row in problems], padding_token_id(model.tokenizer))
    optimizer = torch.optim.AdamW([tensor for tensor in model.parameters() if tensor.requires_grad], lr=3e-3)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture
def data_file(problems, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_jsonl(tmp_path / "test.jsonl", problems)
    return tmp_path / "test.jsonl"


def our_texts(model: SmolLMv3WithTRM, problems: list[dict], file: Path) -> list[str]:
    evaluate_gsm8k(model, problems, predictions_path=file, progress=False, rethink=False)
    lines = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    return [line["texts"][0] for line in sorted(lines, key=lambda line: line["index"])]


def test_lm_eval_gets_our_texts_and_scores_them_by_its_own_filters(model, problems, data_file):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    found = evaluate_with_lm_eval(model, data_file, batch_size=5)
    texts = our_texts(model, problems, data_file.with_name("predictions.jsonl"))
    for name in ("strict-match", "flexible-extract"):
        samples = [sample for sample in found["samples"]["gsm8k_latent"] if sample["filter"] == name]
        samples.sort(key=lambda sample: sample["doc_id"])
        assert [sample["doc"]["question"] for sample in samples] == [row["question"] for row in problems]
        assert [sample["resps"][0][0] for sample in samples] == texts
        for sample in samples:
            prompt = sample["arguments"][0][0] if isinstance(sample["arguments"], list) else sample["arguments"]
            ids = model.tokenizer(prompt)["input_ids"]
            assert ids == model.encoder.encode_prompt(sample["doc"]["question"])
            assert ids.count(model.config.slot_token_id) == 4
    strict = [re.search(r"#### (-?[0-9.,]+)", text) for text in texts]
    golds = [row["answer"].split("#### ")[1] for row in problems]
    right = [bool(number) and number[1] == gold for number, gold in zip(strict, golds, strict=True)]
    score = found["results"]["gsm8k_latent"]["exact_match,strict-match"]
    assert score == pytest.approx(sum(right) / 12) and score > 0 and len(set(texts)) > 5


def test_lm_eval_answers_from_the_latents(model, data_file, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")

    def texts() -> list[str]:
        samples = evaluate_with_lm_eval(model, data_file)["samples"]["gsm8k_latent"]
        return [sample["resps"][0][0] for sample in samples if sample["filter"] == "strict-match"]

    before = texts()
    own = model.latents_for
    monkeypatch.setattr(model, "latents_for", lambda *args, **kwargs: float("nan") * own(*args, **kwargs))
    assert not set(texts()) & set(before)


def test_the_yaml_is_the_task_of_a_model_with_sixteen_latents(problems, data_file):
    template = yaml.safe_load(files("smollm_trm.evaluation").joinpath(f"{LM_EVAL_TASK}.yaml").read_text())
    model = twin(problems, num_latents=16)
    task = lm_eval_task(model, data_file)
    prompts = [jinja2.Template(source["doc_to_text"]).render(question="Why {{1}}?\n") for source in (template, task)]
    assert prompts[0] == prompts[1] and prompts[0].endswith("</think>")
    assert task["dataset_kwargs"] == {"data_files": {"test": str(data_file)}}
    task["generation_kwargs"]["max_gen_toks"] = 512
    same = ("dataset_kwargs", "doc_to_text")
    assert {k: v for k, v in task.items() if k not in same} == {k: v for k, v in template.items() if k not in same}


@pytest.mark.parametrize("reasoner", ["static", None])
def test_the_task_follows_the_model_and_the_data(problems, data_file, reasoner):
    model = twin(problems, reasoner=reasoner, num_latents=3)
    task = lm_eval_task(model, data_file)
    assert task["doc_to_text"].count("<|reserved_special_token_2|>") == (3 if reasoner else 0)
    longest = max(len(model.encoder.encode_completion(row["answer"])) for row in problems)
    assert longest < task["generation_kwargs"]["max_gen_toks"] < longest + 30


def test_a_tokenizer_that_reads_the_text_otherwise_is_refused(problems, data_file):
    model = twin(problems, num_latents=2)
    encoder = SimpleNamespace(
        prompt_text=model.encoder.prompt_text,
        encode_prompt=lambda question: [0, *model.encoder.encode_prompt(question)],
    )
    stand_in = SimpleNamespace(tokenizer=model.tokenizer, encoder=encoder)
    with pytest.raises(UserMistake, match="test.jsonl: the tokenizer reads the prompt of .* otherwise"):
        lm_eval_task(stand_in, data_file)


def test_bad_data_is_named_by_its_line(model, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": "#### 1"}\n{"question": "b", "answer": "2"}\n')
    with pytest.raises(UserMistake, match="bad.jsonl, line 2"):
        lm_eval_task(model, tmp_path / "bad.jsonl")
    with pytest.raises(FileNotFoundError, match="none.jsonl"):
        lm_eval_task(model, tmp_path / "none.jsonl")


@pytest.mark.parametrize("prompt_format", ["plain", "chat"])
def test_an_untuned_base_is_shown_the_examples_of_our_evaluation(problems, data_file, prompt_format, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    tokenizer = train_tiny_tokenizer([row["question"] + row["answer"] for row in problems], vocab_size=600)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    base = build_tiny_model(tokenizer, hidden_size=32, n_layers=2, intermediate_size=48)
    untuned = {"reasoner": None, "base_training": "frozen", "think": False, "prompt_format": prompt_format}
    model = SmolLMv3WithTRM.from_base((base, tokenizer), **untuned)
    examples = [{"question": "A {{ brace }} and {% more", "answer": "2 {#}\n#### 2"}, problems[0]]
    found = evaluate_with_lm_eval(model, data_file, worked_examples=examples)
    asked = []
    encode = PromptEncoder.encode_prompt
    monkeypatch.setattr(PromptEncoder, "encode_prompt", lambda self, one: asked.append(one) or encode(self, one))
    evaluate_gsm8k(model, problems, max_new_tokens=3, worked_examples=examples, progress=False)
    prompts = {sample["arguments"][0][0] for sample in found["samples"]["gsm8k_latent"]}
    assert prompts == {model.encoder.prompt_text(one).removeprefix("<s>") for one in asked if one}
    assert "{{ brace }} and {% more" in min(prompts) and found["n-shot"]["gsm8k_latent"] == 2


def test_the_command_runs_our_task_and_others(problems, data_file, tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.tasks import TaskManager

    twin(problems, num_latents=2).save_pretrained(tmp_path / "model")
    task = yaml.safe_load(files("smollm_trm.evaluation").joinpath(f"{LM_EVAL_TASK}.yaml").read_text())
    task |= {"task": "other", "doc_to_text": "{{question}}", "dataset_kwargs": {"data_files": {"test": str(data_file)}}}
    task["generation_kwargs"]["max_gen_toks"] = 3
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(task))
    command = ["lm-eval", str(tmp_path / "model"), "--dataset_path", str(data_file), "--max_samples", "3"]
    cli.main([*command, "--tasks", f"gsm8k_latent,{tmp_path / 'other.yaml'}", "--output_dir", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    assert "test, 0-shot" in shown and "|gsm8k_latent|" in shown and re.search(r"\|other *\|", shown)
    [first, second] = json.loads((tmp_path / "out" / "test-first-3.json").read_text())["results"]
    assert first["gsm8k_latent"]["sample_len"] == second["other"]["sample_len"] == 3
    asked, small = [], TaskManager(include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **how: asked.append(how) or small)  # not its thousands
    with pytest.raises(SystemExit):
        cli.main([*command, "--tasks", "no_such_task", "--output_dir", str(tmp_path / "out")])
    assert asked[-1] == {"include_defaults": True} and "lm-eval cannot load no_such_task" in capsys.readouterr().err


def test_without_the_harness_the_command_says_what_to_install(model, data_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserMistake, match=r"not installed: pip install 'smollm-trm\[lm-eval\]'"):
        evaluate_with_lm_eval(model, data_file)
