"""Progress bars that neither freeze nor fill a page: on a terminal tqdm's own, in a notebook one line, replaced."""

import io
import os
import sys
import time
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import StoppingCriteria

SECONDS_BETWEEN_LINES = 10


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel, Colab's included."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def is_watched() -> bool:
    """Whether somebody sees a bar move; a log file keeps every state of it."""
    return in_notebook() or sys.stderr.isatty()


class LineBar(tqdm):
    """A bar as a line every few seconds: a log file cannot go back."""

    def __init__(self, *args: Any, **options: Any) -> None:
        fixed = {"dynamic_ncols": False, "ncols": 0, "file": io.StringIO(), "mininterval": SECONDS_BETWEEN_LINES}
        super().__init__(*args, **{**options, **fixed})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        print(str(self) if msg is None else msg, file=sys.stderr, flush=True)


class NotebookBar(tqdm):
    """A bar as one output that is replaced: no widget that a frontend may lack, and a saved notebook keeps the end."""

    output: Any = None

    def __init__(self, *args: Any, **options: Any) -> None:
        fixed = {"dynamic_ncols": False, "ncols": 100, "ascii": False, "file": io.StringIO()}
        super().__init__(*args, **{**options, **fixed})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        from IPython.display import display

        shown = {"text/plain": str(self) if msg is None else msg}
        if self.output is None:
            self.output = display(shown, raw=True, display_id=True)
        else:
            self.output.update(shown, raw=True)


def progress_bar(**options: Any) -> tqdm:
    if in_notebook() or not is_watched():
        return (NotebookBar if in_notebook() else LineBar)(**options)
    with suppress(OSError, ValueError):  # a terminal that does not say how wide it is would show nothing
        if os.get_terminal_size(sys.stderr.fileno()).columns == 0:
            options |= {"ncols": 80, "nrows": 24, "dynamic_ncols": False}
    return tqdm(**options)


class KeepMoving(StoppingCriteria):
    """Shows the tokens of a batch of answers while it is written, which takes up to a minute. It stops nothing."""

    def __init__(self, bar: tqdm, *, at_most: int) -> None:
        self.bar, self.at_most = bar, at_most
        self.wait = SECONDS_BETWEEN_LINES if isinstance(bar, LineBar) else 1
        self.drawn, self.begun, self.score = time.monotonic(), 0, ""

    def show_score(self, score: str) -> None:
        self.begun, self.score = 0, score
        self.bar.set_postfix_str(score, refresh=False)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.begun = self.begun or input_ids.shape[1] - 1
        if time.monotonic() - self.drawn > self.wait:
            self.drawn = time.monotonic()
            written = f"token {input_ids.shape[1] - self.begun} of at most {self.at_most}"
            self.bar.set_postfix_str(f"{self.score}, {written}" if self.score else written)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
