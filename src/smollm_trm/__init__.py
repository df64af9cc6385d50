"""Latent reasoning for language models: a Tiny Recursive Model inside a decoder's think block.

`import smollm_trm` makes transformers' `Auto*` classes know the model, so that
`AutoModelForCausalLM.from_pretrained(folder)` loads a saved one. The command line starts without that: its help is
quick. All names are imported on first use.
"""

import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

PUBLIC_NAMES = {
    "TransformerBlock": "models.blocks",
    "TinyRecursiveNetwork": "models.blocks",
    "RecursiveReasoningBase": "models.recursion",
    "LatentAttentionCompressor": "models.reasoners.compressor",
    "HiddenStateTRM": "models.reasoners.trm",
    "TRMSettings": "models.reasoners.trm",
    "Reasoner": "models.reasoners.reasoner",
    "Thought": "models.reasoners.reasoner",
    "REASONERS": "models.reasoners.known",
    "LoraSettings": "models.adapters",
    "LatentReasoningConfig": "models.configuration",
    "LatentReasoningModel": "models.modeling",
    "SmolLMv3WithTRM": "models.smollm",
    "UserMistake": "records",
    "GSM8KDataset": "data.datamodule",
    "GSM8KDataModule": "data.datamodule",
    "GSM8KSplits": "data.gsm8k",
    "load_gsm8k": "data.gsm8k",
    "ReasoningDataset": "data.reasoning_dataset",
    "create_sample_dataset": "data.reasoning_dataset",
    "WordProblemSettings": "data.word_stories",
    "generate_word_problems": "data.word_problems",
    "write_word_problems": "data.word_problems",
    "extract_answer": "data.answers",
    "is_correct": "data.answers",
    "SmolLMTRMLightningModule": "training.module",
    "TrainSettings": "training.settings",
    "train_gsm8k": "finetune",
    "train_grpo": "grpo",
    "evaluate_gsm8k": "evaluation.evaluate",
    "compare_arms": "evaluation.compare",
    "push_model": "models.hub",
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC_NAMES:
        raise AttributeError(f"module 'smollm_trm' has no attribute {name!r}")
    return getattr(import_module(f"smollm_trm.{PUBLIC_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC_NAMES])


def starts_the_command_line() -> bool:
    """Whether this process is `smollm-trm` or `python -m smollm_trm`, and nothing else."""
    if sys.argv[0] == "-m":  # still being looked for: which module, only the original arguments say
        given = " ".join(sys.orig_argv[1:]).partition("-m")[2].split()
        return bool(given) and given[0] in ("smollm_trm", "smollm_trm.cli", "smollm_trm.__main__")
    return Path(sys.argv[0]).name in ("smollm-trm", "smollm-trm.exe", "smollm-trm-script.py")


if not starts_the_command_line():
    import_module("smollm_trm.models.smollm")
elif signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main` is there, Ctrl-C ends the process without a traceback
