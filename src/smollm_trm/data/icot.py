"""Data whose solutions are steps alone, as implicit chain of thought and Coconut train on it.

question||<<48/2=24>> <<48+24=72>> #### 72                               the published text, a line a problem
{"question": ..., "answer": "<<48/2=24>>\\n<<48+24=72>>\\n#### 72"}        what is written
"""

import os
from pathlib import Path

from smollm_trm.data.answers import annotations_in, gold_answer
from smollm_trm.data.gsm8k import official_part
from smollm_trm.data.reasoning_dataset import ReasoningDataset
from smollm_trm.data.rows import write_jsonl


def steps_alone(row: dict[str, str]) -> dict[str, str]:
    answer = "\n".join([*annotations_in(row["answer"]), f"#### {gold_answer(row['answer'])}"])
    return {"question": row["question"], "answer": answer}


def prepare_icot_files(data_dir: str | Path | None, output_dir: Path) -> str:
    """Write `train.jsonl` and `test.jsonl` (and `valid.jsonl` from published text); what was written, in words. Rows
    without annotations are left out of the training part and keep only their answer in the others."""
    given = data_dir or os.environ.get("GSM8K_DIR")
    folder = Path(given) if given else None
    if folder is not None and (folder / "train.txt").is_file():
        parts = {path.stem: list(ReasoningDataset(path)) for path in sorted(folder.glob("*.txt"))}
    else:
        parts = {part: official_part(folder, part) for part in ("train", "test")}
    told = []
    for part, rows in parts.items():
        without = sum(not annotations_in(row["answer"]) for row in rows)
        kept = [steps_alone(row) for row in rows if part != "train" or annotations_in(row["answer"])]
        write_jsonl(output_dir / f"{part}.jsonl", kept)
        fate = "left out" if part == "train" else "kept with their answer alone"
        told.append(f"{part}: {len(kept)} rows" + (f", {without} without annotations {fate}" if without else ""))
    return "\n".join([*told, f"written to {output_dir}; `smollm-trm train --data_dir {output_dir}` reads it"])
