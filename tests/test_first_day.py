"""What a user of transformers and PEFT tries first in Python: it works, or says in a line what does."""

import os
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from runs import save_tiny_base
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from twins import ROWS, SMALL_TRM

from smollm_trm.arithmetic.model import build_arithmetic_model, build_arithmetic_tokenizer
from smollm_trm.data.rows import write_jsonl
from smollm_trm.evaluation.evaluate import evaluate_gsm8k
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.records import UserMistake

SUMS = (build_arithmetic_model("small"), build_arithmetic_tokenizer())
README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    base = save_tiny_base(folder / "base")
    SmolLMv3WithTRM.from_base(base, num_latents=2, reasoner_settings=SMALL_TRM).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(folder) -> SmolLMv3WithTRM:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore")  # of pipelines
def test_the_python_of_the_readme_runs(folder, tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "gsm8k" / "train.jsonl", ROWS[:20])
    write_jsonl(tmp_path / "gsm8k" / "test.jsonl", ROWS[50:52])
    monkeypatch.setenv("GSM8K_DIR", "gsm8k")
    monkeypatch.chdir(tmp_path)
    os.makedirs("outputs/trm")
    os.symlink(folder, "outputs/trm/model")
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    small = {
        "HuggingFaceTB/SmolLM3-3B": f"{folder}/base",
        "num_latents=64": f"num_latents=2, max_steps=1, batch_size=8, progress=False, trm_kwargs={SMALL_TRM}",
    }
    assert len(snippets) == 2
    for snippet in snippets:
        for ours, tiny in small.items():
            snippet = snippet.replace(ours, tiny)
        exec(compile(snippet, "README.md", "exec"), {})
    assert "What is 15 x 23?" in capsys.readouterr().out and Path("outputs/run/results.json").is_file()


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda folder: SmolLMv3WithTRM(folder), "use from_base\\(name\\) or from_pretrained"),
        (lambda folder: AutoModelForCausalLM.from_pretrained(folder, device_map={"": 0}), "device_map is not sup"),
        (
            lambda folder: AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig()),
            "quantization_config is not supported; .*load_in_4bit",
        ),
        (lambda folder: SmolLMv3WithTRM.from_pretrained(folder, num_latents=9), "num_latents is what the saved"),
        (lambda folder: evaluate_gsm8k(folder, ROWS[:1]), "it cannot be asked; give SmolLMv3WithTRM.from_pretrained"),
        (lambda folder: evaluate_gsm8k(AutoModel.from_pretrained(folder), ROWS[:1]), "LatentReasoningModel, .*cannot"),
        (
            lambda folder: SmolLMv3WithTRM.from_base(SUMS, num_latents=2, prompt_format="bare"),
            "the tokenizer cannot read 'Tom has .*give questions of yours, calibration",
        ),
        (
            lambda folder: SmolLMv3WithTRM.from_base(SUMS, num_latents=2),
            "the tokenizer cannot read 'x' ",
        ),
    ],
)
def test_what_does_not_work_says_what_does(call, line, folder):
    with pytest.raises(UserMistake, match=line) as refused:
        call(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("prompts", [None, 5, [], [None], {"question": "Why?"}])
def test_prompts_that_are_none_are_refused(prompts, model):
    with pytest.raises(UserMistake, match="give a question, or a list of questions"):
        model.generate_with_thinking(prompts)


def test_a_prompt_without_its_span_names_the_calls_that_write_one(model, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer("Why?", return_tensors="pt", return_token_type_ids=False)
    with pytest.raises(ValueError, match="encode_prompt.*apply_chat_template.*generate_with_thinking"):
        model.generate(**asked, max_new_tokens=2)
    chat = [{"role": "user", "content": "Why?"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model.generate(**asked, max_new_tokens=2).shape[1] > asked["input_ids"].shape[1]


@pytest.mark.parametrize("device_map", ["auto", "cpu", torch.device("cpu")])
def test_a_device_map_of_one_device_is_a_device(device_map, folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, torch_dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16 and loaded.device.type in ("cpu", "cuda")


def test_an_adapter_is_loaded_in_the_place_of_the_one_that_is_there(model, folder):
    other = SmolLMv3WithTRM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_" in name:
                parameter.add_(1.0)
    ids = torch.tensor([model.encoder.encode_prompt("Why?")])
    assert not torch.equal(other(ids).logits, model(ids).logits)
    other.load_adapter(f"{folder}/adapter")
    assert torch.equal(other(ids).logits, model(ids).logits) and other.active_adapters() == ["default"]
    with pytest.raises(UserMistake, match="has an adapter already"):
        other.add_adapter(LoraConfig())
