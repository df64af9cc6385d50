"""The log of a run: coloured on the terminal, with timestamps in a file, its figures as JSON lines."""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pytorch_lightning import Callback, LightningModule, Trainer

LEVEL_COLOURS = {logging.WARNING: "\033[33m", logging.ERROR: "\033[31m"}


class ColouredFormatter(logging.Formatter):
    """Messages as they are, the level as a colour where the stream is a terminal."""

    def __init__(self, *, coloured: bool) -> None:
        super().__init__("%(message)s")
        self.coloured = coloured

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        text = super().format(record)
        return f"{LEVEL_COLOURS.get(record.levelno, chr(27) + '[36m')}{text}\033[0m" if self.coloured else text


@contextmanager
def logging_to(path: Path) -> Iterator[logging.Logger]:
    """Log to a file (everything) and to stderr (what a user wants to see) while the block runs.

    Args:
        path: the log file; a resumed run appends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    log = logging.getLogger("smollm_trm.arithmetic")
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    to_screen = logging.StreamHandler(sys.stderr)
    to_screen.setLevel(logging.INFO)
    to_screen.setFormatter(ColouredFormatter(coloured=sys.stderr.isatty()))
    before = log.level, log.propagate
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.addHandler(to_file)
    log.addHandler(to_screen)
    try:
        yield log
    finally:
        log.level, log.propagate = before
        for handler in (to_file, to_screen):
            log.removeHandler(handler)
            handler.close()


def read_run_file(path: Path) -> dict | None:
    """A JSON file of a run, None where there is none.

    Raises:
        ValueError: the file is not JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is damaged (not JSON): remove it or name another --output-dir") from None


class SumMetricsLog(Callback):
    """Write what is measured to `logs/metrics.jsonl` and to the log file, one line each time.

    A resumed run first drops the lines after the step from which it goes on.

    Args:
        path: the JSONL file.
        every_n_steps: steps between lines about the training loss.
    """

    def __init__(self, *, path: Path, every_n_steps: int) -> None:
        self.path = path
        self.every_n_steps = every_n_steps
        self.started = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut the file where the run goes on, and start the clock."""
        self.started = time.perf_counter()
        kept = []
        if self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of_line(line) <= trainer.global_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        if kept:
            self.started -= json.loads(kept[-1])["seconds"]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """The training loss and the learning rate."""
        if trainer.global_step % self.every_n_steps == 0:
            learning_rate = trainer.optimizers[0].param_groups[0]["lr"]
            self._write(trainer, ["train_loss"], {"learning_rate": learning_rate})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation loss, token accuracy, exact match."""
        if not trainer.sanity_checking:
            self._write(trainer, ["val_loss", "val_token_accuracy", "val_exact_match"], {})

    def _write(self, trainer: Trainer, names: list[str], more: dict[str, float]) -> None:
        measured = {name: float(trainer.callback_metrics[name]) for name in names if name in trainer.callback_metrics}
        seconds = round(time.perf_counter() - self.started, 2)
        line = {"step": trainer.global_step, "seconds": seconds, **measured, **more}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = " ".join(f"{name} {value:.5g}" for name, value in (measured | more).items())
        logging.getLogger("smollm_trm.arithmetic").debug("step %d %s", trainer.global_step, shown)


def _step_of_line(line: str) -> int | float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # half a line of a killed run
        return float("inf")
