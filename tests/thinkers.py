"""A tiny base that closes some of its thoughts and not others, and the phases run on it."""

import os
import signal
from pathlib import Path

import torch
from twins import make_base, make_tokenizer

from smollm_trm.data.batching import pad_left
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.phases import datagen
from smollm_trm.phases.problems import mixed_problems
from smollm_trm.phases.settings import DatagenSettings

FIXTURES = Path(__file__).parent / "data" / "phases"
MIX = {"dataset": "gsm8k,aime,mbpp", "data_dir": str(FIXTURES), "num_samples": 20, "batch_size": 3,
       "max_new_tokens": 8, "checkpoint_every": 4}  # fmt: skip
PROBLEMS = [one["problem"] for one in mixed_problems(["gsm8k", "aime", "mbpp"], str(FIXTURES), 20)]


def save_thinker(folder: Path) -> str:
    """A base that closes some of its thoughts: `</think>` takes the place of a token that it writes in them."""
    tokenizer = make_tokenizer()
    base = make_base("smollm3", tokenizer)
    model = SmolLMv3WithTRM.from_base((base, tokenizer), base_training="full", reasoner=None, target="think")
    ids, mask = pad_left([model.encoder.encode_prompt(problem) for problem in PROBLEMS], tokenizer.eos_token_id)
    with torch.no_grad():  # larger layers, or a random model with a tied head says its last token again
        for weight in model.model.language_model.layers.parameters():
            weight.mul_(8 if weight.ndim == 2 else 1)
    written = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)[:, ids.shape[1] :].tolist()
    shares = {token: sum(token in row for row in written) for row in written for token in row}
    chosen = min(shares, key=lambda token: (abs(shares[token] - 0.5 * len(written)), token))
    closes, table = tokenizer.convert_tokens_to_ids("</think>"), model.get_input_embeddings().weight
    with torch.no_grad():
        table[[closes, chosen]] = table[[chosen, closes]].clone()
    model.config.base_model = ""
    model.save_pretrained(folder)
    return str(folder)


def generate(model: str, folder: str, **changes) -> dict | None:
    return datagen.generate_pairs(DatagenSettings(model_name=model, output_dir=folder, **{**MIX, **changes}))


def die_at(count: int, half: bool) -> None:
    """Let this process die before the `count`-th batch is thought about, or halfway through writing a shard."""
    think, write, left = datagen.think_in_text, datagen.write_whole, count

    def think_or_die(*args, **kwargs):
        nonlocal left
        left -= 1
        if left == 0 and not half:
            os.kill(os.getpid(), signal.SIGKILL)
        return think(*args, **kwargs)

    def half_write(path: Path, save) -> None:
        if left > 0:
            return write(path, save)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        save(temporary)
        os.truncate(temporary, temporary.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    datagen.think_in_text, datagen.write_whole = think_or_die, half_write if half else write


def session(model: str, folder: str, death: tuple[int, bool] | None) -> None:
    """Generate until it ends or dies."""
    if death is not None:
        die_at(*death)
    generate(model, folder)
