"""Phase 1: a `DimensionCompressor` for a base's final hidden states, streamed from text; one or a sweep of widths.

one pass over the training text: the states' sums  -> PCA, the start
up to `num_epochs` more: gradient descent on the relative squared error, chosen by the dev text
held-out text: cosine, squared error, and the base's own loss with its states replaced by what is left of them
"""

import copy
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from smollm_trm.bars import progress_bar
from smollm_trm.evaluation.loading import load_for_evaluation
from smollm_trm.evaluation.plots import plot_sweep
from smollm_trm.models.dimension import DimensionCompressor, StateMoments, base_fingerprint
from smollm_trm.models.smollm import SmolLMv3WithTRM
from smollm_trm.phases.datagen import read_index
from smollm_trm.phases.parts import load_compressor, public_name, save_part
from smollm_trm.phases.settings import CompressorRunSettings
from smollm_trm.phases.text import TextStream, final_states
from smollm_trm.records import UserMistake, picked, remove_path, run_record, write_json, write_whole
from smollm_trm.training.checkpoints import WholeCheckpointIO, only_run_in
from smollm_trm.training.loggers import quiet_lightning
from smollm_trm.training.optim import OptimizerSettings, build_schedule
from smollm_trm.training.run import Run, begin_run, build_run_trainer, fit_run

MEAN = "mean vector"


class CompressorModule(LightningModule):
    """Trains compressors of several widths on the same states; the base is no part of it, nor of its checkpoints."""

    def __init__(
        self, start: Mapping[int, DimensionCompressor], *, model: SmolLMv3WithTRM, learning_rate: float, steps: int
    ) -> None:
        super().__init__()
        self.compressors = nn.ModuleDict({str(width): copy.deepcopy(one) for width, one in start.items()})
        self.given = (model,)  # in a tuple Lightning does not see it
        self.learning_rate, self.steps = learning_rate, steps

    def errors(self, batch: dict[str, Tensor]) -> Tensor:
        """Each width's squared error, as a share of the states' variation around their mean."""
        states = final_states(self.given[0], batch)[batch["attention_mask"].bool()].float()
        mean = next(iter(self.compressors.values())).mean
        variation = (states - mean).square().sum()
        return torch.stack([(states - one(states)).square().sum() / variation for one in self.compressors.values()])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        errors = self.errors(batch)
        self.log("train_loss", errors.mean().detach(), prog_bar=True)
        return errors.sum()  # over widths, which share no weights

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("dev_error", self.errors(batch).mean(), batch_size=int(batch["attention_mask"].sum()), prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.0)
        schedule = build_schedule(optimizer, total_steps=self.steps, settings=OptimizerSettings())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def stream_moments(model: SmolLMv3WithTRM, stream: TextStream, *, progress: bool = False) -> StateMoments:
    """Sums over the final states of a stream's text; a batch of them is in memory at a time."""
    moments = StateMoments(model.config.hidden_size)
    with progress_bar(unit="text", disable=not progress) as bar:
        for batch in stream:
            moments.add(final_states(model, batch)[batch["attention_mask"].bool()])
            bar.update(len(batch["input_ids"]))
    return moments


@torch.no_grad()
def measure_compressors(
    model: SmolLMv3WithTRM, stream: TextStream, compressors: Mapping[str, DimensionCompressor]
) -> dict[str, dict[str, float]]:
    """How well states are restored, by name: `cosine`, `mse`, `relative_error` and the base's `loss` in nats a token.

    Also of the "base" itself and of the "mean vector": what a constant reaches says what a figure is worth. A
    compressor's `unexplained` is its squared error as a share of the mean vector's.
    """
    mean = next(iter(compressors.values())).mean
    restorers = {"base": lambda states: states, MEAN: mean.expand_as, **compressors}
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in restorers}
    energy, n_states, n_predicted = 0.0, 0, 0
    for batch in stream:
        states, real = final_states(model, batch).float(), batch["attention_mask"].bool()
        predicted = real[:, 1:] & real[:, :-1]
        found, wanted = states[real], batch["input_ids"][:, 1:][predicted]
        energy, n_states = energy + float(found.double().square().sum()), n_states + len(found)
        n_predicted += len(wanted)
        for name, restore in restorers.items():
            restored = restore(states)
            left = restored[real]
            logits = model.lm_head(restored[:, :-1][predicted].to(model.lm_head.weight.dtype)).float()
            sums[name] += torch.tensor([
                F.cosine_similarity(left, found, dim=-1).double().sum(), (left - found).double().square().sum(),
                F.cross_entropy(logits, wanted, reduction="sum").double(),
            ])  # fmt: skip
    of_mean = float(sums[MEAN][1])
    return {
        name: {
            "cosine": float(cosine) / n_states,
            "mse": float(squared) / n_states / model.config.hidden_size,
            "relative_error": (float(squared) / energy) ** 0.5,
            "unexplained": float(squared) / of_mean,
            "loss": float(loss) / n_predicted,
        }
        for name, (cosine, squared, loss) in sums.items()
    }


def pretrain_compressor(settings: CompressorRunSettings) -> dict[str, Any]:
    """Run stage 1a or 1b, or go on with it; returns the report, which is `results.json` of the output folder."""
    folder = Path(settings.output_dir)
    model = load_for_evaluation(settings.model_name, precision=settings.precision)
    fingerprint, trajectories = base_fingerprint(model.model.language_model), settings.stage == "1b"
    data = settings.data or ("./data/hidden_pairs" if trajectories else "fineweb-edu")
    if trajectories:
        read_index(Path(data), fingerprint=fingerprint, here=settings.model_name)
    streams = {part: TextStream(model, settings, data, part) for part in ("train", "dev", "held-out")}
    for part, stream in streams.items():
        if next(iter(stream.texts()), None) is None:
            raise UserMistake(f"data={data!r}: no {part} text among the first texts; give more, or raise num_samples")
    shared = picked(settings, "resume", "seed", "progress")
    run = Run(folder=folder, metric="dev_error", save_every_n_steps=500, patience=2, **shared)
    with only_run_in(folder), quiet_lightning():
        begun = begin_run(run, {**asdict(settings), "base": fingerprint},
                               may_change=("resume", "progress", "output_dir", "data_dir"))  # fmt: skip
        of = json.dumps([fingerprint, data, settings.num_samples, settings.max_length])
        moments = kept_moments(folder, model, streams["train"], of=of, settings=settings)
        start = start_compressors(settings, moments, fingerprint)
        begins = {f"start {width}": one.to(model.device) for width, one in start.items()}
        named, optimizer_steps = {f"kept {width}": begins[f"start {width}"] for width in start}, 0
        if settings.num_epochs:
            steps = settings.num_epochs * max(1, sum(1 for _ in streams["train"].texts()) // settings.batch_size)
            module = CompressorModule(start, model=model, steps=steps, learning_rate=settings.learning_rate)
            limits = {"max_epochs": settings.num_epochs, "gradient_clip_val": 1.0}
            trainer = build_run_trainer(run, begun, log_every_n_steps=10, **limits)
            loaders = {"train_dataloaders": streams["train"], "val_dataloaders": streams["dev"]}
            fit_run(run, trainer, module.to(model.device), checkpoint=begun.checkpoint, **loaders)
            kept = WholeCheckpointIO().load_checkpoint(trainer.checkpoint_callback.best_path)
            module.load_state_dict(kept["state_dict"])
            trained = {f"kept {width}": one for width, one in module.to(model.device).compressors.items()}
            found = measure_compressors(model, streams["dev"], trained | begins)
            for name, one in trained.items():  # the start stays where training did not better it
                named |= {name: one} if found[name]["mse"] < found[name.replace("kept", "start")]["mse"] else {}
            optimizer_steps = trainer.global_step
        named |= begins if trajectories or settings.start == "random" else {}
        named |= {f"PCA {width}": moments.principal(width).to(model.device) for width in start}
        measured = measure_compressors(model, streams["held-out"], named)
        report = {"stage": settings.stage, "data": Path(data).name, "states": int(moments.count),
                  "optimizer_steps": optimizer_steps, "held_out": measured}  # fmt: skip
        of_base = {"base": public_name(model, settings.model_name), "base_fingerprint": fingerprint}
        for width in start:
            place = folder / ("model" if width == settings.d_compressed else f"model-{width}")
            save_part(place, "compressor", named[f"kept {width}"], hidden_size=model.config.hidden_size, **of_base,
                      d_compressed=width, stage=settings.stage, measured=card_lines(measured, width))  # fmt: skip
        plot_sweep(measured, sorted(start), folder / "sweep.png")
        write_json(folder / run.results_file, {**report, "settings": asdict(settings), **run_record()})
    return report


def kept_moments(
    folder: Path, model: SmolLMv3WithTRM, stream: TextStream, *, of: str, settings: CompressorRunSettings
) -> StateMoments:
    """The training text's moments: those that an earlier session made `of` the same base and text, or made now."""
    path, moments = folder / "moments.safetensors", StateMoments(model.config.hidden_size)
    if settings.resume == "never":  # a file of text may have changed
        remove_path(path)
    with suppress(OSError, SafetensorError), safe_open(path, "pt") as file:
        if file.metadata() == {"of": of}:
            vars(moments).update({name: file.get_tensor(name) for name in vars(moments)})
            return moments
    moments = stream_moments(model, stream, progress=settings.progress)
    write_whole(path, lambda temporary: save_file(vars(moments), temporary, metadata={"of": of}))
    return moments


def start_compressors(
    settings: CompressorRunSettings, moments: StateMoments, fingerprint: str
) -> dict[int, DimensionCompressor]:
    """What training starts from, by width."""
    if settings.stage == "1b":
        earlier, _ = load_compressor(settings.compressor_checkpoint, fingerprint=fingerprint, here=settings.model_name)
        if (width := len(earlier.weight)) != settings.d_compressed:
            reason = f"compresses to {width}, not to d_compressed={settings.d_compressed}"
            raise UserMistake(f"the compressor {settings.compressor_checkpoint} {reason}")
        return {width: earlier}
    widths, starts = sorted({settings.d_compressed, *settings.sweep}), {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        for width in widths:
            starts[width] = moments.principal(width)
            if settings.start == "random":
                nn.init.orthogonal_(starts[width].weight)
    return starts


def card_lines(measured: Mapping[str, Mapping[str, float]], width: int) -> dict[str, str]:
    own, pca, mean, base = (measured[name] for name in (f"kept {width}", f"PCA {width}", MEAN, "base"))
    return {
        "cosine": f"{own['cosine']:.4f} (PCA of the training text {pca['cosine']:.4f}, the mean vector alone "
        f"{mean['cosine']:.4f})",
        "mean squared error": f"{own['mse']:.5g} (PCA {pca['mse']:.5g}, the mean vector {mean['mse']:.5g}); relative "
        f"error {own['relative_error']:.3f}",
        "loss of the base": f"{own['loss']:.3f} nats a token with its states replaced by the reconstruction, "
        f"{base['loss']:.3f} without",
    }


def describe_report(report: Mapping[str, Any]) -> str:
    lines = [f"{'held-out text':<14} {'cosine':>8} {'mse':>10} {'rel. error':>10} {'unexplained':>11} {'loss':>8}"]
    for name, one in report["held_out"].items():
        lines.append(
            f"{name:<14} {one['cosine']:8.4f} {one['mse']:10.5g} {one['relative_error']:10.4f} "
            f"{one['unexplained']:11.4f} {one['loss']:8.3f}"
        )
    return "\n".join(lines)


def compressor_command(settings: CompressorRunSettings) -> str:
    """Phase 1: train a compressor of hidden states; print its figures on held-out text."""
    report = pretrain_compressor(settings)
    return f"{describe_report(report)}\nin {settings.output_dir}: model/, results.json, sweep.png"
