"""Text for the compressor, streamed: however much there is, a batch of it is in memory."""

import hashlib
import json
import os
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path

import torch
from torch import Tensor

from smollm_trm.data.answers import strip_annotations
from smollm_trm.data.batching import pad_left
from smollm_trm.data.gsm8k import official_part
from smollm_trm.data.prompts import padding_token_id
from smollm_trm.data.rows import rows_on_the_hub
from smollm_trm.models.configuration import readable
from smollm_trm.models.prompt import positions_of
from smollm_trm.models.residual import decoder_pass
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.phases.settings import CompressorRunSettings
from smollm_trm.records import UserMistake

INDEX_FILE = "index.json"
FINEWEB = "HuggingFaceFW/fineweb-edu"


def texts_of_file(path: Path) -> Iterator[str]:
    """The texts of a file: of a .jsonl the field "text", else paragraphs, between empty lines."""
    with open(path, encoding="utf-8", errors="replace") as lines:
        if path.suffix == ".jsonl":
            for number, line in enumerate(lines, start=1):
                try:
                    if line.strip():
                        yield str(json.loads(line)["text"])
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise UserMistake(f'{path}, line {number}: not an object with "text"') from error
        else:
            for is_text, paragraph in groupby(lines, key=lambda line: bool(line.strip())):
                if is_text:
                    yield "".join(paragraph)


def all_texts(data: str, data_dir: str | None) -> Iterator[str]:
    """Every text of a source, see `CompressorRunSettings.data`."""
    place = Path(data)
    if data == "gsm8k":
        folder = data_dir or os.environ.get("GSM8K_DIR")
        for row in official_part(folder and Path(folder), "train"):
            yield f"{row['question']}\n{strip_annotations(row['answer'])}"
    elif data == "fineweb-edu":
        instead = "give data a text file or folder"
        rows = rows_on_the_hub(FINEWEB, config="sample-10BT", split="train", instead=instead, streaming=True)
        yield from (row["text"] for _, row in rows)
    elif any(place.glob("pairs-*.safetensors")):
        with readable(place / INDEX_FILE):
            shards = json.loads((place / INDEX_FILE).read_text(encoding="utf-8"))["shards"].values()
        for shard in shards:
            yield from shard["thoughts"]
    elif place.is_dir():
        files = sorted(path for path in place.rglob("*") if path.suffix in (".txt", ".jsonl", ".md"))
        if not files:
            raise UserMistake(f"data={data!r}: no .txt, .md or .jsonl file in that folder")
        for path in files:
            yield from texts_of_file(path)
    elif place.is_file():
        yield from texts_of_file(place)
    else:
        raise FileNotFoundError(f"data={data!r}: no such file; give fineweb-edu, gsm8k, a text file or a folder")


def part_of_text(text: str) -> str:
    """Which part a text belongs to, whatever stands before it: the same text is never in two."""
    return {0: "dev", 1: "held-out"}.get(hashlib.sha256(text.encode("utf-8", "replace")).digest()[0] % 20, "train")


class TextStream:
    """Token batches of one part of a source: `{input_ids, attention_mask}`, `(B, L)`; it can go on where it was."""

    def __init__(self, model: SmolLMv3WithTRM, settings: CompressorRunSettings, data: str, part: str) -> None:
        self.model, self.settings, self.data, self.part = model, settings, data, part
        self.given = self.skipped = 0

    def texts(self) -> Iterator[str]:
        """The part's texts among the first `num_samples`."""
        first = islice(all_texts(self.data, self.settings.data_dir), self.settings.num_samples)
        return (text for text in first if part_of_text(text) == self.part)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        tokenizer, size = self.model.tokenizer, self.settings.batch_size
        self.given, self.skipped = self.skipped, 0
        rest = islice(self.texts(), self.given * size, None)
        while batch := list(islice(rest, size)):
            self.given += 1
            rows = tokenizer(batch, truncation=True, max_length=self.settings.max_length)["input_ids"]
            ids, mask = pad_left([row or [tokenizer.eos_token_id] for row in rows], padding_token_id(tokenizer))
            yield {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped = state_dict["given"]


@torch.no_grad()
def final_states(model: SmolLMv3WithTRM, batch: dict[str, Tensor]) -> Tensor:
    """The base's final hidden states `(B, L, D)` of a token batch: behind the last norm, what its head reads."""
    mask, decoder = batch["attention_mask"], model.model.language_model
    given = {"attention_mask": mask, "position_ids": positions_of(mask), "use_cache": False}
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    return decoder_pass(decoder, inputs_embeds=embeddings, **given).last_hidden_state
