# %% [markdown]
# # Teach SmolLM3 to reason in latent space: LoRA and a Tiny Recursive Model on GSM8K
#
# At `<think>` a **Tiny Recursive Model** (TRM) reads SmolLM3-3B's hidden states of the question, compresses them to
# M *latents*, refines those recursively, and hands them back. SmolLM3 writes its answer from there. LoRA adapts
# SmolLM3, PyTorch Lightning trains, GSM8K (grade-school maths) judges.
#
# ```
# SmolLM3  Question: ... <think>
# TRM      [latent 1] ... [latent M]
# SmolLM3  </think> solution #### 72
# ```
#
# **How to use it.** *Runtime → Change runtime type → T4 GPU*, then *Runtime → Run all*. Nothing has to be edited, no
# key is needed and nothing asks a question. At the end stands a table that compares the **base** model, **LoRA**
# alone and **LoRA + TRM** on the same problems, with intervals, and with the control that tells whether the latents
# do anything: each problem answered from *another* problem's latents.
#
# Everything the notebook needs is in it: the folded cells are the library `smollm_trm`, taken over by a build.

# %% [markdown]
# ## Setup
#
# The first cell installs what is missing (on Colab: PyTorch Lightning) and leaves torch and numpy as they are, so no
# restart is needed.

# %%
import os
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata, util
from pathlib import Path

NEEDED = {"torch": "2.6", "transformers": "5.15", "peft": "0.20", "datasets": "4.0", "pytorch-lightning": "2.6",
          "matplotlib": "3.9", "scipy": "1.13"}  # fmt: skip
# (torch 2.6 has all that is called here, none of it was run below 2.13; the whole package wants 2.9)
IN_COLAB = util.find_spec("google") is not None and util.find_spec("google.colab") is not None


def installed_version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def numbers(text):
    return [int(part) for part in text.split("+")[0].split(".")[:2]]


missing = [
    f"{name}>={least}" for name, least in NEEDED.items() if numbers(installed_version(name) or "0.0") < numbers(least)
]
if missing:
    kept = [f"{name}=={have}" for name in ("torch", "numpy") if (have := installed_version(name))]
    constraints = Path(tempfile.mkdtemp()) / "constraints.txt"
    constraints.write_text("\n".join(kept))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-c", str(constraints), *missing], check=True)
if IN_COLAB and installed_version("torchao"):  # PEFT refuses to be imported beside Colab's old torchao
    subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", "torchao"], check=True)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_MINITERS", "20")  # progress bars that do not fill the page
warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars without ipywidgets
warnings.filterwarnings("ignore", category=FutureWarning)
print("installed:" if missing else "nothing to install", *missing)

# %% [markdown]
# ### Settings
#
# `RUN` is the one switch:
#
# | RUN | what it trains | on |
# | --- | --- | --- |
# | `smoke` | a tiny twin of SmolLM3, from scratch, on generated word problems: minutes, to see that all works | a CPU |
# | `quick` | SmolLM3-3B on 1,000 problems of GSM8K, 64 latents, one epoch; 200 problems compared | a T4 |
# | `full` | SmolLM3-3B on all 5,978, 256 latents, three epochs; may span several sessions | a T4 |
#
# The other fields change a single setting; `None` leaves it as `RUN` has it. What the runs cost on a T4, which has 14.6
# GiB; nothing of it was measured on one:
#
# <!-- needs -->
# <!-- /needs -->

# %% cellView="form"
# @title Settings
RUN = "quick"  # @param ["smoke", "quick", "full"]
# @markdown **What is trained**
model_name = None  # @param {type:"raw"}
num_latents = None  # @param {type:"raw"}
trm_kwargs = None  # @param {type:"raw"}
use_trm = None  # @param {type:"raw"}
target = None  # @param {type:"raw"}
dataset_path = None  # @param {type:"raw"}
max_samples = None  # @param {type:"raw"}
max_length = None  # @param {type:"raw"}
# @markdown **How**
batch_size = None  # @param {type:"raw"}
accumulate_grad_batches = None  # @param {type:"raw"}
num_epochs = None  # @param {type:"raw"}
learning_rate = None  # @param {type:"raw"}
trm_learning_rate = None  # @param {type:"raw"}
val_check_interval = None  # @param {type:"raw"}
precision = None  # @param {type:"raw"}
devices = None  # @param {type:"raw"}
# @markdown **Where it goes**
wandb_project = None  # @param {type:"raw"}
wandb_name = None  # @param {type:"raw"}
USE_DRIVE = False  # @param {type:"boolean"}
RESUME = True  # @param {type:"boolean"}
OFFICIAL_TEST = False  # @param {type:"boolean"}
PUSH_TO = ""  # @param {type:"string"}

# %% [imports]
import gc
import textwrap

from IPython.display import Image, Markdown

# %% [markdown]
# ### GPU check

# %%
logging.basicConfig(level=logging.WARNING, format="%(message)s")
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gpu_memory() -> str:
    """What the GPU holds now, and the most it held."""
    if device.type == "cpu":
        return "on the CPU"
    free, whole = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_allocated()
    return f"GPU memory: {(whole - free) / 2**30:.1f} of {whole / 2**30:.1f} GiB in use, peak {peak / 2**30:.1f} GiB"


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if device.type == "cuda":
    properties = torch.cuda.get_device_properties(0)
    major, minor = torch.cuda.get_device_capability()
    kind = "bf16" if major >= 8 else "fp16, with fp32 for what is trained"
    print(f"{properties.name}, capability {major}.{minor}: {kind}")
    print(gpu_memory())
    if RUN != "smoke" and properties.total_memory < 14 * 2**30:
        print("This GPU has less memory than a T4: expect to lower batch_size, max_length or num_latents.")
elif RUN != "smoke":
    print(
        f"No GPU here, and RUN = {RUN!r} needs one: this is RUN = 'smoke' instead.\n"
        "In Colab: Runtime → Change runtime type → T4 GPU, then Run all again."
    )
    RUN = "smoke"

# %% [markdown]
# ### What RUN stands for
#
# All numbers of the three runs stand here and nowhere else. Memory decides most of them on a T4: the base in fp16,
# gradient checkpointing, small batches with accumulation.

# %%
RUNS = {
    "smoke": {
        "model_name": "tiny", "num_latents": 8, "target": "answer", "max_steps": 240, "num_epochs": 1000,
        "batch_size": 32, "eval_batch_size": 128, "accumulate_grad_batches": 1, "max_length": 512,
        "learning_rate": 2e-3, "trm_learning_rate": 4e-3, "patience": None, "val_check_interval": 120,
        "save_every_n_steps": 120,
    },
    "quick": {
        "model_name": "HuggingFaceTB/SmolLM3-3B", "num_latents": 64, "target": "steps", "max_samples": 1000,
        "num_epochs": 1, "batch_size": 4, "eval_batch_size": 8, "accumulate_grad_batches": 4, "max_length": 512,
        "learning_rate": 2e-4, "gradient_checkpointing": True, "save_every_n_steps": 20,
    },
    "full": {
        "model_name": "HuggingFaceTB/SmolLM3-3B", "num_latents": 256, "target": "steps",
        "num_epochs": 3, "batch_size": 2, "eval_batch_size": 4, "accumulate_grad_batches": 4, "max_length": 768,
        "learning_rate": 2e-4, "gradient_checkpointing": True, "save_every_n_steps": 200,
    },
}  # fmt: skip
AROUND = {  # what surrounds the training
    "smoke": {"word_problems": 30_000, "base_steps": 900, "dev": 500, "compared": 300, "at_once": 128},
    "quick": {"dev": 200, "compared": 200, "at_once": 32},
    "full": {"dev": None, "compared": None, "at_once": 32},
}
SEED = 42
wanted = {
    "model_name": model_name, "num_latents": num_latents, "trm_kwargs": trm_kwargs, "use_trm": use_trm,
    "target": target, "max_samples": max_samples, "max_length": max_length, "batch_size": batch_size,
    "accumulate_grad_batches": accumulate_grad_batches, "num_epochs": num_epochs, "learning_rate": learning_rate,
    "trm_learning_rate": trm_learning_rate, "val_check_interval": val_check_interval, "precision": precision, "devices": devices,
    "wandb_project": wandb_project, "wandb_name": wandb_name,
}  # fmt: skip
chosen = {**RUNS[RUN], **{name: value for name, value in wanted.items() if value is not None}}
around = AROUND[RUN]

# %% [markdown]
# ### Where results go
#
# A free session ends without notice. With `USE_DRIVE` everything is kept on Google Drive, and with `RESUME` the same
# *Run all* later goes on from the last checkpoint and the last prediction.

# %%
outputs = Path("outputs")
if USE_DRIVE and IN_COLAB:
    from google.colab import drive

    drive.mount("/content/drive")
    outputs = Path("/content/drive/MyDrive/smollm-trm")
FOLDER = outputs / RUN
if not RESUME:
    for stale in (FOLDER / "predictions").glob("*.jsonl"):
        stale.unlink()
print(f"RUN = {RUN!r}, results in {FOLDER}")

# %% [markdown]
# ## Login (optional)
#
# A secret (the key symbol at Colab's left edge) or environment variable named `WANDB_API_KEY` lets Weights & Biases
# show the curves if `wandb_project` is set; `HF_TOKEN` lets the result be pushed to the Hub. Without them nothing is
# missing, and nothing asks.


# %%
def secret(name: str) -> str | None:
    """An environment variable or a Colab secret; None where there is neither."""
    if os.environ.get(name) or not IN_COLAB:
        return os.environ.get(name)
    from google.colab import userdata

    try:
        return userdata.get(name)
    except Exception:  # no such secret, or the notebook may not see it
        return None


for name in ("WANDB_API_KEY", "HF_TOKEN"):
    if value := secret(name):
        os.environ[name] = value
    print(f"{name}: {'found' if value else 'not set'}")
value = None

# %% [markdown]
# ## GSM8K
#
# 7,473 training problems and 1,319 official test problems. The training problems are cut by a seeded shuffle:
#
# - `gsm8k_train`: 80% to train on,
# - `gsm8k_test`: the other 20%. It may pick the checkpoint, so every score on it is called **dev**,
# - `gsm8k_final_test`: the official test set, for the final evaluation only.

# %% [inline] smollm_trm.records

# %% [inline] smollm_trm.data.answers

# %% [inline] smollm_trm.data.rows

# %% [inline] smollm_trm.data.gsm8k

# %% [markdown]
# The word problems of the smoke run come from a generator and are written as files in GSM8K's format, so that they
# are loaded and split by the very same code.

# %% [inline] smollm_trm.data.word_grammar

# %% [inline] smollm_trm.data.word_stories

# %% [inline] smollm_trm.data.word_problems

# %% [markdown]
# ### The split and some problems

# %%
data_dir = None  # None: the folder in the environment variable GSM8K_DIR, else the Hub
if RUN == "smoke":
    easy = WordProblemSettings(max_steps=2, max_number=10, max_value=30, distractor_rate=0.0)
    data_dir = str(FOLDER / "data")
    write_word_problems(data_dir, train=around["word_problems"], test=300, seed=SEED, settings=easy)
splits = load_gsm8k(data_dir, seed=SEED)
gsm8k_train, gsm8k_test, gsm8k_final_test = splits.gsm8k_train, splits.gsm8k_test, splits.gsm8k_final_test
print(
    f"{splits.source}: {len(gsm8k_train)} train, {len(gsm8k_test)} dev, {len(gsm8k_final_test)} official test; "
    f"seed {splits.seed}, fingerprint {splits.fingerprint[:16]}"
)
for row in gsm8k_train[:3]:
    print(f"\nquestion: {row['question']}\nanswer:   {row['answer']}")

# %% [markdown]
# ## TRM components
#
# The Tiny Recursive Model, from the block to the whole.

# %% [inline] smollm_trm.models.blocks

# %% [inline] smollm_trm.models.compression

# %% [inline] smollm_trm.models.recursion

# %% [inline] smollm_trm.models.prompt

# %% [inline] smollm_trm.models.reasoners.reasoner

# %% [inline] smollm_trm.models.reasoners.compressor

# %% [inline] smollm_trm.models.reasoners.trm

# %% [inline] smollm_trm.models.reasoners.static

# %% [inline] smollm_trm.models.reasoners.coconut

# %% [inline] smollm_trm.models.reasoners.known

# %% [markdown]
# ## SmolLM integration
#
# Where the latents stand, and how SmolLM3 gets them.

# %% [inline] smollm_trm.data.curriculum

# %% [inline] smollm_trm.data.prompts

# %% [inline] smollm_trm.data.batching

# %% [inline] smollm_trm.models.tiny

# %% [inline] smollm_trm.models.configuration

# %% [inline] smollm_trm.models.span

# %% [inline] smollm_trm.models.adapters

# %% [inline] smollm_trm.models.modeling

# %% [inline] smollm_trm.models.loading

# %% [inline] smollm_trm.models.storage

# %% [inline] smollm_trm.models.hub

# %% [inline] smollm_trm.models.pretrained

# %% [inline] smollm_trm.models.generation

# %% [inline] smollm_trm.models.smollm

# %% [markdown]
# ## Dataset

# %% [inline] smollm_trm.data.reasoning_dataset

# %% [inline] smollm_trm.data.datamodule

# %% [markdown]
# ### One encoded example
#
# Loss is taken on the completion and its end-of-text token alone. Question, slots and padding are masked (-100).

# %%
if dataset_path:  # own problems in GSM8K's place
    gsm8k_train, gsm8k_test = split_gsm8k(ReasoningDataset(dataset_path), seed=SEED)
    print(f"{dataset_path}: {len(gsm8k_train)} train, {len(gsm8k_test)} dev")
if chosen["model_name"] == "tiny":
    tokenizer = train_tiny_tokenizer([f"{row['question']}\n{row['answer']}" for row in gsm8k_train[:1000]])
else:
    tokenizer = AutoTokenizer.from_pretrained(chosen["model_name"])
encoder = PromptEncoder(tokenizer=tokenizer, num_latents=chosen["num_latents"], target=chosen["target"])
example = GSM8KDataset(gsm8k_train[:8], encoder=encoder)[[0]]
ids, labels = example["input_ids"][0], example["labels"][0]
slots = tokenizer.decode([slot_token_id(tokenizer)] * encoder.num_latents)
masked = tokenizer.decode(ids[labels == IGNORED_LABEL]).replace(slots, f" [slot x {encoder.num_latents}] ")
print(f"{len(ids)} tokens, {int((labels != IGNORED_LABEL).sum())} of them supervised\n")
print(f"masked:     {masked!r}\nsupervised: {tokenizer.decode(labels[labels != IGNORED_LABEL])!r}")

# %% [markdown]
# ## Lightning module

# %% [inline] smollm_trm.training.optim

# %% [inline] smollm_trm.training.module

# %% [markdown]
# ## Training

# %% [inline] smollm_trm.training.watch

# %% [inline] smollm_trm.training.checkpoints

# %% [inline] smollm_trm.training.ema

# %% [inline] smollm_trm.training.loggers

# %% [inline] smollm_trm.training.progress

# %% [inline] smollm_trm.training.run

# %% [inline] smollm_trm.training.stages

# %% [inline] smollm_trm.training.settings

# %% [inline] smollm_trm.training.parts

# %% [markdown]
# ## Evaluation

# %% [inline] smollm_trm.evaluation.statistics: wilson_interval, mcnemar_p, PairedDifference, paired_difference, corrected_phi

# %% [inline] smollm_trm.evaluation.predictions

# %% [inline] smollm_trm.evaluation.evaluate

# %% [inline] smollm_trm.evaluation.compare

# %% [inline] smollm_trm.evaluation.plots

# %% [inline] smollm_trm.evaluation.arms

# %% [markdown]
# ## All of it in one call

# %% [inline] smollm_trm.finetune

# %% [markdown]
# ## Configuration
#
# The settings of `train_gsm8k` by their names, from `RUN` and from the form at the top. They are checked here, before
# anything expensive starts: a wrong name or value is one line that says what would be right.

# %%
config = {
    "dataset_path": dataset_path,  # the rows and the split are those above: loaded and cut by the same code
    "data_dir": data_dir,
    "split_seed": SEED,
    "max_dev_samples": around["dev"],  # of the 20% part: the dev loss picks the checkpoint
    "output_dir": str(FOLDER / "lora_trm"),
    "resume": "auto" if RESUME else "never",
    "seed": SEED,
    **chosen,
}
checked = TrainSettings(**config)
check_fits(checked)
values = {name: repr(value) for name, value in vars(checked).items()}
print("\n".join(f"{name:24} {values.pop(name)}" for name in config if name in values))
print(textwrap.fill("As usual: " + ", ".join(f"{name} {value}" for name, value in values.items()), width=80))

# %% [markdown]
# ## Train
#
# First the base as it is, then LoRA alone, then LoRA + TRM, all on the same problems. On the GPU there is room for
# one model at a time, so each is judged on the dev problems as soon as it is there.

# %%
trainer = model = tuned = None  # gives back the memory of an earlier run
results: dict[str, dict] = {}
shown = gsm8k_test[:3]
before: list[str] = []


def judge(name: str, judged: SmolLMv3WithTRM) -> None:
    """Answer the dev problems; where there are latents, also with those of other problems."""
    free_memory()
    judged.to(device)
    results.update(
        evaluate_arm(
            name,
            judged,
            gsm8k_test,
            FOLDER / "predictions",
            max_samples=around["compared"],
            batch_size=around["at_once"],
        )
    )
    for arm in [arm for arm in results if arm.startswith(name)]:
        low, high = results[arm]["interval"]
        print(f"{arm}: dev accuracy {results[arm]['accuracy']:.1%} [{low:.1%}, {high:.1%}]; {gpu_memory()}")


def show(rows: list[dict], texts: list[str]) -> None:
    """Questions, what was written, and the right answer."""
    for row, text in zip(rows, texts, strict=True):
        print(f"question: {row['question']}\nwritten:  {text.strip()[:600]}\nright:    {gold_answer(row['answer'])}\n")


# %% [markdown]
# ### The base
#
# It writes its solution step by step, whatever `target` is. In the smoke run it is a tiny SmolLM3 that first learns
# that from scratch.

# %%
if config["model_name"] == "tiny":
    steps = around["base_steps"]
    trainer, model = train_gsm8k(**{
        **config, "base_training": "full", "use_trm": False, "target": "steps", "learning_rate": 4e-3,
        "max_steps": steps, "val_check_interval": steps // 2, "save_every_n_steps": steps // 2,
        "output_dir": str(FOLDER / "base"),
    })  # fmt: skip
    config["model_name"] = str(FOLDER / "base" / "model")
    trainer = model = None

# %%
precision_name, base_dtype = pick_precision(checked.precision)
twin = chosen["model_name"] == "tiny"  # trained with an empty think block; SmolLM3 is asked in its own way, without
base = SmolLMv3WithTRM.from_base(
    config["model_name"], reasoner=None, base_training="frozen", think=twin, target="steps", dtype=base_dtype
)
base.to(device).eval()
print(f"{sum(p.numel() for p in base.parameters()):,} parameters, precision {precision_name}; {gpu_memory()}\n")
ids = base.tokenizer(f"{shown[0]['question']} {shown[0]['answer']}", return_tensors="pt")["input_ids"].to(device)
with torch.no_grad():
    if not base(input_ids=ids).logits.isfinite().all():
        raise FloatingPointError(
            f"{config['model_name']} overflows in {precision_name}: its answers would be garbage. Choose a GPU with bf16, "
            "whose range is wider: Runtime → Change runtime type → L4 or A100, then Run all again."
        )
before = base.generate_with_thinking([row["question"] for row in shown])
show(shown, before)
judge("base", base)
base = None
free_memory()

# %% [markdown]
# ### LoRA alone

# %%
trainer, model = train_gsm8k(**{**config, "use_trm": False, "output_dir": str(FOLDER / "lora")})
judge("LoRA", model.model)

# %% [markdown]
# ### LoRA + TRM

# %%
if checked.use_trm:
    trainer = model = tuned = None
    free_memory()
    print(gpu_memory())
    trainer, model = train_gsm8k(**config)
tuned = model.model  # a SmolLMv3WithTRM; what follows asks this one
split, run_folder = trainer.datamodule.splits.summary, Path(trainer.default_root_dir)
print(gpu_memory())

# %% [markdown]
# ### Parameters by part


# %%
def count(part: nn.Module | None) -> str:
    """Parameters, and how many of them are trained."""
    parameters = list(part.parameters()) if part is not None else []
    return f"{sum(p.numel() for p in parameters):>13,} {sum(p.numel() for p in parameters if p.requires_grad):>11,}"


tuned.base_model.print_trainable_parameters()
print(f"\n{'part':14} {'parameters':>13} {'trained':>11}")
print(f"{'base and LoRA':14} {count(tuned.base_model.language_model)}")
if tuned.use_trm:
    for name, part in tuned.reasoner.named_children():
        print(f"{name:14} {count(part)}")

# %% [markdown]
# ## Dev evaluation
#
# On the 20% part. It picked the checkpoint, so this is a **dev** score.

# %%
tuned.to(device)
after = tuned.generate_with_thinking([row["question"] for row in shown])
for row, was, now in zip(shown, before, after, strict=True):
    print(
        f"question: {row['question']}\nbefore:   {was.strip()[:600]}\nafter:    {now.strip()[:600]}\n"
        f"right:    {gold_answer(row['answer'])}\n"
    )
if tuned.use_trm:
    judge("LoRA + TRM", tuned)

# %% [markdown]
# ## Official evaluation (optional)
#
# `OFFICIAL_TEST` answers the official test problems: once, at the very end, when nothing will be changed any more.

# %%
if OFFICIAL_TEST or RUN == "smoke":
    final_results = evaluate_gsm8k(
        tuned, gsm8k_final_test, batch_size=around["at_once"], predictions_path=FOLDER / "predictions/test.jsonl"
    )
    low, high = final_results["interval"]
    print(f"test accuracy {final_results['accuracy']:.1%} [{low:.1%}, {high:.1%}] on {final_results['total']} problems")
else:
    print("OFFICIAL_TEST is off")

# %% [markdown]
# ## Comparison
#
# All arms on the same dev problems. A difference without its interval means nothing; and where shuffling the latents
# between problems changes nothing, the table says that they are ignored.
#
# In the smoke run LoRA and LoRA + TRM have to answer at once, without writing steps, after a minute or two of training:
# expect them far below the base, which writes its steps.

# %%
comparison = report_comparison(results, FOLDER, baseline="LoRA", part="dev", seed=SEED, split=split)
display(Markdown(comparison.to_markdown()))
display(Image(str(FOLDER / "comparison.png"), width=800, metadata={"alt": "accuracy of every arm with its interval"}))

# %% [markdown]
# ### Curves
#
# From the runs' own `metrics.csv`. The lower panel shows how much the latents differ between problems: at 0 they are
# the same for every problem, a soft prompt and no more.

# %%
curves = {
    name: FOLDER / folder / "logs" / "metrics.csv" for name, folder in (("LoRA", "lora"), ("LoRA + TRM", "lora_trm"))
}
plot_losses({name: path for name, path in curves.items() if path.is_file()}, FOLDER / "losses.png")
display(Image(str(FOLDER / "losses.png"), width=800, metadata={"alt": "losses and variation of the latents by step"}))

# %% [markdown]
# ### When would it stop thinking?
#
# After every supervision step the halting head says how likely this is a step to stop at, and the model can be asked
# to answer from there. Under `target = "answer"` that is where the whole answer is right; under `"steps"` it is where
# the loss of the solution is within 1% of the best step's, which says nothing about the answer being right.

# %%
if tuned.use_trm:
    question = shown[0]["question"]
    ids, mask = encode_prompts(
        tuned.encoder, [question], max_new_tokens=64, context_length=tuned.config.max_position_embeddings
    )
    with torch.no_grad():
        thoughts = tuned.think(ids.to(device), mask.to(device))
    print(f"{question}   (right: {gold_answer(shown[0]['answer'])})\n{tuned.num_latents} latents")
    stops = {"answer": "the answer is right", "steps": "the loss is within 1% of the best step's"}[checked.target]
    print(f"percentages: how likely {stops} after this step, as the halting head sees it")
    for step, thought in enumerate(thoughts, start=1):
        if thought.halting_logit is not None:
            chance = float(torch.sigmoid(thought.halting_logit[0]))
            text = tuned.generate_with_thinking(question, n_steps=step)
            print(f"step {step}: {chance:6.1%} {'█' * round(12 * chance):12} answers {extract_answer(text)}")

# %% [markdown]
# ## Try your own problems

# %%
my_question = "Tom has 4 bags with 6 pears in each bag. He eats 5 of the pears. How many pears does Tom have now?"  # @param {type:"string"}
answer = tuned.generate_with_thinking(my_question)
print(answer.strip())

# %% [markdown]
# ## Save, reload, Drive, Hub
#
# A saved model is the adapter, the reasoner, the tokenizer and its configuration; the base is not copied. With
# `USE_DRIVE` it lies on Drive already. Reloaded, it answers exactly as before, and takes the place of the one that was
# trained: all cells above that ask `tuned` can be run again.

# %%
saved = FOLDER / "model"
tuned.config.notes = read_config(run_folder / "model").notes  # on what it was trained, for how long: for its card
tuned.save_pretrained(saved)
trainer = model = tuned = None
free_memory()
tuned = SmolLMv3WithTRM.from_pretrained(saved, dtype=base_dtype, device=device)
assert tuned.generate_with_thinking(my_question) == answer, "the reloaded model answers otherwise"
size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
print(f"{saved}: {size / 1e6:.0f} MB, and the same answer again")
print(gpu_memory())

# %% [markdown]
# ### Push to the Hub
#
# Set `PUSH_TO` to `your-name/your-model` and `HF_TOKEN` to a token that may write. The model's card states what was
# measured here. The repository is private until you open it.

# %%
if PUSH_TO and os.environ.get("HF_TOKEN"):
    for arm, result in results.items():
        add_evaluation(saved, f"dev, {arm}", result)
    print(f"pushed to https://huggingface.co/{PUSH_TO}: {', '.join(push_model(saved, PUSH_TO))}")
else:
    print("not pushed: PUSH_TO is empty" if not PUSH_TO else "not pushed: HF_TOKEN is not set")
