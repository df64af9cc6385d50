"""How far from its base a model with fresh latents is: nats per supervised token, on a real base and real GSM8K.

    python benchmarks/distance_at_start.py [--dtype bf16] [--n_rows 48] [--num_latents 16 64 256]

Without training, latents can only disturb. Measured on solutions of GSM8K's dev part, above the same base
(SmolLM2-135M) with an empty think block; the TRM is fresh. Tried: the embedding that latents start from (the anchor:
the last token of a text, zeros, or the mean of the table) by the gain; and how many latents, with the defaults.
"""

import torch
from _record import benchmark_options, print_table, record
from _smollm2 import real_gsm8k, smollm2_folder

from smollm_trm.data.batching import IGNORED_LABEL, collate_examples, supervised_columns
from smollm_trm.data.gsm8k import load_gsm8k
from smollm_trm.data.prompts import padding_token_id
from smollm_trm.models.loading import ANCHOR_TEXT
from smollm_trm.models.smollm import SmolLMv3WithTRM

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ANCHORS = (".", "...", " ", "</think>", "zeros", "table mean")
BATCH_SIZE = 8


def anchor_of(model: SmolLMv3WithTRM, name: str) -> torch.Tensor:
    """The embedding `(D,)` that latents start from."""
    table = model.get_input_embeddings().weight.detach().float()
    if name in ("zeros", "table mean"):
        return table.mean(0) if name == "table mean" else torch.zeros_like(table[0])
    return table[model.tokenizer(name, add_special_tokens=False)["input_ids"][-1]]


@torch.no_grad()
def loss_of(model: SmolLMv3WithTRM, rows: list[dict[str, str]]) -> float:
    """Nats per supervised token of all rows."""
    examples, total, n_tokens = [model.encoder.encode(row) for row in rows], 0.0, 0
    for start in range(0, len(rows), BATCH_SIZE):
        batch = collate_examples(examples[start : start + BATCH_SIZE], padding_token_id(model.tokenizer))
        kept = supervised_columns(batch["labels"])
        total += float(model(**batch, logits_to_keep=kept, num_items_in_batch=1, use_cache=False).loss)
        n_tokens += int((batch["labels"] != IGNORED_LABEL).sum())
    return total / n_tokens


def main() -> None:
    """Measure anchors by gains, then the default by the number of latents."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of the base's weights")
    parser.add_argument("--n_rows", type=int, default=48, help="solutions of GSM8K's dev part")
    parser.add_argument("--anchors", nargs="*", default=ANCHORS, help="texts, 'zeros' or 'table mean'")
    parser.add_argument("--gains", type=float, nargs="+", default=[0.1, 0.3, 1.0])
    parser.add_argument("--num_latents", type=int, nargs="+", default=[16, 64, 256], help="the first is the table's")
    options = parser.parse_args()
    folder, rows = str(smollm2_folder()), load_gsm8k(real_gsm8k()).gsm8k_test[: options.n_rows]
    common = {"base_training": "frozen", "dtype": DTYPES[options.dtype]}
    base_loss = loss_of(SmolLMv3WithTRM.from_base(folder, reasoner=None, **common).eval(), rows)
    print(f"base: {base_loss:.4f} nats per supervised token\n", flush=True)
    few = options.num_latents[0]
    by_anchor: dict[str, dict[str, float]] = {name: {} for name in options.anchors}
    for gain in options.gains if by_anchor else ():
        model = SmolLMv3WithTRM.from_base(folder, num_latents=few, reasoner_settings={"gain": gain}, **common).eval()
        for name, found in by_anchor.items():
            model.reasoner.scale.anchor.copy_(anchor_of(model, name))
            found[str(gain)] = round(loss_of(model, rows) - base_loss, 4)
    by_count = {}
    for count in options.num_latents:
        model = SmolLMv3WithTRM.from_base(folder, num_latents=count, **common).eval()
        by_count[str(count)] = round(loss_of(model, rows) - base_loss, 4)
    gain = model.config.reasoner_settings["gain"]
    print_table([f"anchor, M = {few}", *(f"gain {gain}" for gain in options.gains)],
                [[repr(name), *found.values()] for name, found in by_anchor.items()])  # fmt: skip
    print()
    print_table(["default", *(f"M = {count}" for count in by_count)],
                [[f"{ANCHOR_TEXT!r}, gain {gain}", *by_count.values()]])  # fmt: skip
    setup = {"base": "SmolLM2-135M-Instruct", "dtype": options.dtype, "n_rows": len(rows), "num_latents": few,
             "default": {"anchor": ANCHOR_TEXT, "gain": gain}, "base_loss": round(base_loss, 4)}  # fmt: skip
    figures = {"nats_above_the_base": {"anchor and gain": by_anchor, "default by M": by_count}}
    record("distance_at_start", {**setup, **figures}, seed=0, keep=options.record)


if __name__ == "__main__":
    main()
