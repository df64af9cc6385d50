"""A saved model in a process that has loaded nothing of ours before: what test_storage.py runs there."""

import json
import os
import warnings
from pathlib import Path


def answer(folder: str, questions: list[str], output: str) -> None:
    """Write the answers as JSON to `output`, and what is said on standard error beside it (`.err`)."""
    with open(f"{output}.err", "w") as said:
        os.dup2(said.fileno(), 2)
    warnings.simplefilter("error", UserWarning)
    from transformers import AutoModelForCausalLM

    import smollm_trm  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(folder)
    Path(output).write_text(json.dumps(model.generate_with_thinking(questions, max_new_tokens=8)))
