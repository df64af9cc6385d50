"""How much GPU memory the notebook's runs need on a T4, found without one.

    python benchmarks/t4_memory.py               trace the runs at SmolLM3-3B's real shapes (ten minutes on one core)
    python benchmarks/t4_memory.py --validate    compare the tracer with the allocator on a small model
    python benchmarks/t4_memory.py --four-bits   `quick` with its base in fp16 and in 4 bits
    python benchmarks/t4_memory.py --whole       one run at the full depth, beside what two smaller depths say of it

With `--record`, the guide's table is made from the figures by the next `make notebook`.

The model, its reasoner, LoRA, optimizer and average are built as the notebook builds them, of fake tensors: they have
shape, dtype and lifetime but no data. One step of the reasoner alone where the run begins with it, the reading of its
questions included, one training step, one validation batch and one batch of generation run on them, and every storage
is counted from its first use to its release. Batches are the worst that GSM8K has: every row as long as its longest (84
tokens of question, 361 of solution, the latents between; where the answer is given at once, the longest question).
Every block of SmolLM3 needs the same, so two small depths are traced and a line is drawn to 36.

Not seen: CUDA's context (about 0.5 GiB), workspaces and fragmentation. The peak has 10% added for the last two.
Attention is traced as the plain matrix product, which keeps all its scores: other kernels need less. Linear layers in 4
bits are stand-ins for those of bitsandbytes (NF4, block 64, double quantization), which have their storage and make one
layer's fp16 weights at a time, forward and backward; its fused kernels need less.
"""

import argparse
import ast
import gc
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from _record import benchmark_options, print_table, record
from _tracing import GIB, FourBitLinear, LiveBytes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, SmolLM3Config, SmolLM3ForCausalLM

from smollm_trm.data.batching import collate_examples
from smollm_trm.data.prompts import EncodedExample, slot_token_id
from smollm_trm.finetune import ROWS_ALONE
from smollm_trm.models import modeling
from smollm_trm.models.adapters import LoraSettings, add_adapter
from smollm_trm.models.configuration import LatentReasoningConfig
from smollm_trm.models.loading import take_apart
from smollm_trm.models.prompt import Prompt
from smollm_trm.models.reasoners.reasoner import Thought
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.models.tiny import train_tiny_tokenizer
from smollm_trm.training.ema import AverageWeights
from smollm_trm.training.module import SmolLMTRMLightningModule
from smollm_trm.training.optim import OptimizerSettings, build_optimizer
from smollm_trm.training.reasoner_first import READ_AT_ONCE, KeptPrompt

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks/smollm_trm_colab.py"
PHASES = ("weights", "alone", "training", "validation", "generation")
QUESTION, SOLUTION = 84, 361  # tokens of GSM8K's longest training row with SmolLM3's tokenizer
LONGEST_QUESTION, AT_ONCE = 240, 12  # tokens of the longest question, and of an answer without its steps
DEPTHS = (4, 8)  # traced
SPARE = 16
SMOLLM3 = {  # HuggingFaceTB/SmolLM3-3B, config.json
    "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 65_536,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    "rope_theta": 5_000_000.0, "tie_word_embeddings": True, "no_rope_layer_interval": 4, "use_sliding_window": False,
}  # fmt: skip
SMALL = {**SMOLLM3, "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """What of a run decides its memory; names as in the notebook."""

    num_latents: int = 16
    batch_size: int = 2
    eval_batch_size: int = 4
    at_once: int = 32
    use_trm: bool = True
    gradient_checkpointing: bool = False
    trm: Mapping[str, object] | None = None
    reasoner_steps: int = 0
    target: str = "steps"


class FourBitRun(Run):
    """The same with the base's linear layers in 4 bits."""


def in_four_bits(model: SmolLMv3WithTRM) -> None:
    """Every linear layer of the decoder's blocks, LoRA's own left out, as bitsandbytes has them."""
    for name, module in [*model.model.language_model.named_modules()]:
        if isinstance(module, nn.Linear) and "lora_" not in name:
            parent, _, last = name.rpartition(".")
            setattr(model.model.language_model.get_submodule(parent), last, FourBitLinear(module))


def notebook_run(name: str, changes: Mapping[str, object]) -> Run:
    """A run with the numbers that stand in the notebook's source, and what a recipe changes."""
    tables = {}
    for node in ast.parse(NOTEBOOK.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("RUNS", "AROUND"):
            tables[ast.unparse(node.targets[0])] = ast.literal_eval(node.value)
    numbers = {**tables["RUNS"][name], **tables["AROUND"][name]}
    fields, numbers["trm"] = Run.__dataclass_fields__, numbers.get("trm_kwargs")
    return Run(**{key: value for key, value in numbers.items() if key in fields} | dict(changes))


TRACED: dict[str, tuple[str, dict[str, object]]] = {
    "`quick`, LoRA alone": ("quick", {"use_trm": False}),
    "`quick`, LoRA + TRM": ("quick", {}),
    "`full`, LoRA alone": ("full", {"use_trm": False}),
    "`full`, LoRA + TRM": ("full", {}),
    "`full`, `num_latents = 128`": ("full", {"num_latents": 128}),
    "`full`, less memory": ("full", {"batch_size": 1}),
}  # fmt: skip
"""The runs of the guide's table: `quick`, `full` and the recipes; name -> run and what it changes."""


def build(run: Run, shapes: Mapping, dtype: torch.dtype) -> SmolLMv3WithTRM:
    """The notebook's model of a run, in training mode."""
    tokenizer = train_tiny_tokenizer(["Question: Answer: #### 1"], vocab_size=300)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        base = SmolLM3ForCausalLM(SmolLM3Config(**shapes))
    finally:
        torch.set_default_dtype(usual)
    config = LatentReasoningConfig(
        text_config=base.config,
        base_model="traced",
        reasoner="trm" if run.use_trm else None,
        reasoner_settings=dict(run.trm or {}),
        num_latents=run.num_latents,
        slot_token_id=slot_token_id(tokenizer),
        target=run.target,
    )
    model = SmolLMv3WithTRM.assemble(take_apart(base, tokenizer, "traced"), config)
    add_adapter(model.model.language_model, LoraSettings().to_peft(base.config.model_type))
    model.freeze_base()
    if isinstance(run, FourBitRun):
        in_four_bits(model)
    if run.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def build_fake(run: Run, shapes: Mapping, dtype: torch.dtype) -> SmolLMv3WithTRM:
    """The same model of fake tensors: built without data, then every tensor replaced, tied ones by one."""
    with torch.device("meta"):
        model = build(run, shapes, dtype)
    replaced: dict[int, Tensor] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in replaced:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                    replaced[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                module._parameters[name] = None if parameter is None else replaced[id(parameter)]
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


def batch_of(model: SmolLMv3WithTRM, rows: int) -> dict[str, Tensor]:
    """Real ids, masks and labels of the longest rows."""
    span = [model.config.slot_token_id] * model.num_latents
    at_once = model.config.target == "answer"
    question, solution = (LONGEST_QUESTION, AT_ONCE) if at_once else (QUESTION, SOLUTION)
    row = EncodedExample(prompt=[7] * (question - 1) + span + [8], completion=[9] * solution)
    batch = collate_examples([row] * rows, 0)
    if at_once and model.use_trm:
        batch["latent_labels"] = torch.full((rows, model.num_latents), 9)
    return batch


def filled_wholly(embeddings: Tensor, slots: Tensor, latents: Tensor) -> Tensor:
    """`fill_slots` where every row has all its slots: what is selected by a mask has no shape without data."""
    return embeddings.masked_scatter(slots.unsqueeze(-1), latents.to(embeddings.dtype).flatten(0, 1).clone())


def train_once(model: SmolLMv3WithTRM, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> None:
    """One batch as the Lightning module trains it, with the last supervision step drawn, and an optimizer step.

    It is one of those that train the halting head: under `target="steps"` every step's logits are computed first.
    """
    module = lightning_module(model)
    module.training_step(batch, 0).backward()
    optimizer.step()
    optimizer.zero_grad()


def latent_loss(module: SmolLMTRMLightningModule, thought: Thought, labels: Tensor) -> Tensor:
    """The module's own where every latent is asked, without its log: what is selected by a mask has no shape."""
    latents = thought.latents if thought.free is None else thought.free
    logits = module.model.reasoner.words(latents, module.model.lm_head)
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


def lightning_module(model: SmolLMv3WithTRM) -> SmolLMTRMLightningModule:
    """The Lightning module without a trainer: one process, nothing accumulated, nothing logged."""
    module = SmolLMTRMLightningModule(model=model)
    module._trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=1, global_step=0)
    module.draw_step = lambda: None  # all steps, the last with gradient
    module.log_training = lambda *_: None
    module.latent_loss = lambda thought, labels: latent_loss(module, thought, labels)
    return module


def reason_once(model: SmolLMv3WithTRM, optimizer: torch.optim.Optimizer) -> None:
    """The reasoner alone: the longest questions read as `KeptStates` reads them, then a step on what it kept."""
    ids = torch.full((READ_AT_ONCE, LONGEST_QUESTION), 7)
    embeddings, mask = model.get_input_embeddings()(ids), torch.ones_like(ids, dtype=torch.bool)
    prompt = Prompt(decoder=model.model.language_model, embeddings=embeddings, mask=mask, n_slots=None)
    model.eval()
    with torch.no_grad():
        layers = torch.cat(prompt.hidden_states(model.reasoner.read_depths), dim=-1).bfloat16()
    model.train()
    prompt.cache = None
    thought = model.reasoner.think(KeptPrompt([*layers[:ROWS_ALONE].split(embeddings.shape[-1], -1)], prompt))[-1]
    labels = torch.full((ROWS_ALONE, model.num_latents), 9)
    latent_loss(lightning_module(model), thought, labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def generate_once(model: SmolLMv3WithTRM, run: Run) -> None:
    """Read, think, fill the cache with the prompt, and go on to the longest text in one stride (an upper bound)."""
    span = [model.config.slot_token_id] * model.num_latents
    ids = torch.tensor([[7] * (LONGEST_QUESTION - 1) + span + [8]] * run.at_once)
    mask = torch.ones_like(ids)
    latents = model.latents_for(ids, mask) if model.use_trm else None
    cache = DynamicCache(config=model.config.text_config)
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    model(input_ids=ids, attention_mask=mask, latents=latents, **options)
    longest = SOLUTION if run.target == "steps" else AT_ONCE
    more = torch.full((run.at_once, longest + SPARE), 9)
    whole = torch.ones(run.at_once, ids.shape[1] + more.shape[1], dtype=torch.long)
    model(input_ids=more, attention_mask=whole, **options)


def optimizer_of(model: SmolLMv3WithTRM) -> torch.optim.Optimizer:
    """As the Lightning module configures it; on a GPU it updates all tensors of a group at once."""
    base = [parameter for name, parameter in model.named_parameters() if ".reasoner." not in name]
    optimizer = build_optimizer(base=base, reasoner=model.reasoner, settings=OptimizerSettings())
    for group in optimizer.param_groups:
        group["foreach"] = True
    return optimizer


def peaks_of(run: Run, shapes: Mapping, *, fake: bool, dtype: torch.dtype, generation: bool = True) -> dict[str, float]:
    """GiB at rest and at the peak of training, validation and generation."""
    counter, peaks = LiveBytes(), {}
    model = (build_fake if fake else build)(run, shapes, dtype)
    average = AverageWeights()
    average.on_fit_start(None, model)
    for tensor in [*model.parameters(), *model.buffers(), *average.averages.values()]:
        counter.add(tensor)
    optimizer = optimizer_of(model)
    peaks["weights"] = counter.total / GIB
    autocast = torch.autocast("cpu", dtype=dtype) if dtype != torch.float32 else nullcontext()
    with sdpa_kernel(SDPBackend.MATH):
        with counter.phase("alone", peaks), autocast:
            if run.use_trm and run.reasoner_steps:
                reason_once(model, optimizer)
        with counter.phase("first step", peaks), autocast:
            train_once(model, optimizer, batch_of(model, run.batch_size))
        gc.collect()
        peaks["before the step"] = counter.total / GIB
        with counter.phase("training", peaks), autocast:  # with the optimizer's state there
            train_once(model, optimizer, batch_of(model, run.batch_size))
        model.eval()
        with counter.phase("validation", peaks), torch.no_grad(), autocast:
            average.swap(model)
            lightning_module(model).answer_from(batch_of(model, run.eval_batch_size), None)
            average.swap(model)
        if generation:
            del optimizer, average
            with counter.phase("generation", peaks), torch.no_grad():
                generate_once(model, run)
    return peaks


def allocator_peak(run: Run, shapes: Mapping) -> dict[str, float]:
    """What PyTorch's allocator itself reports for one step at a small size: bytes at the peak, over what was there."""
    model = build(run, shapes, torch.float32)
    optimizer = optimizer_of(model)
    batch = batch_of(model, run.batch_size)
    with sdpa_kernel(SDPBackend.MATH):
        train_once(model, optimizer, batch)
        gc.collect()
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            train_once(model, optimizer, batch)
    events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda one: one.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return {"allocated": peak / GIB}


def tracer_error(run: Run) -> dict[str, float]:
    """The tracer on fake tensors against the allocator on real ones, for a training step of a small model."""
    traced = peaks_of(run, SMALL, fake=True, dtype=torch.float32, generation=False)
    measured = allocator_peak(run, SMALL)["allocated"]
    step = traced["training"] - traced["before the step"]
    return {"traced_mib": step * 1024, "allocated_mib": measured * 1024, "error": step / measured - 1}


def main() -> None:
    """The command."""
    parser: argparse.ArgumentParser = benchmark_options(__doc__)
    parser.add_argument(
        "--validate", action="store_true", help="compare the tracer with the allocator on a small model"
    )
    parser.add_argument("--processes", type=int, default=1, help="runs traced at once")
    parser.add_argument("--only", help="trace only the runs whose name holds this text")
    parser.add_argument("--four-bits", action="store_true", help="fp16 and 4 bits beside one another")
    parser.add_argument("--whole", action="store_true", help="check the line through two depths at the full depth")
    options = parser.parse_args()
    if options.record and options.only:
        parser.error("--record wants all runs, for they make one table: leave --only out")
    torch.manual_seed(0)
    modeling.fill_slots = filled_wholly
    if options.validate:
        runs = {
            "with checkpointing": Run(gradient_checkpointing=True),
            "without": Run(),
            "LoRA alone, without": Run(use_trm=False),
        }
        figures = {name: tracer_error(run) for name, run in runs.items()}
        rows = [
            [name, f"{f['traced_mib']:.1f}", f"{f['allocated_mib']:.1f}", f"{f['error']:+.1%}"]
            for name, f in figures.items()
        ]
        print_table(["one training step", "traced MiB", "allocated MiB", "error"], rows)
        record("t4_memory_validation", figures, seed=0, keep=options.record)
        return
    if options.four_bits:
        run = notebook_run("quick", {})
        pair = {"fp16": run, "4 bits": FourBitRun(**asdict(run))}
        figures = {f"base in {words}": {"settings": asdict(one), **needed(one)} for words, one in pair.items()}
        print_table(["run", *PHASES, "peak + 10%"], [row_of(name, figure) for name, figure in figures.items()])
        record("t4_memory_4bit", figures, keep=options.record)
        return
    if options.whole:
        run = notebook_run("quick", {})
        traced = peaks_of(run, SMOLLM3, fake=True, dtype=torch.float16)
        said = needed(run)["gib"]
        figures = {phase: {"whole": round(traced[phase], 3), "line": said[phase]} for phase in PHASES}
        print_table(
            ["phase", "GiB at 36 blocks", "GiB by the line"], [[p, *map(str, f.values())] for p, f in figures.items()]
        )
        record("t4_memory_depth", figures, keep=options.record)
        return
    chosen = {name: (*one, notebook_run(*one)) for name, one in TRACED.items() if (options.only or "") in name}
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as processes:
        found = processes.map(needed, (run for _, _, run in chosen.values()))
        figures = {
            name: {"run": start, "changes": changes, "settings": asdict(run), **peaks}
            for (name, (start, changes, run)), peaks in zip(chosen.items(), found, strict=True)
        }
    print_table(["run", *PHASES, "peak + 10%"], [row_of(name, figure) for name, figure in figures.items()])
    record("t4_memory", figures, keep=options.record)


def needed(run: Run) -> dict[str, object]:
    """GiB by phase, the peak with 10% added, and the phase it stands in."""
    modeling.fill_slots = filled_wholly
    few, more = (peaks_of(run, {**SMOLLM3, "num_hidden_layers": n}, fake=True, dtype=torch.float16) for n in DEPTHS)
    stretch = (SMOLLM3["num_hidden_layers"] - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    gib = {phase: round(peak + stretch * (more[phase] - peak), 2) for phase, peak in few.items()}
    where = max(PHASES, key=lambda phase: gib[phase])
    return {"gib": gib, "peak": round(1.1 * gib[where], 2), "where": where}


def row_of(name: str, figure: Mapping) -> list[str]:
    """A row of the printed table."""
    return [name, *(f"{figure['gib'][phase]:.1f}" for phase in PHASES), f"{figure['peak']:.1f}"]


if __name__ == "__main__":
    main()
