"""The log of a run as text: with timestamps in a file, coloured on a terminal."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from smollm_trm.records import AboveBars, write_text


class ColouredFormatter(logging.Formatter):
    """Messages as they are: cyan, a warning yellow, an error red."""

    def format(self, record: logging.LogRecord) -> str:
        colour = {logging.WARNING: 33, logging.ERROR: 31}.get(record.levelno, 36)
        return f"\033[{colour}m{super().format(record)}\033[0m"


@contextmanager
def training_log(path: Path) -> Iterator[None]:
    """Keep the package's messages and every figure in a file, with timestamps; show the messages on standard error."""
    if not path.is_file():
        write_text(path, "")
    package = logging.getLogger("smollm_trm")
    to_file, to_screen = logging.FileHandler(path, encoding="utf-8"), logging.StreamHandler(AboveBars())
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    to_screen.setLevel(logging.INFO)
    to_screen.setFormatter(ColouredFormatter() if sys.stderr.isatty() else None)
    before = package.level, package.propagate
    package.setLevel(logging.DEBUG)
    package.propagate = False
    for handler in (to_file, to_screen):
        package.addHandler(handler)
    try:
        yield
    finally:
        package.setLevel(before[0])
        package.propagate = before[1]
        for handler in (to_file, to_screen):
            package.removeHandler(handler)
            handler.close()
