"""Latent reasoning for language models: a Tiny Recursive Model inside a decoder's think block.

Names are imported on first use, so that `import smollm_trm` and the command line's help stay quick.
"""

from importlib import import_module
from typing import Any

PUBLIC_NAMES = {
    "TransformerBlock": "models.blocks",
    "TinyRecursiveNetwork": "models.blocks",
    "RecursiveReasoningBase": "models.recursion",
    "LatentAttentionCompressor": "models.compression",
    "HiddenStateTRM": "models.reasoners",
    "Reasoner": "models.reasoners",
    "TRMSettings": "models.reasoners",
    "LoraSettings": "models.loading",
    "ModelSettings": "models.storage",
    "SmolLMv3WithTRM": "models.smollm",
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
    "train_gsm8k": "training.train",
    "evaluate_gsm8k": "evaluation.evaluate",
    "compare_arms": "evaluation.compare",
    "push_model": "hub",
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC_NAMES:
        raise AttributeError(f"module 'smollm_trm' has no attribute {name!r}")
    return getattr(import_module(f"smollm_trm.{PUBLIC_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC_NAMES])
