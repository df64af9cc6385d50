"""Phase 2, step 2: a `SequenceTRM` learns the state after thinking from the states before.

    compressed context -> N_sup times: one deep recursion, loss, backward, optimizer step, detach

Judged on problems that it was not trained on, beside two things that know no recursion: the mean target, whatever the
question was, and ridge regression from the last state before `<think>`. States after thinking share most of what they
are, so a cosine near 1 says nothing by itself: cosines here are also taken around the mean target, and `unexplained` is
the squared error as a share of the mean target's: 1 has learned nothing.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from smollm_trm.data.datamodule import ResumableLoader
from smollm_trm.data.rows import normalize_question
from smollm_trm.models.dimension import DimensionCompressor
from smollm_trm.models.reasoners.sequence_trm import SequenceTRM
from smollm_trm.phases.datagen import read_index, read_shards
from smollm_trm.phases.parts import fill, load_compressor, read_part, refuse_other_base, save_part
from smollm_trm.phases.settings import SequenceSettings
from smollm_trm.records import UserMistake, picked, run_record, write_json
from smollm_trm.training.checkpoints import only_run_in
from smollm_trm.training.loggers import quiet_lightning
from smollm_trm.training.optim import OptimizerSettings, build_schedule
from smollm_trm.training.run import Run, begin_run, build_run_trainer, fit_run, load_average

RIDGE_PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)


class CompressedPairs(Dataset):
    """Pairs in compressed form: contexts `(L, D')`, targets `(D')`; and each last state before, whole, for ridge."""

    def __init__(self) -> None:
        self.contexts: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.last_states: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.contexts)

    @property
    def lengths(self) -> list[int]:
        return [len(one) for one in self.contexts]

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        """A batch, padded on the left: context `(B, L, D')`, mask `(B, L)`, target `(B, D')`."""
        chosen = [self.contexts[row] for row in rows]
        lengths = torch.tensor([[len(one)] for one in chosen])
        return {
            "context": pad_sequence(chosen, batch_first=True, padding_side="left"),
            "mask": torch.arange(int(lengths.max())) >= lengths.max() - lengths,
            "target": torch.stack([self.targets[row] for row in rows]),
        }


def part_of_problem(problem: str) -> str:
    """80% train, 10% dev, 10% held out, by the problem alone."""
    number = hashlib.sha256(normalize_question(problem).encode("utf-8", "replace")).digest()[0] % 10
    return {0: "dev", 1: "held_out"}.get(number, "train")


@torch.no_grad()
def compress_pairs(
    folder: Path, index: Mapping[str, Any], compressor: DimensionCompressor
) -> dict[str, CompressedPairs]:
    """All pairs of a folder through the compressor, a shard in memory at a time: "train", "dev" and "held_out"."""
    parts = {name: CompressedPairs() for name in ("train", "dev", "held_out")}
    for before, after, plain in read_shards(folder, index):
        part = parts[part_of_problem(plain["problems"])]
        part.contexts.append(compressor.compress(before))
        part.targets.append(compressor.compress(after))
        part.last_states.append(before[-1].float())
    for name, part in parts.items():
        if not len(part):
            raise UserMistake(f"{folder}: {index['n_pairs']} pairs leave none for {name}: generate more")
    return parts


class SequenceModule(LightningModule):
    """Trains a `SequenceTRM`; several optimizer steps a batch, one after each supervision step."""

    def __init__(self, trm: SequenceTRM, settings: SequenceSettings, *, steps: int) -> None:
        super().__init__()
        self.trm, self.settings, self.steps = trm, settings, steps
        self.automatic_optimization = False
        self.register_buffer("threshold", torch.tensor(settings.halt_threshold))
        self.register_buffer("cosines", torch.zeros(2))  # sum and number in this epoch

    def losses(self, answer: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of a supervision step, each row's cosine around the mean target, and its halting probability."""
        state, logit = self.trm.read(answer)
        error = ((state - target) / self.trm.target_scale).square().mean()
        cosine = F.cosine_similarity(state.detach() - self.trm.target_mean, target - self.trm.target_mean)
        if not self.settings.use_halting:
            halting = 0.0 * logit.sum()
        elif self.settings.bce_halt_loss:
            halting = F.binary_cross_entropy_with_logits(logit, (cosine > self.threshold).float())
        else:
            halting = F.mse_loss(logit.sigmoid(), cosine.clamp(0, 1))
        return error + self.settings.halt_loss_weight * halting, cosine, logit.sigmoid()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """The training guide's algorithm: recurse, loss, backward, step, detach; stop early where all rows would."""
        optimizer, recursion = self.optimizers(), self.trm.recursion
        question, mask = self.trm.augment(batch["context"], batch["mask"])
        answer, latent = recursion.start(question)
        total = torch.zeros((), device=self.device)
        for number in range(recursion.n_supervision_steps):
            if number and self.settings.per_step_updates:
                question, mask = self.trm.augment(batch["context"], batch["mask"])  # the token has moved
            answer, latent = recursion.refine(question, answer.detach(), latent.detach(), mask)
            loss, cosine, halting = self.losses(answer, batch["target"])
            if self.settings.per_step_updates:
                self.update(optimizer, loss)
            total = total + (loss.detach() if self.settings.per_step_updates else loss)
            if self.settings.use_halting and bool((halting > 0.5).all()):
                break
        if not self.settings.per_step_updates:
            self.update(optimizer, total / (number + 1))
        self.lr_schedulers().step()
        self.cosines += torch.stack([cosine.sum(), torch.tensor(float(len(cosine)), device=self.device)])
        self.log("train_loss", total.detach() / (number + 1), prog_bar=True)
        self.log("supervision_steps", number + 1.0)

    def update(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()

    def on_train_epoch_end(self) -> None:
        """Raise or lower the threshold of `bce_halt_loss` to what the epoch has reached."""
        if self.settings.adaptive_halt_threshold and self.cosines[1] > 0:
            self.threshold.copy_(0.95 * self.cosines[0] / self.cosines[1])
        self.cosines.zero_()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Squared error of the last supervision step, as a share of the targets' variation."""
        state, _ = self.trm(batch["context"], batch["mask"])[-1]
        error = ((state - batch["target"]) / self.trm.target_scale).square().mean()
        self.log("dev_error", error, batch_size=len(state), prog_bar=True)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.trm.parameters(), lr=self.settings.learning_rate, betas=(0.9, 0.95))
        schedule = build_schedule(optimizer, total_steps=self.steps, settings=OptimizerSettings())
        return {"optimizer": optimizer, "lr_scheduler": schedule}  # stepped once a batch


def ridge_prediction(parts: Mapping[str, CompressedPairs]) -> Tensor:
    """Held-out targets `(N, D')` predicted by ridge regression from the last state before `<think>`, `(N, D)`."""
    states = [torch.stack(part.last_states).double() for part in parts.values()]
    targets = [torch.stack(part.targets).double() for part in parts.values()]
    mean, deviation, target_mean = states[0].mean(0), states[0].std(0).clamp_min(1e-6), targets[0].mean(0)
    train, dev, held_out = ((one - mean) / deviation for one in states)
    products, moments = train.T @ train, train.T @ (targets[0] - target_mean)
    ridge = torch.eye(len(products), dtype=products.dtype)
    candidates = [torch.linalg.solve(products + penalty * ridge, moments) for penalty in RIDGE_PENALTIES]
    best = min(candidates, key=lambda weights: float((dev @ weights + target_mean - targets[1]).square().mean()))
    return (held_out @ best + target_mean).float()


def figures_of(predicted: Tensor, target: Tensor, mean: Tensor, compressor: DimensionCompressor) -> dict[str, float]:
    """Cosine, as the guide has it and around the mean, squared and relative error, all of decompressed states."""
    states, wanted = compressor.decompress(predicted), compressor.decompress(target)
    error = (states - wanted).square().sum()
    return {
        "cosine": float(F.cosine_similarity(states, wanted).mean()),
        "centred_cosine": float(F.cosine_similarity(predicted - mean, target - mean).mean()),
        "mse": float(error / wanted.numel()),
        "relative_error": float((error / wanted.square().sum()).sqrt()),
        "unexplained": float((predicted - target).square().sum() / (target - mean).square().sum()),
    }


@torch.no_grad()
def judge_predictions(
    trm: SequenceTRM, parts: Mapping[str, CompressedPairs], compressor: DimensionCompressor
) -> dict[str, Any]:
    """The held-out figures of the SequenceTRM, of ridge regression and of the mean target."""
    trm, compressor = trm.cpu().eval(), compressor.cpu()
    target, mean = torch.stack(parts["held_out"].targets), torch.stack(parts["train"].targets).mean(0)
    batches = (parts["held_out"][rows.tolist()] for rows in torch.arange(len(target)).split(256))
    found = [trm(batch["context"], batch["mask"]) for batch in batches]
    predicted = torch.cat([steps[-1][0] for steps in found])  # (N, D')
    halting = torch.cat([torch.stack([logit for _, logit in steps], dim=1) for steps in found]).sigmoid()  # (N, S)
    by_name = {"SequenceTRM": predicted, "ridge": ridge_prediction(parts), "mean target": mean.expand_as(target)}
    figures: dict[str, Any] = {name: figures_of(one, target, mean, compressor) for name, one in by_name.items()}
    figures["mean target"]["centred_cosine"] = 0.0  # of no direction
    stops = (halting > 0.5).float()
    stops[:, -1] = 1
    figures["halting"] = {"mean_steps": float(stops.argmax(1).float().mean() + 1), "steps": halting.shape[1],
                          "mean_probability": float(halting[:, -1].mean())}  # fmt: skip
    return figures


def train_sequence_trm(settings: SequenceSettings) -> dict[str, Any]:
    """Train on pairs, or go on; returns the report, which is `results.json` of the output folder."""
    folder, pairs = Path(settings.output_dir), Path(settings.data or settings.data_path)
    index = read_index(pairs)
    here = f"the pairs in {pairs}, which are of {index['base'] or 'another base'}, {index['hidden_size']} wide"
    place, fingerprint = settings.compressor_checkpoint, index["base_fingerprint"]
    compressor, of_compressor = load_compressor(place, fingerprint=fingerprint, here=here)
    parts = compress_pairs(pairs, index, compressor)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        trm = SequenceTRM(d_compressed=of_compressor["d_compressed"], **settings.network())
    trm.fit(torch.cat(parts["train"].contexts), torch.stack(parts["train"].targets))
    loader = ResumableLoader(parts["train"], batch_size=settings.batch_size, seed=settings.seed)
    run = Run(
        folder=folder, metric="dev_error", save_every_n_steps=2000,
        ema_decay=settings.ema_decay if settings.use_ema else 0.0,
        not_finite="lower learning_rate, and see that the compressor is of this base",
        **picked(settings, "resume", "patience", "seed", "progress"),
    )  # fmt: skip
    with only_run_in(folder), quiet_lightning():
        noted = {**asdict(settings), "compressor": compressor_digest(compressor)}
        noted["pairs"] = [one["sha256"] for one in index["shards"].values()]
        start = begin_run(run, noted, may_change=("resume", "progress", "output_dir", "data_path", "data"))
        trainer = build_run_trainer(run, start, max_epochs=settings.num_epochs, log_every_n_steps=10)
        module = SequenceModule(trm, settings, steps=settings.num_epochs * len(loader))
        loaders = {"train_dataloaders": loader, "val_dataloaders": ResumableLoader(parts["dev"], batch_size=256)}
        fit_run(run, trainer, module, checkpoint=start.checkpoint, **loaders)
        load_average(module, trainer.checkpoint_callback.best_path)
        figures = judge_predictions(trm, parts, compressor)
        counts = {name: len(part) for name, part in parts.items()}
        report = {"held_out": figures, "pairs": counts, "optimizer_steps": trainer.global_step,
                  "epochs": trainer.current_epoch, "halt_threshold": float(module.threshold)}  # fmt: skip
        of_base = {name: index[name] for name in ("base", "base_fingerprint", "hidden_size")}
        save_part(folder / "model", "sequence_trm", trm, **of_base, d_compressed=of_compressor["d_compressed"],
                  network=settings.network(), compressor=compressor_digest(compressor),
                  measured=described(figures))  # fmt: skip
        write_json(folder / run.results_file, {**report, "settings": asdict(settings), **run_record()})
    return report


def compressor_digest(compressor: DimensionCompressor) -> str:
    """What tells two compressors apart."""
    return hashlib.sha256(compressor.weight.detach().cpu().numpy().tobytes()).hexdigest()[:32]


def load_sequence_trm(name: str, compressor: DimensionCompressor, of_compressor: Mapping[str, Any]) -> SequenceTRM:
    """A trained recursion; one of another base, or of another compressor, is refused."""
    config, tensors = read_part(name, "sequence_trm")
    refuse_other_base(config, of_compressor["base_fingerprint"], f"the sequence TRM {name}", "this compressor's base")
    if config["compressor"] != compressor_digest(compressor):
        raise UserMistake(f"the sequence TRM {name} was trained with another compressor: name that one")
    trm = SequenceTRM(d_compressed=config["d_compressed"], **config["network"])
    fill(trm, tensors, name)
    return trm


def described(figures: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    return {
        name: f"cosine {one['cosine']:.4f}, around the mean {one['centred_cosine']:.3f}, mse {one['mse']:.5g}, "
        f"relative error {one['relative_error']:.3f}, unexplained {one['unexplained']:.3f}"
        for name, one in figures.items()
        if "cosine" in one
    }


def trm_command(settings: SequenceSettings) -> str:
    """Phase 2, step 2: train the recursion; print its figures on held-out problems beside its baselines."""
    report = train_sequence_trm(settings)
    lines: Sequence[str] = [f"{name}: {text}" for name, text in described(report["held_out"]).items()]
    halting = report["held_out"]["halting"]
    told = f"the halting head would stop after {halting['mean_steps']:.1f} of {halting['steps']} steps"
    counts = report["pairs"]
    return "\n".join([f"{counts['held_out']} held-out problems, {counts['train']} trained on", *lines, told])
