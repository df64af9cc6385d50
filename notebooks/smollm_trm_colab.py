# %% [markdown]
# # Teach SmolLM3 to reason in latent space
#
# <!-- badge -->
#
# A language model thinks by writing words. Here SmolLM3-3B gets a second way: at `<think>` a **Tiny Recursive Model**
# (TRM) reads its hidden states of the question, compresses them to M *latents*, refines those recursively, and hands them
# back in place of words. SmolLM3 writes its answer from there. LoRA adapts SmolLM3, PyTorch Lightning trains, and GSM8K
# (grade-school maths) judges.
#
# ```
# SmolLM3  Question: Tom has 4 bags of 6 pears ... Answer: <think>
# TRM      [latent 1] [latent 2] ... [latent M]
# SmolLM3  </think> #### 19
# ```
#
# **How to use it.** *Runtime → Change runtime type → T4 GPU*, then *Runtime → Run all*. Nothing has to be edited, no
# key is needed, nothing asks a question. After about an hour (estimated) a table compares, on the same problems, the
# **base** model, **LoRA** alone and **LoRA + TRM**, and says in words whether the latents are used.
#
# **What a run can show, and what not.** `quick` trains to answer *at once*, without writing steps: only there must a
# latent carry what would otherwise be written. It shows whether LoRA + TRM answers more problems than LoRA alone, and
# whether the latents matter: every problem is also answered from *another* problem's latents. It cannot show that
# latents beat written steps (the base writes its steps and will be far ahead), and one run of one seed on a few hundred
# problems leaves an interval of several points. `full` writes its steps, where latents have little left to do.
#
# <!-- contents -->

# %% [markdown]
# ## Setup
#
# The first cell installs what is missing (on Colab: PyTorch Lightning) and leaves torch and numpy as they are, so no
# restart is needed.

# %% cellView="form"
# @title Install what is missing
import os
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata, util
from pathlib import Path

NEEDED = {"torch": "2.6", "transformers": "5.15", "peft": "0.20", "datasets": "4.0", "pytorch-lightning": "2.6",
          "matplotlib": "3.9", "scipy": "1.13"}  # fmt: skip
# (torch 2.6 has all that is called here, none of it was run below 2.13; the whole package wants 2.11)
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
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the cores to others
warnings.filterwarnings("ignore", message="IProgress not found")  # downloads without ipywidgets
warnings.filterwarnings("ignore", category=FutureWarning)
print("installed:" if missing else "nothing to install", *missing)

# %% [markdown]
# ### Settings
#
# `RUN` is the one switch:
#
# | RUN | what it trains | on |
# | --- | --- | --- |
# | `smoke` | a tiny twin of SmolLM3, from scratch, on generated word problems: minutes, to see the whole way once | a CPU |
# | `quick` | SmolLM3-3B on all 5,978 training problems once, to answer at once from 16 latents; about an hour | a T4 |
# | `full` | the documents' configuration: three epochs, 256 latents, steps written; may span several sessions | a T4 |
#
# What they stand for, setting by setting; `default` in the form below means this:
#
# <!-- runs -->
#
# What they need on a T4, which has 14.6 GiB. Nothing of it was measured on one:
#
# <!-- needs -->
# <!-- /needs -->

# %% cellView="form"
# @title Settings
RUN = "quick"  # @param ["smoke", "quick", "full"]
# @markdown **What is trained**
model_name = "default"  # @param ["default", "HuggingFaceTB/SmolLM3-3B-Base"] {allow-input: true}
use_trm = True  # @param {type:"boolean"}
reasoner = "trm"  # @param ["trm", "compressor", "static", "pause"]
num_latents = "default"  # @param ["default", "8", "16", "64", "128", "256", "512"] {allow-input: true}
trm_kwargs = "default"  # @param ["default", "{'n_latent_steps': 6, 'n_deep_recursions': 3, 'n_supervision_steps': 8}", "{'preset': 'paper'}"] {allow-input: true}
target = "default"  # @param ["default", "answer", "steps"]
# @markdown Own problems in GSM8K's place: a JSON list, JSONL or CSV with `question` and `answer`, uploaded to Colab's files
dataset_path = ""  # @param {type:"string"}
max_samples = "default"  # @param ["default", "500", "1000", "5978"] {allow-input: true}
max_length = "default"  # @param ["default", "256", "512", "768"] {allow-input: true}
# @markdown **How**
batch_size = "default"  # @param ["default", "1", "2", "4", "8", "16"] {allow-input: true}
accumulate_grad_batches = "default"  # @param ["default", "1", "2", "4", "8", "16"] {allow-input: true}
num_epochs = "default"  # @param ["default", "1", "3", "10"] {allow-input: true}
learning_rate = "default"  # @param ["default", "1e-4", "2e-4", "5e-4"] {allow-input: true}
trm_learning_rate = "default"  # @param ["default", "2e-4", "5e-4", "1e-3"] {allow-input: true}
val_check_interval = "default"  # @param ["default", "0.1", "0.25", "1.0"] {allow-input: true}
precision = "auto"  # @param ["auto", "16-mixed", "bf16-mixed", "32-true"]
devices = 1  # @param {type:"integer"}
# @markdown **Where it goes**
USE_DRIVE = False  # @param {type:"boolean"}
RESUME = True  # @param {type:"boolean"}
wandb_project = ""  # @param {type:"string"}
wandb_name = ""  # @param {type:"string"}

# %% [imports]
import ast
import gc
import logging
import textwrap

from IPython.display import HTML, Image
from transformers import TextStreamer

# %% [markdown]
# ### GPU check

# %% cellView="form"
# @title Is there a GPU?
logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout, force=True)
logging.getLogger(__name__).setLevel(logging.INFO)  # the library below: sample answers, warnings, where a run goes on
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
peaks = [0.0]


def gpu_memory() -> str:
    """What the GPU holds now, and the most it held."""
    if device.type == "cpu":
        return "on the CPU"
    free, whole = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_allocated()
    return f"GPU memory: {(whole - free) / 2**30:.1f} of {whole / 2**30:.1f} GiB in use, peak {peak / 2**30:.1f} GiB"


def free_memory() -> None:
    """Give back what nothing refers to any more; an error's traceback would hold on to a whole model."""
    sys.last_traceback = sys.last_value = sys.last_exc = None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        peaks.append(torch.cuda.max_memory_allocated() / 2**30)
        torch.cuda.reset_peak_memory_stats()


if device.type == "cuda":
    properties = torch.cuda.get_device_properties(0)
    major, minor = torch.cuda.get_device_capability()
    kind = "bf16" if major >= 8 else "fp16, with fp32 for what is trained and between the blocks"
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
# gradient checkpointing, small batches.

# %% cellView="form"
# @title The numbers of the three runs
RUNS = {
    "smoke": {
        "model_name": "tiny", "num_latents": 8, "target": "answer", "max_steps": 600, "num_epochs": 1000,
        "batch_size": 32, "eval_batch_size": 128, "accumulate_grad_batches": 1, "max_length": 512,
        "max_samples": 19_200, "learning_rate": 2e-3, "trm_learning_rate": 3e-3, "warmup_fraction": 0.3,
        "trm_kwargs": {"n_latent_steps": 2, "n_deep_recursions": 1, "n_supervision_steps": 1, "soft_words": True},
        "reasoner_steps": 300, "lora_kwargs": {"dropout": 0.0}, "patience": None, "val_check_interval": 200, "save_every_n_steps": 300,
    },
    "quick": {
        "model_name": "HuggingFaceTB/SmolLM3-3B", "num_latents": 16, "target": "answer", "num_epochs": 1,
        "batch_size": 8, "eval_batch_size": 16, "accumulate_grad_batches": 1, "max_length": 512,
        "learning_rate": 2e-4, "trm_learning_rate": 1e-3, "gradient_checkpointing": True,
        "reasoner_steps": 1000, "trm_kwargs": {"soft_words": True},
        "val_check_interval": 0.2, "save_every_n_steps": 50,
    },
    "full": {
        "model_name": "HuggingFaceTB/SmolLM3-3B", "num_latents": 256, "target": "steps", "num_epochs": 3,
        "batch_size": 2, "eval_batch_size": 4, "accumulate_grad_batches": 4, "max_length": 512,
        "learning_rate": 2e-4, "trm_learning_rate": 1e-3, "gradient_checkpointing": True,
        "val_check_interval": 0.25, "save_every_n_steps": 200,
    },
}  # fmt: skip
AROUND = {  # what surrounds the training
    "smoke": {
        "word_problems": 40_000, "base_steps": 1000, "dev": 256, "compared": 1000, "at_once": 128,
        # LoRA alone: its own best rate (docs/log.md), and as many steps as the TRM alone and LoRA + TRM make together
        "lora_alone": {"learning_rate": 3e-3, "warmup_fraction": 0.1, "max_steps": 900},
    },
    "quick": {"dev": 256, "compared": 300, "at_once": 32},
    "full": {"dev": 512, "compared": None, "at_once": 32},
}  # fmt: skip
SEED = 42


def of_the_form(name, value):
    """What a field says, numbers and dictionaries read as Python; None where it leaves the setting to RUN."""
    if value in ("", "default"):
        return None
    if name in ("model_name", "dataset_path", "wandb_project", "wandb_name"):
        return value
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        return value


form = {
    "model_name": model_name, "use_trm": use_trm, "reasoner": reasoner, "num_latents": num_latents,
    "trm_kwargs": trm_kwargs, "target": target, "dataset_path": dataset_path, "max_samples": max_samples,
    "max_length": max_length, "batch_size": batch_size, "accumulate_grad_batches": accumulate_grad_batches,
    "num_epochs": num_epochs, "learning_rate": learning_rate, "trm_learning_rate": trm_learning_rate,
    "val_check_interval": val_check_interval, "precision": precision, "devices": devices,
    "wandb_project": wandb_project, "wandb_name": wandb_name,
}  # fmt: skip
given = {name: said for name, value in form.items() if (said := of_the_form(name, value)) is not None}
chosen = {**RUNS[RUN], **given}
of_run = RUNS[RUN].get("trm_kwargs", {})
if reasoner not in ("trm", "compressor"):
    of_run = {}
elif reasoner == "compressor":
    of_run = {name: value for name, value in of_run.items() if name == "soft_words"}  # the others are the TRM's
if isinstance(given.get("trm_kwargs", {}), dict):
    chosen["trm_kwargs"] = {**of_run, **given.get("trm_kwargs", {})}
if chosen["target"] != "answer" or reasoner not in ("trm", "compressor"):
    chosen.pop("reasoner_steps", None)  # nothing to say alone
around = AROUND[RUN]

# %% [markdown]
# ### Where results go
#
# A free session ends without notice. With `USE_DRIVE` everything is kept on Google Drive, and with `RESUME` the same
# *Run all* later goes on from the last checkpoint and the last answer. A run's folder is named by what it is: with another
# setting a new run begins beside the old one, and with the old setting the old run goes on.

# %%
outputs = Path("outputs")
if USE_DRIVE and IN_COLAB:
    from google.colab import drive

    drive.mount("/content/drive")
    outputs = Path("/content/drive/MyDrive/smollm-trm")
FOLDER = outputs / RUN
print(f"RUN = {RUN!r}, results in {FOLDER}")

# %% [markdown]
# ## Login (optional)
#
# A secret (the key symbol at Colab's left edge) or environment variable named `WANDB_API_KEY` lets Weights & Biases
# show the curves if `wandb_project` is set; `HF_TOKEN` lets the result be pushed to the Hub. Without them nothing is
# missing, and nothing asks.


# %% cellView="form"
# @title Keys, if there are any
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
# ## Engine room
#
# All code that the story below calls: the library `smollm_trm`, taken over by a build, a folded section for each of its
# subpackages and a cell for each module. It defines and does nothing, so you can read on without opening it.
#
# <!-- map -->

# %% [library]
# ground: What everything stands on: settings checked by name, files written whole, progress bars.
# data: Problems, from files to batches of token ids. Knows no model.
# models: The tiny network, the recursion, the reasoners, and SmolLM3 with a latent span. Knows no dataset.
# training: The Lightning module, what watches a run, checkpoints, and how a run goes on.
# evaluation: Answers graded, arms compared, pictures drawn.
# all of it in one call: `train_gsm8k`.
# own: REASONERS

# %%
# @title The reasoners to choose from; one of your own joins them by a line
REASONERS = {"trm": HiddenStateTRM, "compressor": CompressedReader, "static": StaticLatents, "pause": PauseTokens}

# %% [markdown]
# ## GSM8K
#
# 7,473 training problems and 1,319 official test problems. The training problems are cut by a seeded shuffle:
#
# - `gsm8k_train`: 80% to train on,
# - `gsm8k_test`: the other 20%. It may pick the checkpoint, so every score on it is called **dev**,
# - `gsm8k_final_test`: the official test set, for the final evaluation only.
#
# In the smoke run a generator writes word problems as files in GSM8K's format, loaded and split by the very same code.

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
# A `LatentAttentionCompressor` turns hidden states, however many, into M latents. `RecursiveReasoningBase` calls one
# `TinyRecursiveNetwork` of a few `TransformerBlock`s again and again: n times it updates a latent z, then the answer y;
# T such rounds are a supervision step. `HiddenStateTRM` is the whole. Here it thinks about made-up states:

# %%
toy = build_reasoner("trm", {"n_supervision_steps": 4}, num_latents=16, hidden_size=256, depth=3)
states, real = [torch.randn(2, 40, 256) for _ in range(3)], torch.ones(2, 40)
with torch.no_grad():
    steps = toy(states, real, return_all_steps=True)
print(
    f"{len(states)} layers of states {tuple(states[0].shape)} -> latents {tuple(steps[-1].shape)}, {len(steps)} times"
)
for at, (before, now) in enumerate(zip(steps, steps[1:], strict=False), start=2):
    print(f"step {at} moves them by {float((now - before).norm() / before.norm()):.1%}")

# %% [markdown]
# ## SmolLM integration
#
# The latents stand in *slots*, ordinary tokens at ordinary positions, as pictures do in vision-language models. So
# `SmolLMv3WithTRM` is an ordinary Hugging Face model: `generate()`, caches, PEFT and TRL work as they are. LoRA adapts
# SmolLM3's attention; the base itself stays frozen.

# %%
if chosen["model_name"] == "tiny":
    tokenizer = train_tiny_tokenizer([f"{row['question']}\n{row['answer']}" for row in gsm8k_train[:1000]])
else:
    tokenizer = AutoTokenizer.from_pretrained(chosen["model_name"])
encoder = PromptEncoder(tokenizer=tokenizer, num_latents=chosen["num_latents"], target=chosen["target"])
slots = encoder.slot_token * encoder.num_latents
print(encoder.prompt_text(gsm8k_train[0]["question"]).replace(slots, f" [slot x {encoder.num_latents}] "))

# %% [markdown]
# ## Dataset
#
# One encoded example. Loss is taken on the completion and its end-of-text token alone; question, slots and padding are
# masked (-100).

# %%
example = GSM8KDataset(gsm8k_train[:8], encoder=encoder)[[0]]
ids, labels = example["input_ids"][0], example["labels"][0]
masked = tokenizer.decode(ids[labels == IGNORED_LABEL]).replace(slots, f" [slot x {encoder.num_latents}] ")
print(f"{len(ids)} tokens, {int((labels != IGNORED_LABEL).sum())} of them supervised\n")
print(f"masked:     {masked!r}\nsupervised: {tokenizer.decode(labels[labels != IGNORED_LABEL])!r}")

# %% [markdown]
# ## Lightning module
#
# `SmolLMTRMLightningModule` supervises one step of the recursion at a time: each optimizer step draws a step k, the
# steps before it run without gradient, one loss and one backward pass follow. That is unbiased for the mean over all
# steps, at the price of one. A small head learns beside it whether the answer is right by now (*halting*). LoRA and TRM
# have learning rates of their own, with a warm-up and a cosine.

# %% [markdown]
# ## Training
#
# `train_gsm8k(**config)` is all of it: data, model, Lightning's trainer, an average of the weights (which is what is
# validated and saved), checkpoints that are whole or not there. Killed at any moment and started again, it ends with the
# same weights. At every validation two dev problems are answered, so that you can watch it learn.

# %% [markdown]
# ## Evaluation
#
# `evaluate_gsm8k` lets the model answer in batches, greedily, and reads the final number: what stands after `####`,
# else after "the answer is", else the last number of what was written.

# %%
for text in ("4*6=24 pears.\n24-5=19 pears.\n#### 19", "So the answer is $1,234.50.", "I am not sure."):
    print(f"{text!r:60} -> {extract_answer(text)}")

# %% [markdown]
# ## Configuration
#
# The settings of `train_gsm8k` by their names, from `RUN` and from the form. They are checked here, before
# anything expensive starts: a wrong name or value is one line that says what would be right. Change what you like in a
# cell below this one, as in `config["learning_rate"] = 1e-4` or `config["dataset_path"] = "problems.json"`, or write a
# `config` of your own, with `train_dataset` and `test_dataset` if you have rows.

# %%
config = {
    "data_dir": data_dir,  # the rows and the split are those above: loaded and cut by the same code
    "split_seed": SEED,
    "max_dev_samples": around["dev"],  # of the 20% part: the dev loss picks the checkpoint
    "output_dir": str(FOLDER),
    "resume": "auto" if RESUME else "never",
    "sample_answers": 2,
    "seed": SEED,
    **chosen,
}
checked = settings_from(TrainSettings, config, "config")
check_fits(checked)
values = {name: repr(value) for name, value in vars(checked).items()}
print("\n".join(f"{name:24} {values.pop(name)}" for name in config if name in values))
print(textwrap.fill("As usual: " + ", ".join(f"{name} {value}" for name, value in values.items()), width=80))

# %% [markdown]
# ## Train
#
# First the base as it is, then LoRA alone, then LoRA + TRM, all on the same problems, all around one base that is loaded
# once.

# %% cellView="form"
# @title What will be trained and judged, and where it lies
rows = {name: config.get(name) for name in ("train_dataset", "test_dataset")}
settings = {name: value for name, value in config.items() if name not in rows}
checked = settings_from(TrainSettings, settings, "config")
check_fits(checked)
judged_on = gather_splits(checked, **rows).gsm8k_test  # the dev rows of what is trained on, whatever that is
fingerprint = gather_splits(checked, **rows).fingerprint
shown = judged_on[:3]
tuned_name = "LoRA + TRM" if checked.reasoner == "trm" else f"LoRA + {checked.reasoner}"
arms: dict[str, dict] = {}


def run_settings(name: str, **changes) -> dict:
    """The settings of one arm, with a folder named by what it is."""
    own = {**settings, **changes}
    identity = run_identity(settings_from(TrainSettings, own, "config"), split=fingerprint)
    return {**own, "output_dir": str(Path(checked.output_dir) / f"{name}-{identity}")}


def judge(name: str, judged: SmolLMv3WithTRM, folder: str) -> None:
    """Answer the dev problems; where there are latents, also with those of other problems."""
    answers = Path(folder) / f"answers-{around['compared']}-{around['at_once']}"
    for stale in answers.glob("*.jsonl") if checked.resume == "never" else ():
        stale.unlink()
    free_memory()
    options = {"max_samples": around["compared"], "batch_size": around["at_once"]}
    found = evaluate_arm(name, judged, judged_on, answers, **options)
    arms.update(found)
    for arm, result in found.items():
        low, high = result["interval"]
        print(f"{arm}: dev accuracy {result['accuracy']:.1%} [{low:.1%}, {high:.1%}]; {gpu_memory()}")


def marked(text: str, row: dict) -> str:
    """What was written, with a mark: is its answer right?"""
    return f"{'✓' if is_correct(text, row['answer']) else '✗'} {text.strip()[:600]}"


print(f"{fingerprint[:16]}: {len(judged_on)} dev problems, of which {around['compared'] or 'all'} are compared")

# %% [markdown]
# ### The base
#
# It writes its solution step by step, whatever `target` is. In the smoke run it is a tiny SmolLM3 that first learns
# that from scratch.

# %%
twin = checked.model_name == "tiny"
if twin:
    steps = around["base_steps"]
    training = run_settings(
        "base", base_training="full", use_trm=False, target="steps", learning_rate=4e-3, warmup_fraction=0.1,
        max_steps=steps, max_samples=steps * checked.batch_size, val_check_interval=steps // 2,
        save_every_n_steps=steps // 2,
    )  # fmt: skip
    trainer, model = train_gsm8k(**rows, **training)
    settings["model_name"] = str(Path(training["output_dir"]) / "model")

# %% [markdown]
# It is loaded once. On a GPU without bf16, such as a T4, it computes in fp16, whose largest number is 65,504; therefore
# the stream between its blocks is kept in fp32. The longest problems, with latents, show whether that is enough.


# %%
def stays_finite() -> bool:
    """Whether the logits of the longest problems are numbers, without latents and with those of a fresh reasoner."""
    fresh = SmolLMv3WithTRM.from_base(base.unload(), **{**checked.model_config(), "base_training": "frozen"})
    longest = sorted(judged_on, key=lambda row: -len(row["question"]))[:4]
    finite = []
    for judged in (base, fresh.eval()):
        batch = collate_examples([judged.encoder.encode(row) for row in longest], padding_token_id(judged.tokenizer))
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits = judged(**inputs, logits_to_keep=supervised_columns(batch["labels"])).logits
        finite.append(bool(logits.isfinite().all()))
    return all(finite)


trainer = model = tuned = base = None  # gives back what an earlier run left on the GPU
free_memory()
precision_name, base_dtype = pick_precision(checked.precision)
base = SmolLMv3WithTRM.from_base(
    settings["model_name"], reasoner=None, base_training="frozen", think=twin, target="steps", dtype=base_dtype
)  # the twin was trained with an empty think block; SmolLM3 is asked in its own way, without
base.to(device).eval()
if not (finite := stays_finite()) and base_dtype == torch.float16:
    print(f"{settings['model_name']} overflows in fp16 on its longest problems: it goes on in bf16, slower.")
    settings["precision"] = precision_name = "bf16-mixed"
    base_dtype = torch.bfloat16
    base.to(base_dtype)
    finite = stays_finite()
if not finite:
    reason = f"gives no finite numbers in {precision_name}: choose another model or precision"
    raise FloatingPointError(f"{settings['model_name']} {reason}")
print(f"{sum(p.numel() for p in base.parameters()):,} parameters, precision {precision_name}; {gpu_memory()}")

# %%
before = base.generate_with_thinking([row["question"] for row in shown])
for row, text in zip(shown, before, strict=True):
    print(f"question: {row['question']}\nwritten:  {marked(text, row)}\nright:    {gold_answer(row['answer'])}\n")
untuned = TrainSettings(model_name=settings["model_name"], precision=precision_name, use_trm=False)  # no setting counts
judge("base", base, str(Path(checked.output_dir) / f"base-{run_identity(untuned, split=fingerprint)}"))

# %% [markdown]
# ### LoRA alone

# %%
training = run_settings("lora", use_trm=False, **around.get("lora_alone", {}))
trainer, model = train_gsm8k(**rows, **training, base=base.unload())
judge("LoRA", model.model, training["output_dir"])

# %% [markdown]
# ### LoRA + TRM
#
# With `reasoner_steps` the TRM comes first, alone: SmolLM3 reads every question once, and the TRM learns to say what the
# steps of the solution come to, in SmolLM3's own words. On a real base that is what makes LoRA listen to latents later:
# a TRM that begins beside LoRA has nothing to say until LoRA has learned to do without it. In `smoke` LoRA alone makes as
# many steps altogether; in `quick` what the TRM does alone comes on top, and takes minutes that LoRA does not get.

# %%
if checked.use_trm:
    trainer = model = None
    free_memory()
    training = run_settings(tuned_name.lower().replace(" + ", "_"))
    trainer, model = train_gsm8k(**rows, **training, base=base.unload())
else:
    tuned_name = "LoRA"
tuned = model.model  # a SmolLMv3WithTRM; what follows asks this one
run_folder = Path(trainer.default_root_dir)
print(gpu_memory())

# %% [markdown]
# ### Parameters by part


# %% cellView="form"
# @title Count
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
after = tuned.generate_with_thinking([row["question"] for row in shown])
for row, was, now in zip(shown, before, after, strict=True):
    print(f"question: {row['question']}\nbefore:   {marked(was, row)}\nafter:    {marked(now, row)}")
    print(f"right:    {gold_answer(row['answer'])}\n")
if tuned.use_trm:
    judge(tuned_name, tuned, str(run_folder))

# %% [markdown]
# ## Official evaluation (optional)
#
# `OFFICIAL_TEST` answers the official test problems: once, at the very end, when nothing will be changed any more.

# %%
OFFICIAL_TEST = False  # @param {type:"boolean"}
if OFFICIAL_TEST or RUN == "smoke":
    final_results = evaluate_gsm8k(
        tuned, gsm8k_final_test, batch_size=around["at_once"],
        predictions_path=run_folder / f"official-test-{around['at_once']}.jsonl",
    )  # fmt: skip
    low, high = final_results["interval"]
    print(f"test accuracy {final_results['accuracy']:.1%} [{low:.1%}, {high:.1%}] on {final_results['total']} problems")
else:
    print("OFFICIAL_TEST is off")

# %% [markdown]
# ## Comparison
#
# All arms on the same dev problems. A difference without its interval means nothing; and where shuffling the latents
# between problems changes nothing, it says that they are ignored. Under `target = "answer"` LoRA and LoRA + TRM answer
# at once: expect them below the base, which writes its steps.

# %%
comparison = report_comparison(
    arms, run_folder, baseline="LoRA", part="dev", seed=SEED, split=trainer.datamodule.splits.summary
)
figures = read_config(run_folder / "model").notes["training"]
minutes = (figures["seconds"] + sum(arm["seconds"] for arm in arms.values())) / 60
speed = arms[tuned_name]["tokens_per_second"]
where = f"peak {max(peaks):.1f} GiB" if device.type == "cuda" else "no GPU here: this is the smoke run on the CPU"
headline = (
    f"{RUN}: {'a tiny twin' if twin else checked.model_name}, {figures['train_rows']} problems, "
    f"{figures['optimizer_steps']} steps, {minutes:.0f} min for {tuned_name} and all answers, "
    f"{speed:.0f} tokens/s written, {where}"
)
display(HTML(comparison_html(comparison, headline=headline)))
display(
    Image(str(run_folder / "comparison.png"), width=800, metadata={"alt": "accuracy of every arm with its interval"})
)

# %% [markdown]
# ### Curves
#
# From the runs' own `metrics.csv`. The lower panel shows how much the latents differ between problems: at 0 they are
# the same for every problem, a soft prompt and no more.

# %%
lora_folder = Path(run_settings("lora", use_trm=False, **around.get("lora_alone", {}))["output_dir"])
curves = {name: folder / "logs" / "metrics.csv" for name, folder in (("LoRA", lora_folder), (tuned_name, run_folder))}
plot_losses(curves, run_folder / "losses.png")
display(
    Image(str(run_folder / "losses.png"), width=800, metadata={"alt": "losses and variation of the latents by step"})
)

# %%
SHOW_TENSORBOARD = False  # @param {type:"boolean"}
if SHOW_TENSORBOARD:
    get_ipython().run_line_magic("load_ext", "tensorboard")
    get_ipython().run_line_magic("tensorboard", f"--logdir {FOLDER}")

# %% [markdown]
# ### When would it stop thinking?
#
# After every supervision step the halting head says how likely this is a step to stop at. Under `target = "answer"` that
# is where the whole answer is right; under `"steps"` it is where the loss of the solution is within 1% of the best
# step's, which says nothing about the answer being right. A head that knows lifts the blue boxes above the orange ones.

# %%
grades = arms[tuned_name]["correct_by_problem"]
chances = halting_probabilities(tuned, [row["question"] for row in judged_on[: len(grades)]])
if chances:
    plot_halting(chances, grades, run_folder / "halting.png")
    display(Image(str(run_folder / "halting.png"), width=500, metadata={"alt": "halting probability by step"}))
    question = shown[0]["question"]
    for step in range(1, len(chances[0]) + 1):
        text = tuned.generate_with_thinking(question, n_steps=step)
        print(f"step {step}: halting {chances[0][step - 1]:.1%}, answers {extract_answer(text)}")
    print(f"(right: {gold_answer(shown[0]['answer'])})")

# %% [markdown]
# ### What do the latents read?
#
# Each row is a latent, each column a word of the question: how much of the latent's attention goes there when the
# compressor reads the hidden states.

# %%
reading = attention_by_word(tuned, shown[0]["question"]) if tuned.use_trm else None
if reading:
    plot_attention(*reading, run_folder / "reading.png")
    display(Image(str(run_folder / "reading.png"), width=1000, metadata={"alt": "attention of the latents by word"}))

# %% [markdown]
# ## Try your own problems

# %%
my_question = "Tom has 4 bags with 6 pears in each bag. He eats 5 of the pears. How many pears does Tom have now?"  # @param {type:"string"}
streamer = TextStreamer(tuned.tokenizer, skip_prompt=True, skip_special_tokens=True)
answer = tuned.generate_with_thinking(my_question, streamer=streamer)

# %% [markdown]
# ## Save, reload, Drive, Hub
#
# A saved model is the adapter, the reasoner, the tokenizer and its configuration; the base is not copied. With
# `USE_DRIVE` it lies on Drive already. The reloaded one takes the place of the one that was trained: all cells above
# that ask `tuned` (or `model.model`) can be run again.

# %%
saved = FOLDER / "model"
tuned.config.notes = read_config(run_folder / "model").notes  # on what it was trained, for how long: for its card
tuned.save_pretrained(saved)
tuned = model.model = None
free_memory()
tuned = model.model = SmolLMv3WithTRM.from_pretrained(saved, model_name=base.unload(), dtype=base_dtype, device=device)
same = tuned.generate_with_thinking(my_question) == answer
size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
print(f"{saved}: {size / 1e6:.0f} MB, reloaded; {'the same answer again' if same else 'another answer, see below'}")
if not same:
    print("In half precision two next tokens can be equally likely, and which one comes first is chance.")
print(gpu_memory())

# %% [markdown]
# ### One folder with everything
#
# For a machine without the base: the adapter merged into it, all in 16 bits (about 6 GB for SmolLM3-3B).

# %%
EXPORT_MERGED = False  # @param {type:"boolean"}
if EXPORT_MERGED or RUN == "smoke":
    export_merged(tuned, FOLDER / "merged", dtype=torch.float16 if base_dtype == torch.float32 else base_dtype)
    size = sum(path.stat().st_size for path in (FOLDER / "merged").rglob("*") if path.is_file())
    print(f"{FOLDER / 'merged'}: {size / 1e6:.0f} MB")
else:
    print("EXPORT_MERGED is off")

# %% [markdown]
# ### Push to the Hub
#
# Set `PUSH_TO` to `your-name/your-model` and `HF_TOKEN` to a token that may write. The model's card states what was
# measured here. The repository is private until you open it.

# %%
PUSH_TO = ""  # @param {type:"string"}
if PUSH_TO and os.environ.get("HF_TOKEN"):
    for arm, result in arms.items():
        add_evaluation(saved, f"dev, {arm}", result)
    print(f"pushed to https://huggingface.co/{PUSH_TO}: {', '.join(push_model(saved, PUSH_TO))}")
else:
    print("not pushed: PUSH_TO is empty" if not PUSH_TO else "not pushed: HF_TOKEN is not set")
