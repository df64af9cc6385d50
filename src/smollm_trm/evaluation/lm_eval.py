"""The model in lm-eval, EleutherAI's evaluation harness (an optional dependency).

lm-eval's own Hugging Face wrapper takes our model instance: it has a `generate()` like any other. What it needs from
us is a task whose prompt ends in the latent span, `gsm8k_latent.yaml` beside this file. The texts are those of
`evaluate_gsm8k` (except that a model that writes `<think>` itself gets no further span there); the score is lm-eval's
own, by its filters: the strict one refuses `#### $18`, which our grader accepts.
"""

import logging
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import yaml

from smollm_trm.data.rows import check_row, read_jsonl, read_text
from smollm_trm.evaluation.evaluate import SPARE_TOKENS, longest_completion, shown_first
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.records import UserMistake, first_line

LM_EVAL_TASK = "gsm8k_latent"


def lm_eval_task(model: SmolLMv3WithTRM, data_file: Path, *, worked_examples: Sequence[Mapping[str, str]] = ()) -> dict:
    """The task (what its YAML holds) of a model on a JSONL file, for `simple_evaluate(..., tasks=[task])`."""
    before = shown_first(model, worked_examples)
    rows = [check_row(row, where=f"{data_file.name}, line {line}") for line, row in read_jsonl(data_file)]
    tokenizer = model.tokenizer
    adds_bos = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]

    def asked(question: str) -> str:
        text = model.encoder.prompt_text(question)
        return text.removeprefix(tokenizer.bos_token) if adds_bos else text

    for row in rows:
        question = before + row["question"]
        if tokenizer(asked(question))["input_ids"] != model.encoder.encode_prompt(question):
            raise UserMistake(
                f"{data_file.name}: the tokenizer reads the prompt of {row['question'][:40]!r} otherwise than "
                "training does; lm-eval hands over text, so this model cannot run there"
            )
    task = yaml.safe_load(files("smollm_trm.evaluation").joinpath(f"{LM_EVAL_TASK}.yaml").read_text("utf-8"))
    task["doc_to_text"] = asked("{% raw %}" + before + "{% endraw %}{{question}}" if before else "{{question}}")
    task["dataset_kwargs"] = {"data_files": {"test": str(data_file.resolve())}}
    task["generation_kwargs"]["until"] = [tokenizer.eos_token]
    task["generation_kwargs"]["max_gen_toks"] = longest_completion(model, rows) + SPARE_TOKENS
    return task


def evaluate_with_lm_eval(
    model: SmolLMv3WithTRM, data_file: Path, *, batch_size: int = 32, worked_examples: Sequence[Mapping[str, str]] = ()
) -> dict:
    """Let lm-eval ask and grade the model, offline; `["results"]["gsm8k_latent"]` are the scores."""
    task = lm_eval_task(model, data_file, worked_examples=worked_examples)
    found = evaluate_tasks(model, [task], batch_size=batch_size, num_fewshot=0)
    found["n-shot"][LM_EVAL_TASK] = len(worked_examples)
    return found


def evaluate_tasks(
    model: SmolLMv3WithTRM, tasks: Sequence[str | dict], *, batch_size: int = 32, **options: object
) -> dict:
    """Let lm-eval ask the model tasks of its own, by name or YAML file, or one of `lm_eval_task`."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserMistake("lm-eval is not installed: pip install 'smollm-trm[lm-eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of a model that is given as an object
    try:
        read = [yaml.safe_load(read_text(Path(one))) if str(one).endswith(".yaml") else one for one in tasks]
        return simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=model.tokenizer, batch_size=batch_size),
            tasks=read,
            bootstrap_iters=0,
            task_manager=TaskManager(include_defaults=any(isinstance(one, str) for one in read)),
            **options,
        )
    except (KeyError, OSError, yaml.YAMLError) as error:
        raise UserMistake(f"lm-eval cannot load {', '.join(map(str, tasks))[:200]}: {first_line(error)}") from error
