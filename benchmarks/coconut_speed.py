"""A training step and generation of Coconut against a plain reimplementation of the published scheme.

    python benchmarks/coconut_speed.py [--repeats 7] [--record]

The plain one makes a pass per latent over the whole batch, cuts the cache and builds it anew each time, takes the
embeddings apart position by position to put a thought in (as the published code does, to write nothing in place),
computes logits in every pass, and generates one row at a time without a cache. One thread, a tiny GPT-2, CPU time;
losses, gradients and generated tokens of the two are compared first.
"""

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from _record import benchmark_options, print_table, record
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from smollm_trm.models.configuration import LatentReasoningConfig
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.training.module import SmolLMTRMLightningModule

VOCABULARY, START, END, SLOT = 512, 509, 510, 511
SHAPE = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 128, "n_positions": 512, "vocab_size": VOCABULARY}
NO_DROPOUT = {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0, "bos_token_id": None, "eos_token_id": None}
N_LATENTS, QUESTION, ANSWER = 6, 60, 16  # tokens of the longest row, as in the published oracle
NEW_TOKENS = 16


def make_batch(n_rows: int) -> dict[str, Tensor]:
    """Rows of `QUESTION` tokens or up to three fewer, 6 latents, an answer."""
    generator = torch.Generator().manual_seed(n_rows)
    ids = torch.randint(1, START, (n_rows, QUESTION + N_LATENTS + 2 + ANSWER), generator=generator)
    ids[:, QUESTION], ids[:, QUESTION + N_LATENTS + 1] = START, END
    ids[:, QUESTION + 1 : QUESTION + N_LATENTS + 1] = SLOT
    mask = (torch.arange(ids.shape[1]) >= torch.arange(n_rows).remainder(4)[:, None]).long()
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < QUESTION + N_LATENTS + 2, -100)
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask, "labels": labels}


def plain_forward(base: GPT2LMHeadModel, ids: Tensor, mask: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits, or the loss where there are labels, and the embeddings with the thoughts in."""
    slots = [(row == SLOT).nonzero()[:, 0].tolist() for row in ids]
    embeddings, positions = base.transformer.wte(ids), (mask.cumsum(1) - 1).clamp_min(0)
    begin, end = 0, min(row[0] for row in slots)
    n_passes, cache, logits = max(map(len, slots)), None, []
    for number in range(n_passes + 1):
        if cache is not None:
            cut = [(layer.keys[:, :, :begin], layer.values[:, :, :begin]) for layer in cache.layers]
            cache = DynamicCache()
            for index, (keys, values) in enumerate(cut):
                cache.update(keys, values, index)
        output = base(
            inputs_embeds=embeddings[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, begin:end],
            past_key_values=cache,
            output_hidden_states=True,
            use_cache=True,
        )
        logits.append(output.logits)
        if number == n_passes:
            break
        cache, states = output.past_key_values, output.hidden_states[-1]
        apart = [[embeddings[row, at] for at in range(embeddings.shape[1])] for row in range(len(ids))]
        for row, places in enumerate(slots):
            if len(places) > number:
                apart[row][places[number]] = states[row, places[number] - 1 - begin]
        embeddings = torch.stack([torch.stack(row) for row in apart])
        begin, end = end, end + 1 if number + 1 < n_passes else ids.shape[1]
    joined = torch.cat(logits, dim=1)
    if labels is None:
        return joined, embeddings
    return F.cross_entropy(joined[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), embeddings


@torch.no_grad()
def plain_generate(base: GPT2LMHeadModel, row: Tensor) -> list[int]:
    """Greedy tokens of one prompt, everything read again for each."""
    logits, embeddings = plain_forward(base, row[None], torch.ones_like(row[None]), None)
    written = [int(logits[0, -1, :SLOT].argmax())]  # the slot's own token is never written
    while len(written) < NEW_TOKENS:
        embeddings = torch.cat([embeddings, base.transformer.wte(torch.tensor([[written[-1]]]))], dim=1)
        written.append(int(base(inputs_embeds=embeddings).logits[0, -1, :SLOT].argmax()))
    return written


def build() -> tuple[GPT2LMHeadModel, SmolLMTRMLightningModule]:
    """The plain base, and our model with the same weights."""
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(**SHAPE, **NO_DROPOUT)).train()
    own = {"reasoner": "coconut", "num_latents": N_LATENTS, "slot_token_id": SLOT, "base_training": "full"}
    model = SmolLMv3WithTRM(LatentReasoningConfig(text_config=base.config, **own)).train()
    model.model.language_model.load_state_dict(base.transformer.state_dict())
    model.tie_weights()
    module = SmolLMTRMLightningModule(model=model)
    module.log = lambda *args, **options: None
    module._trainer = SimpleNamespace(world_size=1, global_step=0, accumulate_grad_batches=1)
    return base, module


def plain_step(base: GPT2LMHeadModel, batch: dict[str, Tensor]) -> float:
    """Forward and backward of the plain scheme."""
    base.zero_grad()
    loss, _ = plain_forward(base, batch["input_ids"], batch["attention_mask"], batch["labels"])
    loss.backward()
    return float(loss.detach())


def own_step(module: SmolLMTRMLightningModule, batch: dict[str, Tensor]) -> float:
    """Forward and backward of a training step of ours."""
    module.zero_grad()
    loss = module.training_step(batch, 0)
    loss.backward()
    return float(loss.detach())


def cpu_ms(*jobs: Callable[[], object], repeats: int) -> list[float]:
    """Median CPU milliseconds of each job; they take turns."""
    seconds: list[list[float]] = [[] for _ in jobs]
    for _ in range(repeats):
        for job, found in zip(jobs, seconds, strict=True):
            started = time.process_time()
            job()
            found.append(time.process_time() - started)
    return [1000 * statistics.median(found) for found in seconds]


def main() -> None:
    """Compare, measure, print."""
    parser = benchmark_options(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    base, module = build()
    figures, table = {}, []
    for n_rows in (6, 32):
        batch = make_batch(n_rows)
        losses = plain_step(base, batch), own_step(module, batch)
        assert abs(losses[0] - losses[1]) < 1e-5, losses
        ours = module.model.model.language_model
        for name, parameter in base.transformer.named_parameters():
            assert torch.allclose(parameter.grad, ours.get_parameter(name).grad, atol=1e-5), name
        jobs = lambda batch=batch: plain_step(base, batch), lambda batch=batch: own_step(module, batch)  # noqa: E731
        plain, own = cpu_ms(*jobs, repeats=options.repeats)
        figures[f"training_step_{n_rows}_rows"] = {"plain_ms": plain, "ours_ms": own, "times": plain / own}
    base.eval(), module.eval()
    prompts = make_batch(32)["input_ids"][:, 4 : QUESTION + N_LATENTS + 2]
    how = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}

    def generate() -> Tensor:
        mask = torch.ones_like(prompts)
        return module.model.generate(prompts, attention_mask=mask, suppress_tokens=[SLOT], **how)

    written = generate()[:, prompts.shape[1] :].tolist()
    assert written == [plain_generate(base, row) for row in prompts], "the two write different tokens"
    jobs = lambda: [plain_generate(base, row) for row in prompts], generate  # noqa: E731
    plain, own = cpu_ms(*jobs, repeats=max(1, options.repeats // 2))
    figures["generation_32_rows"] = {"plain_ms": plain, "ours_ms": own, "times": plain / own}
    for name, found in figures.items():
        table.append([name, f"{found['plain_ms']:.1f}", f"{found['ours_ms']:.1f}", f"{found['times']:.1f}"])
    print_table(["", "plain, CPU ms", "ours, CPU ms", "times as fast"], table)
    record("coconut_speed", figures, seed=0, keep=options.record)


if __name__ == "__main__":
    main()
