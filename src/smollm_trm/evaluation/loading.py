"""The model and the problems that a command names."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from smollm_trm.data.gsm8k import load_gsm8k
from smollm_trm.data.reasoning_dataset import ReasoningDataset
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.storage import SETTINGS_FILE, ModelSettings


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype() -> torch.dtype:
    """Of the base's weights in evaluation: bf16 or fp16 by the GPU's capability, fp32 on a CPU."""
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def load_for_evaluation(model: str, *, target: str = "steps") -> SmolLMv3WithTRM:
    """A saved model, or an untuned base by name or folder (then without latents).

    Args:
        model: a folder that `save_pretrained` or training wrote, or a base model.
        target: what an untuned base is expected to write.
    """
    folder = Path(model)
    for candidate in (folder, folder / "model"):
        if (candidate / SETTINGS_FILE).is_file():
            return SmolLMv3WithTRM.from_pretrained(candidate, dtype=default_dtype()).to(default_device())
    settings = ModelSettings(base_training="frozen", reasoner=None, target=target)
    return SmolLMv3WithTRM.from_base(model, settings=settings, dtype=default_dtype()).to(default_device()).eval()


def problems_of(part: str, *, data_dir: str | None, dataset_path: str | None, seed: int) -> Sequence[Mapping[str, str]]:
    """The problems to evaluate on.

    Args:
        part: "dev" (the 20% part, which may have picked the checkpoint) or "test" (the official test).
        data_dir: GSM8K's folder.
        dataset_path: own data in place of GSM8K; all of it is used.
        seed: of the split.
    """
    if dataset_path is not None:
        return list(ReasoningDataset(dataset_path))
    if part not in ("dev", "test"):
        raise ValueError(f"part={part!r}: choose 'dev' or 'test'")
    splits = load_gsm8k(data_dir, seed=seed)
    return splits.gsm8k_test if part == "dev" else splits.gsm8k_final_test
