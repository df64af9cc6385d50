"""Progress bars that neither freeze nor fill a page: on a terminal tqdm's own, in a notebook one line, replaced."""

import io
import sys
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import StoppingCriteria


def in_notebook() -> bool:
    """Whether this runs in a Jupyter kernel, Colab's included."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


def is_watched() -> bool:
    """Whether somebody sees a bar move; a log file keeps every state of it."""
    return in_notebook() or sys.stderr.isatty()


class NotebookBar(tqdm):
    """A bar as one output that is replaced: no widget that a frontend may lack, and a saved notebook keeps the end."""

    output: Any = None

    def __init__(self, *args: Any, **options: Any) -> None:
        fixed = {"dynamic_ncols": False, "ncols": 100, "ascii": False, "file": io.StringIO()}
        super().__init__(*args, **{**options, **fixed})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Replace the line."""
        from IPython.display import display

        shown = {"text/plain": str(self) if msg is None else msg}
        if self.output is None:
            self.output = display(shown, raw=True, display_id=True)
        else:
            self.output.update(shown, raw=True)


def progress_bar(**options: Any) -> tqdm:
    """A bar for wherever this runs."""
    return (NotebookBar if in_notebook() else tqdm)(**options)


class KeepMoving(StoppingCriteria):
    """Draws a bar's clock anew while a batch of answers is written, which takes up to a minute. It stops nothing."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar
        self.drawn = time.monotonic()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if time.monotonic() - self.drawn > 1 and is_watched():
            self.drawn = time.monotonic()
            self.bar.refresh()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
