"""Where a run's figures go, and what of Lightning's own talk the user is spared."""

import hashlib
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CSVLogger, Logger

logger = logging.getLogger(__name__)

NOISE = (
    ".*does not have many workers",  # the rows are in memory
    ".*is smaller than the logging interval",  # an epoch is; the run is what counts
    ".*LeafSpec.* is deprecated",
    ".*is_gradient_checkpointing.* is deprecated",
    ".*gradient_checkpointing_enable.* is deprecated",
    r".*Detected call of .lr_scheduler\.step\(\). before .optimizer\.step\(\)",  # fp16 looking for its loss scale
)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Leave the progress bar, real warnings and errors; drop Lightning's tips and what we know already."""
    levels = {talker: talker.level for talker in map(logging.getLogger, ("pytorch_lightning", "lightning_fabric"))}
    with warnings.catch_warnings():
        for message in NOISE:
            warnings.filterwarnings("ignore", message=message)
        for talker in levels:
            talker.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for talker, level in levels.items():
                talker.setLevel(level)


class KeptCSVLogger(CSVLogger):
    """Lightning's CSV logger, except that a resumed run goes on with the rows it has: Lightning's deletes them."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        super().__init__(str(folder), name="logs", version="", flush_logs_every_n_steps=1)
        self.first_step = first_step

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write a row; the log hears of it too, in optimizer steps done."""
        super().log_metrics(metrics, step)
        if logger.isEnabledFor(logging.DEBUG):
            figures = " ".join(f"{name} {value:.5g}" for name, value in metrics.items() if name != "epoch")
            logger.debug("step %d %s", (step or 0) + 1, figures)

    @property
    def experiment(self) -> Any:
        """Lightning's writer, made once and given the earlier rows."""
        if self._experiment is None:
            earlier = self.earlier_rows()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*Experiment logs directory")
                writer = super().experiment
            writer.metrics = earlier
            writer.save()
        return self._experiment

    def earlier_rows(self) -> list[dict[str, Any]]:
        """Rows of earlier sessions that stay; lines that cannot be read are dropped, with their number."""
        path, kept, dropped = Path(self.log_dir) / "metrics.csv", [], 0
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()  # a line torn by a crash is made again
        for line in lines[1:]:
            try:
                row = {name: value for name, value in zip(lines[0].split(","), line.split(","), strict=True) if value}
                if int(row["step"]) < self.first_step and [*map(float, row.values())]:
                    kept.append(row)
            except (ValueError, KeyError):
                dropped += 1
        if dropped:
            logger.warning("%s: dropped %d lines that cannot be read", path, dropped)
        return kept


def build_loggers(folder: Path, *, first_step: int, wandb: tuple[str | None, str | None], seed: int) -> list[Logger]:
    """CSV always, TensorBoard where installed, Weights & Biases only where a key is set: nothing ever asks for one."""
    loggers: list[Logger] = [KeptCSVLogger(folder, first_step=first_step)]
    try:
        from pytorch_lightning.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(str(folder), name="tensorboard", version="", purge_step=first_step or None))
    except ModuleNotFoundError:
        logger.info("tensorboard is not installed: losses go to logs/metrics.csv only")
    project, name = wandb
    missing = None if os.environ.get("WANDB_API_KEY") else "WANDB_API_KEY is not"
    if project and missing is None:
        from pytorch_lightning.loggers import WandbLogger

        try:
            identity = hashlib.sha256(f"{folder.resolve()} {seed}".encode()).hexdigest()[:16]
            options = {"project": project, "name": name, "id": identity, "resume": "allow"}
            loggers.append(WandbLogger(save_dir=str(folder), **options))
        except ModuleNotFoundError:
            missing = "wandb is not installed"
    if project and missing:
        logger.warning("wandb_project is set but %s: losses go to %s/logs/metrics.csv", missing, folder)
    return loggers


def finish_wandb(loggers: Iterable[Logger]) -> None:
    """End the run at Weights & Biases, or the next training of this process lands in it."""
    for one in loggers:
        if type(one).__name__ == "WandbLogger":
            one.experiment.finish()
            one._experiment = None  # `trainer.test` opens the run again
