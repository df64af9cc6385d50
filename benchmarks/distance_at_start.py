"""How far from its base a model with fresh latents is: nats per supervised token, on held-out word problems.

    python benchmarks/distance_at_start.py [--base FOLDER] [--n_rows 100]

Without training, latents can only disturb. The bar: at most 0.1 nat at M = 16, with a gain that leaves the reasoner
its gradient. The base is the demo's, which writes its chain. Tried: which reasoner, how many latents, the gain, the
neutral token that latents start from (the anchor), and whether slots have positions of their own or share `<think>`'s.
"""

from pathlib import Path

import torch
from _models import DEMO_BASE, Base, held_out_problems, trained_base
from _record import benchmark_options, print_table, record
from torch import Tensor

from smollm_trm.data.batching import collate_examples
from smollm_trm.data.prompts import padding_token_id
from smollm_trm.models.reasoners import Thought, TRMSettings
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.span import LatentSpan
from smollm_trm.models.storage import ModelSettings

NUM_LATENTS = (16, 64, 256)
GAINS = (0.0, 0.1, 0.3, 1.0)
ANCHORS = ("</think>", "<think>", "newline", "mean", "zero")
POSITIONS = ("shared", "own")


class OwnPositions(LatentSpan):
    """A span whose slots count as positions, as other tokens do."""

    def positions(self, attention_mask: Tensor) -> Tensor:
        """Position ids `(B, L)` that count every real token."""
        return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


class Distances:
    """Loss above the base's, for any choice; what the reasoner makes is computed once.

    Args:
        base: a trained model and its tokenizer.
        n_rows: held-out problems.
    """

    def __init__(self, base: Base, *, n_rows: int) -> None:
        self.base = base
        self.rows = held_out_problems(n_rows)
        self.thoughts: dict[tuple[str, int], tuple[SmolLMv3WithTRM, dict[str, Tensor], Tensor]] = {}
        plain = self.build(None, 1)
        with torch.no_grad():
            self.base_loss = plain(**self.batch(plain)).loss.item()

    def build(self, reasoner: str | None, num_latents: int) -> SmolLMv3WithTRM:
        """The base with a fresh reasoner."""
        settings = ModelSettings(
            base_training="frozen", reasoner=reasoner, num_latents=num_latents, trm=TRMSettings(gain=1.0)
        )
        return SmolLMv3WithTRM.from_base(self.base, settings=settings).eval()

    def batch(self, model: SmolLMv3WithTRM) -> dict[str, Tensor]:
        """All rows at once."""
        return collate_examples([model.encoder.encode(row) for row in self.rows], padding_token_id(model.tokenizer))

    def anchor(self, name: str) -> Tensor:
        """The embedding that latents start from, `(D,)`."""
        model, tokenizer = self.base
        table = model.get_input_embeddings().weight.detach()
        if name in ("mean", "zero"):
            return table.mean(0) if name == "mean" else torch.zeros_like(table[0])
        return table[tokenizer("\n" if name == "newline" else name, add_special_tokens=False)["input_ids"][-1]]

    @torch.no_grad()
    def measure(self, *, reasoner: str, num_latents: int, gain: float, anchor: str, positions: str) -> float:
        """Nats per supervised token above the base."""
        key = (reasoner, num_latents)
        if key not in self.thoughts:
            model = self.build(*key)
            batch = self.batch(model)
            latents = model.think(batch["input_ids"], batch["attention_mask"])[-1].latents
            self.thoughts[key] = (model, batch, latents - model.reasoner.scale.anchor)
        model, batch, part = self.thoughts[key]
        span_of = SmolLMv3WithTRM.span_of
        if positions == "own":
            model.span_of = lambda ids, mask: OwnPositions(span_of(model, ids, mask).slots)
        loss = model(**batch, thought=Thought(self.anchor(anchor) + gain * part)).loss.item()
        model.__dict__.pop("span_of", None)
        return loss - self.base_loss


def main() -> None:
    """Measure the choices, two at a time."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--base", type=Path, default=DEMO_BASE, help="Hugging Face folder; by default `make demo`'s")
    parser.add_argument("--n_rows", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    distances = Distances(trained_base(options.base), n_rows=options.n_rows)
    usual = {"reasoner": "trm", "num_latents": 16, "gain": 1.0, "anchor": "</think>", "positions": "shared"}
    print(f"base: {distances.base_loss:.4f} nats per supervised token\n")
    tables = {
        "reasoner and M": ("reasoner", ("trm", "compressor", "static"), "num_latents", NUM_LATENTS),
        "anchor and gain, M = 16": ("anchor", ANCHORS, "gain", GAINS),
        "positions and M": ("positions", POSITIONS, "num_latents", NUM_LATENTS),
        "gain and M": ("gain", GAINS, "num_latents", NUM_LATENTS),
        "anchor and M": ("anchor", ANCHORS, "num_latents", NUM_LATENTS),
    }
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for title, (down, names, across, values) in tables.items():
        figures[title] = {
            str(name): {
                str(value): round(distances.measure(**{**usual, down: name, across: value}), 4) for value in values
            }
            for name in names
        }
        print(title)
        print_table([down, *map(str, values)], [[name, *found.values()] for name, found in figures[title].items()])
        print()
    setup = {"n_rows": options.n_rows, "base_loss": round(distances.base_loss, 4), "otherwise": usual}
    record("distance_at_start", {**setup, "nats_above_the_base": figures}, seed=0, keep=options.record)


if __name__ == "__main__":
    main()
