# %% [markdown]
# # Coconut: a chain of continuous thought, stage by stage
#
# A model that has learnt to write its steps learns to think them: in every stage one step more gives way to two *latents*,
# each of them the model's own last hidden state, fed back as the next embedding. At the end no step is written at all.
#
# ```
# stage 0   question <start> <end> step 1, step 2, step 3 ### answer
# stage 1   question <start> z z <end> step 2, step 3 ### answer
# stage 2   question <start> z z z z <end> step 3 ### answer
# ```
#
# (Hao et al. 2024, *Training large language models to reason in a continuous latent space*.) First the chain, then
# Coconut from there, then both on the same problems; and Coconut once more with the thoughts of *another* problem,
# which tells whether its answers come from them.
#
# **How to use it.** *Runtime → Change runtime type → T4 GPU*, then *Runtime → Run all*. Nothing has to be edited, no key
# is needed. Without a GPU a tiny model learns word problems on the CPU, in minutes. Everything the notebook needs is in
# it: the folded cells are the library `smollm_trm`, taken over by a build.

# %% [markdown]
# ## Setup

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
# | RUN | what it trains | on |
# | --- | --- | --- |
# | `smoke` | a tiny model from scratch, on generated word problems: to see that all works | a CPU, minutes |
# | `quick` | GPT-2 on GSM8K, steps as its calculator annotations | a T4 |
#
# Expect little of `quick`: the published 34% (chain: 43%) come from 385,000 augmented problems, GSM8K has 6,000.

# %% cellView="form"
# @title Settings
RUN = "quick"  # @param ["smoke", "quick"]
c_thought = 2  # @param {type:"integer"}
max_latent_stage = 2  # @param {type:"integer"}
RESUME = True  # @param {type:"boolean"}

# %% [imports]
from IPython.display import Image, Markdown

# %%
logging.basicConfig(level=logging.WARNING, format="%(message)s")
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if device.type == "cpu" and RUN != "smoke":
    print(f"No GPU here, and RUN = {RUN!r} needs one: this is RUN = 'smoke' instead.")
    RUN = "smoke"
RUNS = {
    "smoke": {
        "shared": {"model_name": "tiny", "batch_size": 32, "eval_batch_size": 128, "learning_rate": 4e-3},
        "epochs": {"chain": 3, "stage": 1}, "word_problems": 9_000, "compared": 200,
    },
    "quick": {
        "shared": {"model_name": "openai-community/gpt2", "batch_size": 32, "eval_batch_size": 32, "learning_rate": 1e-4},
        "epochs": {"chain": 8, "stage": 2}, "word_problems": 0, "compared": None,
    },
}  # fmt: skip
chosen = RUNS[RUN]
FOLDER = Path("outputs") / f"coconut_{RUN}"
SEED = 42
print(f"RUN = {RUN!r} on {device.type}, results in {FOLDER}")

# %% [markdown]
# ## Engine room
#
# All of the library that the cells below call, folded: a section for each of its subpackages.
#
# <!-- map -->

# %% [library]
# ground: What everything stands on: settings checked by name, files written whole, progress bars.
# data: Problems, their curriculum, and batches of token ids. Knows no model.
# models: The reasoners, and a decoder with a latent span. Knows no dataset.
# training: The Lightning module, what watches a run, checkpoints, and how a run goes on.
# evaluation: Answers graded, arms compared, pictures drawn.
# all of it in one call: `train_gsm8k`.
# own: REASONERS

# %%
REASONERS = {"coconut": Coconut}

# %% [markdown]
# ## Problems

# %%
data_dir = None  # None: the folder in the environment variable GSM8K_DIR, else the Hub
if RUN == "smoke":
    easy = WordProblemSettings(max_steps=2, max_number=10, max_value=30, distractor_rate=0.0)
    data_dir = str(FOLDER / "data")
    write_word_problems(data_dir, train=chosen["word_problems"], test=300, seed=SEED, settings=easy)
splits = load_gsm8k(data_dir, seed=SEED)
shown = splits.gsm8k_train[0]
print(f"{len(splits.gsm8k_train)} train, {len(splits.gsm8k_test)} dev\n\n{shown['question']}\n{shown['answer']}")

# %% [markdown]
# ## The curriculum

# %% [markdown]
# ### One problem in every stage
#
# Loss is taken on what stands behind the bar.

# %%
if chosen["shared"]["model_name"] == "tiny":
    tokenizer = train_tiny_tokenizer([f"{row['question']}\n{row['answer']}" for row in splits.gsm8k_train[:1000]])
else:
    tokenizer = AutoTokenizer.from_pretrained(chosen["shared"]["model_name"])
add_markers(tokenizer)
plan = Curriculum(mode="coconut", c_thought=c_thought, max_latent_stage=max_latent_stage, epochs_per_stage=1)
options = {"prompt_format": "coconut", "steps_from": "annotations"}
encoder = PromptEncoder(tokenizer=tokenizer, num_latents=plan.longest_span, **options)
example = GSM8KDataset([shown], encoder=encoder, curriculum=plan)
for stage in range(max_latent_stage + 2):
    example.enter_stage(stage, epoch=stage)
    row = example[0]
    print(f"stage {stage}: {tokenizer.decode(row.prompt)!r} | {tokenizer.decode(row.completion)!r}\n")

# %% [markdown]
# ## First the chain
#
# The whole model learns to write its steps, `<<48/2=24>>` a line, and then the answer.

# %%
shared = {
    **chosen["shared"],
    **options,
    "data_dir": data_dir,
    "base_training": "full",
    "accumulate_grad_batches": 1,
    "max_dev_samples": 512,
    "ema_decay": 0.9,
    "resume": "auto" if RESUME else "never",
    "seed": SEED,
}
trainer = chain = None
trainer, chain = train_gsm8k(
    **shared, mode="cot", num_epochs=chosen["epochs"]["chain"], output_dir=str(FOLDER / "chain")
)

# %% [markdown]
# ## Then Coconut, from there
#
# Stage 0 is what the chain's run was, so the first stage here is 1. The progress shows the stage; the optimizer is fresh
# in each.

# %%
n_stages = max_latent_stage + 1  # the last writes no step at all
trainer, coconut = train_gsm8k(
    **shared,
    load_model_path=str(FOLDER / "chain"),
    mode="coconut",
    reasoner="coconut",
    c_thought=c_thought,
    max_latent_stage=max_latent_stage,
    epochs_per_stage=chosen["epochs"]["stage"],
    num_epochs=n_stages * chosen["epochs"]["stage"],
    first_stage=1,
    reset_optimizer=True,
    output_dir=str(FOLDER / "coconut"),
)

# %% [markdown]
# ## What they answer
#
# On the same dev problems. *CoT match*: the share of problems whose steps are written exactly as in the solution.

# %%
asked = splits.gsm8k_test[: chosen["compared"]]
results: dict[str, dict] = {}
for name, module in (("chain", chain), ("Coconut", coconut)):
    results |= evaluate_arm(name, module.model.to(device), asked, FOLDER / "predictions", batch_size=32)
comparison = report_comparison(results, FOLDER, baseline="chain", seed=SEED)
display(Markdown(f"**dev**, {len(asked)} problems\n\n{comparison}"))
print(f"CoT match of the chain: {100 * results['chain']['cot_match']:.1f}%")

# %%
plot_losses({name: FOLDER / name / "logs" / "metrics.csv" for name in ("chain", "coconut")}, FOLDER / "losses.png")
display(Image(str(FOLDER / "losses.png")))

# %% [markdown]
# ## Ask it
#
# The saved model is an ordinary Hugging Face model; its own number of latents goes with it.

# %%
loaded = SmolLMv3WithTRM.from_pretrained(FOLDER / "coconut")
question = asked[0]["question"]
print(question)
print(f"Coconut: {loaded.generate_with_thinking(question).strip()}   (right: {gold_answer(asked[0]['answer'])})")
