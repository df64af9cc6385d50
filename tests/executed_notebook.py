"""The built notebook, executed in an empty folder, without the library and without a network."""

import os
import resource
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "smollm_trm_colab.ipynb"
HIDING = '''
"""Hides the library from the kernel, and the network from everything in it."""
import importlib.abc
import socket
import sys


class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "smollm_trm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hidden())
connect = socket.socket.connect


def connect_at_home(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
        raise OSError(f"the network is off: {address}")
    return connect(self, address)


socket.socket.connect = connect_at_home
'''
GUARD = """
import socket
try:
    import smollm_trm
except ModuleNotFoundError:
    print("the library is hidden")
try:
    socket.create_connection(("192.0.2.1", 80), timeout=5)
except OSError as error:
    print(error)
"""
"""Run before everything else, to prove that the two are out of reach."""
FEWER = {
    '"max_steps": 600': '"max_steps": 4',
    '"max_steps": 900': '"max_steps": 4',
    '"reasoner_steps": 300': '"reasoner_steps": 2',
    '"val_check_interval": 200': '"val_check_interval": 2',
    '"save_every_n_steps": 300': '"save_every_n_steps": 2',
    '"base_steps": 1000': '"base_steps": 4',
    '"word_problems": 40_000': '"word_problems": 200',
    '"dev": 256, "compared": 1000': '"dev": 8, "compared": 4',
    "test=300": "test=4",
}
"""Changes that cut the smoke run down to seconds; nothing is learnt then."""


SHOWN = ("text/html", "text/markdown")


class ExecutedNotebook:
    """A run of the notebook and what it left behind."""

    def __init__(
        self,
        folder: Path,
        changes: dict[str, str] | None = None,
        *,
        twice: bool = False,
        packages: Path | None = None,
        path: Path = NOTEBOOK,
    ) -> None:
        """Run it.

        Args:
            folder: everything goes here.
            changes: text of one code cell -> what stands there instead.
            twice: press "Run all" a second time, in the same kernel; `again` holds the cells of that.
            packages: folder of packages that come before the installed ones.
            path: of the notebook.
        """
        site = folder / "site"
        site.mkdir(parents=True)
        (site / "sitecustomize.py").write_text(HIDING)
        self.folder = folder / "run"
        self.folder.mkdir()
        notebook = nbformat.read(path, as_version=4)
        for old, new in (changes or {}).items():
            [cell] = [cell for cell in notebook.cells if cell.cell_type == "code" and old in cell.source]
            cell.source = cell.source.replace(old, new)
        notebook.cells.insert(0, nbformat.v4.new_code_cell(GUARD))
        count = len(notebook.cells)
        if twice:
            notebook.cells += [nbformat.from_dict({**cell, "id": f"{cell.id}-again"}) for cell in notebook.cells]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.endswith(("_TOKEN", "_API_KEY"))},
            "PYTHONPATH": os.pathsep.join(str(place) for place in (site, packages) if place),
            "HF_HUB_OFFLINE": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "OMP_NUM_THREADS": "1",
        }
        client = NotebookClient(
            notebook,
            timeout=1800,
            startup_timeout=300,
            resources={"metadata": {"path": str(self.folder)}},
            allow_errors=False,
        )
        client.create_kernel_manager()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        client.execute(env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.cells, self.again = client.nb.cells[:count], client.nb.cells[count:]
        nbformat.write(client.nb, folder / "executed.ipynb")

    def output(self, inside: str, *, again: bool = False) -> str:
        """What the cell with this text printed, the first time or when run again."""
        cells = self.again if again else self.cells
        run_cells = [cell for cell in cells if cell.cell_type == "code" and not cell.source.startswith("#@title")]
        cell = next(cell for cell in run_cells if inside in cell.source)
        return "".join(
            one.get("text", "") or next((data[kind] for kind in SHOWN if kind in (data := one.get("data", {}))), "")
            for one in cell.outputs
            if one.get("name") != "stderr"
        )
