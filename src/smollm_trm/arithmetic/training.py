"""One training run: read the data, go on where an earlier run stopped, train, test, write everything down.

output_dir/
  model.safetensors, config.json, tokenizer.json ...   the trained model, for from_pretrained
  training_config.json                                 settings, data fingerprints, versions, parameters
  test_results.json                                    the evaluation of the test part
  logs/training.log, logs/metrics.jsonl                what happened, with timestamps
  checkpoint-1000/ ...                                 the model on the way, and the state to go on from
"""

import logging
import os
import time
import warnings
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import WandbLogger
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from smollm_trm.arithmetic.batches import (
    EncodedSums,
    SumBatches,
    WholeRunLoader,
    WholeRunSampler,
    encode_sums,
    plain_batches,
    repeat_one_column_sums,
)
from smollm_trm.arithmetic.checkpoints import SumCheckpoints, checkpoint_folders, newest_good_state
from smollm_trm.arithmetic.evaluation import evaluate_sums
from smollm_trm.arithmetic.files import SumFile, make_writable_folder, read_data_folder, write_json_file
from smollm_trm.arithmetic.model import build_arithmetic_model, count_parameters, save_arithmetic_model
from smollm_trm.arithmetic.module import SumModule
from smollm_trm.arithmetic.run_log import SumMetricsLog, logging_to, read_run_file
from smollm_trm.arithmetic.settings import SumTrainingSettings
from smollm_trm.arithmetic.tokenizer import build_arithmetic_tokenizer
from smollm_trm.records import run_record


def train_sums(settings: SumTrainingSettings) -> dict:
    """Train as the settings say, or go on with the run found in the output folder; returns the test results.

    A finished run is not trained again: its results are returned.

    Raises:
        FileNotFoundError: a data file is missing.
        ValueError: the data is not of this format, an example is longer than max_length, the folder holds a
            run with other settings or data, fp16 without a GPU, or the loss is not finite.
        PermissionError: the output folder cannot be written.
    """
    if settings.fp16 and not torch.cuda.is_available():
        raise ValueError("fp16 needs a GPU, and there is none: leave --fp16 out")
    files = read_data_folder(Path(settings.data_dir))
    folder = Path(settings.output_dir)
    make_writable_folder(folder, name="output_dir")
    tokenizer = build_arithmetic_tokenizer(max_length=settings.max_length)
    parts = _encode_parts(files, tokenizer, settings)
    num_steps = settings.count_steps(len(parts["train"]))
    model = build_arithmetic_model(settings.model_size, max_length=settings.max_length, seed=settings.seed)
    model.config.digit_order = files["train"].digit_order  # tells the interactive command how answers are written
    description = _describe_run(settings, files, num_steps=num_steps, num_parameters=count_parameters(model))
    _refuse_another_run(description, folder)
    if (finished := read_run_file(folder / "test_results.json")) and (folder / "model.safetensors").is_file():
        logging.getLogger("smollm_trm.arithmetic").warning(
            "%s holds this very run, finished: nothing to train (name another --output-dir for a new one)",
            folder,
        )
        return finished
    write_json_file(description, folder / "training_config.json")
    with logging_to(folder / "logs" / "training.log") as log:
        log.info(
            "training %s (%s parameters) on %s examples of %s: %s steps, tested on %s",
            settings.model_size,
            f"{count_parameters(model):,}",
            f"{len(parts['train']):,}",
            settings.data_dir,
            f"{num_steps:,}",
            f"{len(parts['test']):,}",
        )
        _fit(model, parts, settings, num_steps=num_steps)
        save_arithmetic_model(model, folder)
        return _test(model, tokenizer, files["test"], settings)


def _encode_parts(
    files: dict[str, SumFile], tokenizer: PreTrainedTokenizerFast, settings: SumTrainingSettings
) -> dict[str, EncodedSums]:
    """The three parts as tokens, as many of them as the settings say."""
    parts = {
        part: encode_sums(file.examples, tokenizer, max_length=settings.max_length) for part, file in files.items()
    }
    if settings.eval_examples != -1:
        parts["val"] = parts["val"].select(torch.arange(min(settings.eval_examples, len(parts["val"]))))
    parts["train"] = repeat_one_column_sums(parts["train"], files["train"].examples, settings.one_column_repeats)
    return parts


def _describe_run(
    settings: SumTrainingSettings, files: dict[str, SumFile], *, num_steps: int, num_parameters: int
) -> dict:
    return {
        "settings": asdict(settings),
        "num_steps": num_steps,
        "num_parameters": num_parameters,
        "data": {part: {"count": len(file.examples), "fingerprint": file.fingerprint} for part, file in files.items()},
        **run_record(),
    }


def _refuse_another_run(description: dict, folder: Path) -> None:
    """Raise ValueError where the folder holds a run that this one cannot go on with."""
    if not checkpoint_folders(folder) and not (folder / "model.safetensors").is_file():
        return
    earlier = read_run_file(folder / "training_config.json")
    if earlier is None:
        raise ValueError(f"{folder} holds a model without training_config.json: name another --output-dir")
    if description["data"] != earlier.get("data"):
        raise ValueError(f"{folder} holds a run on other data: name another --output-dir, or the data of that run")
    now = SumTrainingSettings(**description["settings"]).fixing_the_weights()
    for name, value in now.items():
        before = earlier.get("settings", {}).get(name)
        if before != value:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{folder} holds a run with {option} {before}, not {value}: "
                f"name another --output-dir, or take {option} {before} to go on"
            )


def _fit(
    model: PreTrainedModel, parts: dict[str, EncodedSums], settings: SumTrainingSettings, *, num_steps: int
) -> None:
    """Train the model in place, from the newest good checkpoint on."""
    folder = Path(settings.output_dir)
    module = SumModule(
        model=model,
        optimizer=settings.optimizer,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup_steps,
        num_steps=num_steps,
    )
    log = logging.getLogger("smollm_trm.arithmetic")
    found = newest_good_state(folder)
    if found and found[1] == num_steps:  # stopped between the last step and the test
        module.load_state_dict(torch.load(found[0], map_location="cpu", weights_only=True)["state_dict"])
        return
    trainer = _build_trainer(settings, num_steps=num_steps)
    loader = _training_loader(parts["train"], settings, trainer, num_steps=num_steps)
    held_out = DataLoader(
        SumBatches(sums=parts["val"], problem_weight=0.0),
        sampler=plain_batches(parts["val"], batch_size=settings.eval_batch_size),
        batch_size=None,
    )
    if found:
        log.info("going on from %s (step %s of %s)", found[0].parent, f"{found[1]:,}", f"{num_steps:,}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")  # one tensor: they would only cost
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # Lightning on torch 2.13
        try:
            trainer.fit(module, loader, held_out, ckpt_path=found and found[0], weights_only=True)
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C: Lightning shuts down and exits
            log.warning("stopped at step %d: the same command goes on from the last checkpoint", trainer.global_step)
            raise


def _build_trainer(settings: SumTrainingSettings, *, num_steps: int) -> Trainer:
    """One Lightning epoch is the whole run: its bar shows the way to the end, and resuming is one position."""
    folder = Path(settings.output_dir)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # no tips in the middle of the progress bar
    return Trainer(
        max_steps=num_steps,
        max_epochs=-1,
        accelerator="auto",
        devices=1,
        precision="16-mixed" if settings.fp16 else "32-true",
        gradient_clip_val=1.0,
        val_check_interval=min(settings.eval_steps, num_steps),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=settings.logging_steps,
        logger=_weights_and_biases(settings) or False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[
            TQDMProgressBar(refresh_rate=10),
            SumMetricsLog(path=folder / "logs" / "metrics.jsonl", every_n_steps=settings.logging_steps),
            SumCheckpoints(folder=folder, every_n_steps=settings.save_steps, num_steps=num_steps),
        ],
        default_root_dir=folder,
    )


def _training_loader(
    sums: EncodedSums, settings: SumTrainingSettings, trainer: Trainer, *, num_steps: int
) -> WholeRunLoader:
    return WholeRunLoader(
        dataset=SumBatches(sums=sums, problem_weight=settings.problem_weight),
        sampler=WholeRunSampler(
            lengths=sums.lengths, batch_size=settings.batch_size, num_steps=num_steps, seed=settings.seed
        ),
        num_workers=min(settings.num_workers, os.cpu_count() or 1),
        steps_done=lambda: trainer.global_step,
    )


def _weights_and_biases(settings: SumTrainingSettings) -> WandbLogger | None:
    """The W&B logger where it is wanted, installed and has a key: it never asks."""
    if settings.no_wandb:
        return None
    if find_spec("wandb") is None or not os.environ.get("WANDB_API_KEY"):
        logging.getLogger("smollm_trm.arithmetic").info("no WANDB_API_KEY: metrics go to logs/metrics.jsonl only")
        return None
    return WandbLogger(project="smollm-trm-arithmetic", save_dir=settings.output_dir, config=asdict(settings))


def _test(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: SumFile, settings: SumTrainingSettings
) -> dict:
    """Evaluate the test part and write `test_results.json`."""
    log = logging.getLogger("smollm_trm.arithmetic")
    started = time.perf_counter()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    results = evaluate_sums(
        model,
        tokenizer,
        data,
        batch_size=settings.eval_batch_size,
        max_length=settings.max_length,
        show_progress=True,
    )
    results = {**results, "seed": settings.seed, **run_record()}
    write_json_file(results, Path(settings.output_dir) / "test_results.json")
    log.info(
        "test: exact match %.2f%%, token accuracy %.2f%% on %s problems (%.0f s); all in %s",
        100 * results["exact_match"], 100 * results["token_accuracy"], f"{results['num_examples']:,}",
        time.perf_counter() - started, settings.output_dir,
    )  # fmt: skip
    return results
