"""Phase 2, step 1: let a model think in text, and keep its hidden states before and after.

    Question: ... Answer: <think> {what the model writes} </think>
    `-- hidden_pre (L, D) --'                                    ^ hidden_post (D,)

Both are final hidden states, behind the last norm: of every token before `<think>`, and of `</think>` itself, once it
is read; from that one the model says its answer. Problems are cut into shards in their order. A shard is written whole
when its problems are done, right or wrong, closed or not, and what is not there is made: so a killed run, resumed by
however many processes, leaves what an unbroken one leaves.

Source: `spec/training_guide` of the project; the same pairs as its `Output format`, in safetensors.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from smollm_trm.bars import progress_bar
from smollm_trm.data.batching import pad_left
from smollm_trm.data.prompts import THINK_CLOSE, THINK_OPEN, PromptEncoder, padding_token_id, reserved_token_id
from smollm_trm.evaluation.loading import load_for_evaluation, saved_or_downloaded
from smollm_trm.models.configuration import readable
from smollm_trm.models.dimension import base_fingerprint
from smollm_trm.models.loading import as_list, part_of_base
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.phases.parts import public_name, refuse_other_base
from smollm_trm.phases.problems import mixed_problems
from smollm_trm.phases.settings import DatagenSettings
from smollm_trm.phases.text import INDEX_FILE, final_states
from smollm_trm.records import (
    UserMistake,
    refuse_other_settings,
    remove_path,
    remove_unfinished,
    run_record,
    write_json,
    write_whole,
)

logger = logging.getLogger(__name__)
DATAGEN_CONFIG = "datagen_config.json"
OF_A_PAIR = {
    **{"datasets": "dataset", "problems": "problem", "answers": "answer", "thoughts": "thought"},
    **{"seq_lengths": "seq_length", "num_thinking_tokens": "thinking_tokens"},
}
"""What a shard's metadata and the index hold of all pairs, beside the states, and what it is of one."""


def thinking_encoder(model: SmolLMv3WithTRM) -> tuple[PromptEncoder, int]:
    """What writes prompts up to `<think>`, and the id of `</think>`; a model that cannot think in text is refused."""
    if model.use_trm:
        raise UserMistake("a model with a reasoner thinks in latents: name the base that it was trained from")
    for token in (THINK_OPEN, THINK_CLOSE):
        if reserved_token_id(model.tokenizer, (token,)) is None:
            raise UserMistake(f"there is no thinking token {token} in the model's vocabulary: choose one that has it")
    encoder = replace(model.encoder, target="think", think=True)
    return encoder, model.tokenizer.convert_tokens_to_ids(THINK_CLOSE)


@torch.no_grad()
def think_in_text(model: SmolLMv3WithTRM, problems: list[str], *, max_new_tokens: int) -> list[dict[str, Any] | None]:
    """A batch of problems thought about: states, thinking tokens and text of each; None for a thought left open."""
    encoder, closes = thinking_encoder(model)
    prompts = [encoder.encode_prompt(problem) for problem in problems]
    padding = padding_token_id(model.tokenizer)
    ids, mask = (one.to(model.device) for one in pad_left(prompts, padding))
    ends = [closes, *as_list(model.generation_config.eos_token_id)]
    room = min(max_new_tokens, model.config.max_position_embeddings - ids.shape[1])
    if room < 1:
        raise UserMistake(f"a problem has {ids.shape[1]} tokens, the model takes {ids.shape[1] + room}: leave it out")
    written = model.generate(ids, attention_mask=mask, max_new_tokens=room, eos_token_id=ends, do_sample=False)
    thoughts = [row[: row.index(closes) + 1] if closes in row else None for row in written[:, ids.shape[1] :].tolist()]
    closed = [at for at, thought in enumerate(thoughts) if thought is not None]
    pairs: list[dict[str, Any] | None] = [None] * len(problems)
    if closed:
        rows, real = pad_left([prompts[at] + thoughts[at] for at in closed], padding)
        batch = {"input_ids": rows.to(model.device), "attention_mask": real.to(model.device)}
        for at, states, n_real in zip(closed, final_states(model, batch), real.sum(1).tolist(), strict=True):
            begins, n_before = len(states) - n_real, len(prompts[at]) - 1  # `<think>` itself is not before it
            pairs[at] = {
                "hidden_pre": states[begins : begins + n_before].cpu(),
                "hidden_post": states[-1].cpu(),
                "seq_length": n_before,
                "thinking_tokens": len(thoughts[at]) - 1,
                "thought": model.tokenizer.decode(prompts[at] + thoughts[at], skip_special_tokens=False),
            }
    return pairs


def write_shard(path: Path, model: SmolLMv3WithTRM, problems: list[dict[str, str]], settings: DatagenSettings) -> None:
    """Think about some problems and write their pairs: tensors, and plain values as metadata."""
    pairs: list[dict[str, Any]] = []
    for begin in range(0, len(problems), settings.batch_size):
        batch = problems[begin : begin + settings.batch_size]
        asked = [one["problem"] for one in batch]
        found = think_in_text(model, asked, max_new_tokens=settings.max_new_tokens)
        pairs += [{**pair, **one} for pair, one in zip(found, batch, strict=True) if pair is not None]
    size, dtype = model.config.hidden_size, model.dtype
    tensors = {
        "hidden_pre": torch.cat([torch.zeros(0, size, dtype=dtype), *(pair["hidden_pre"] for pair in pairs)]),
        "hidden_post": torch.stack([pair["hidden_post"] for pair in pairs]) if pairs else torch.zeros(0, size),
    }
    plain = {name: [pair[of_one] for pair in pairs] for name, of_one in OF_A_PAIR.items()}
    metadata = {"pairs": json.dumps({**plain, "not_closed": len(problems) - len(pairs)})}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def shard_metadata(path: Path) -> dict[str, Any]:
    """A shard's plain values; empty where it is not there, or damaged and removed."""
    if not path.is_file():
        return {}
    try:
        with readable(path), safe_open(path, "pt") as file:
            plain = json.loads(file.metadata()["pairs"])
            if file.get_slice("hidden_post").get_shape()[0] != len(plain["problems"]):
                raise ValueError("its states are not those of its problems")
            return plain
    except UserMistake as error:
        logger.warning("%s; it is made again", error)
        remove_path(path)
        return {}


def generate_pairs(settings: DatagenSettings) -> dict[str, Any] | None:
    """Think about the problems, or go on; returns the index, None while other processes are still at theirs."""
    folder = Path(settings.output_dir)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    problems = mixed_problems(settings.datasets, settings.data_dir, settings.num_samples)
    model = load_thinker(settings.model_name, prompt_format=settings.prompt_format, precision=settings.precision)
    digest = hashlib.sha256("\n".join(one["problem"] for one in problems).encode("utf-8", "replace")).hexdigest()[:16]
    fingerprint = base_fingerprint(model.model.language_model)
    noted = {**asdict(settings), "base_fingerprint": fingerprint, "problems_fingerprint": digest}
    n_shards = -(-len(problems) // settings.checkpoint_every)
    names = [f"pairs-{number:05d}.safetensors" for number in range(n_shards)]
    if settings.no_auto_resume:
        of_others = set(names) - set(names[rank::processes])  # who may be at work on them already
        for path in [folder / INDEX_FILE, *folder.glob("pairs-*.safetensors")]:
            if path.name not in of_others:
                remove_path(path)
    else:
        free = ("data_dir", "output_dir", "no_auto_resume", "model_name")
        refuse_other_settings(folder / DATAGEN_CONFIG, noted, ignored=free, anew="--no_auto_resume")
    if processes == 1:
        remove_unfinished(folder)
    write_json(folder / DATAGEN_CONFIG, noted)
    with progress_bar(total=len(problems), unit="problem") as bar:
        for number, name in enumerate(names):
            its = problems[number * settings.checkpoint_every :][: settings.checkpoint_every]
            if number % processes == rank and not shard_metadata(folder / name):
                write_shard(folder / name, model, its, settings)
            bar.update(len(its))
    shards = {name: shard_metadata(folder / name) for name in names}
    if not all(shards.values()):
        return None
    index = {
        "base": public_name(model, settings.model_name),
        "base_fingerprint": fingerprint,
        "hidden_size": model.config.hidden_size,
        "prompt_format": model.config.prompt_format,
        "n_pairs": sum(len(one["problems"]) for one in shards.values()),
        "n_problems": len(problems),
        "not_closed": sum(one["not_closed"] for one in shards.values()),
        "shards": {name: {"sha256": file_digest(folder / name), **one} for name, one in shards.items()},
        "settings": asdict(settings),
        **run_record(),
    }
    write_json(folder / INDEX_FILE, index)
    return index


def load_thinker(model_name: str, *, prompt_format: str | None, precision: str) -> SmolLMv3WithTRM:
    """A model that is to think in text, asked as it was trained, an untuned base by its chat template if it has one."""
    asked = {}
    if saved_or_downloaded(model_name) is None:
        has_template = bool(part_of_base(AutoTokenizer, model_name).chat_template)
        asked["prompt_format"] = prompt_format or ("chat" if has_template else "plain")
    model = load_for_evaluation(model_name, **asked, precision=precision)
    if prompt_format not in (None, model.config.prompt_format):
        raise UserMistake(
            f"prompt_format={prompt_format!r}: {model_name} was trained on {model.config.prompt_format!r}"
        )
    thinking_encoder(model)
    return model


def file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_index(folder: Path, *, fingerprint: str | None = None, here: str = "") -> dict[str, Any]:
    """The index of a folder of pairs; pairs of another base than the one with this fingerprint are refused."""
    path = folder / INDEX_FILE
    if not path.is_file():
        begun = (folder / DATAGEN_CONFIG).is_file()
        advice = "its `phases datagen` is not done; run the same command again" if begun else "run `phases datagen`"
        raise UserMistake(f"{folder}: no {INDEX_FILE} there: {advice}")
    with readable(path):
        index = json.loads(path.read_text(encoding="utf-8"))
        index["shards"].items(), index["hidden_size"], index["base_fingerprint"]
    if fingerprint is not None:
        refuse_other_base(index, fingerprint, f"the folder of pairs {folder}", here)
    return index


def read_shards(folder: Path, index: Mapping[str, Any]) -> Iterator[tuple[Tensor, Tensor, dict[str, str | int]]]:
    """One pair after the other, a shard in memory at a time: hidden_pre `(L, D)`, hidden_post `(D,)`, plain values."""
    again = "delete it and run `phases datagen` again"
    for name, plain in index["shards"].items():
        path = folder / name
        if not path.is_file():
            raise UserMistake(f"{path}: this shard is missing; run `phases datagen` again")
        if file_digest(path) != plain["sha256"]:
            raise UserMistake(f"{path}: this shard is damaged; {again}")
        with readable(path), safe_open(path, "pt") as file:
            before, after = file.get_tensor("hidden_pre"), file.get_tensor("hidden_post")
        for at, states in enumerate(before.split(plain["seq_lengths"])):
            yield states, after[at], {field: plain[field][at] for field in OF_A_PAIR}


def load_hidden_pairs(folder: str | Path) -> dict[str, Any]:
    """All pairs as the training guide has them: lists of tensors and plain values, with `hidden_size`."""
    index = read_index(Path(folder))
    found = list(read_shards(Path(folder), index))
    after = [after for _, after, _ in found]
    return {
        "hidden_pre": [before for before, _, _ in found],
        "hidden_post": torch.stack(after) if after else torch.zeros(0, index["hidden_size"]),
        **{name: [plain[name] for _, _, plain in found] for name in OF_A_PAIR},
        "hidden_size": index["hidden_size"],
    }


def datagen_command(settings: DatagenSettings) -> str:
    """Phase 2, step 1: let a model think, keep its hidden states before and after."""
    index = generate_pairs(settings)
    if index is None:
        return "this process's problems are done; the last one writes index.json"
    thinking = [tokens for shard in index["shards"].values() for tokens in shard["num_thinking_tokens"]]
    mean = sum(thinking) / max(1, len(thinking))
    return (
        f"{index['n_pairs']} pairs of {index['n_problems']} problems in {settings.output_dir} ({mean:.0f} thinking "
        f"tokens each); left out, because never closed: {index['not_closed']}"
    )
