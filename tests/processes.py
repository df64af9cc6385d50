"""Processes of their own for tests, forked from one server that has imported the libraries once."""

import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_only

LIBRARIES = ["pytest", "peft", "pytorch_lightning", "datasets", "scipy.stats", "matplotlib.figure"]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(LIBRARIES)


def call(module: str, function: str, arguments: tuple, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))  # as Lightning finds it when it is imported
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    getattr(import_module(module), function)(*arguments)


def started(module: str, function: str, *arguments: Any, **environment: str) -> BaseProcess:
    """A process that calls a function of a module of the tests."""
    process = SERVER.Process(target=call, args=(module, function, arguments, environment))
    process.start()
    return process


def forked(module: str, function: str, runs: Sequence[tuple[tuple, int]]) -> None:
    """For a process of its own: call a function with each arguments of `runs`, and compare the exit code.

    One after the other, each in a fork of that process: what the module needs is imported once for all.
    """
    work = getattr(import_module(module), function)
    for arguments, expected in runs:
        if (child := os.fork()) == 0:
            try:
                work(*arguments)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        if (code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) != expected:
            sys.exit(f"{function}{arguments} ended with {code}, not {expected}")


def ended(process: BaseProcess) -> int:
    """Its exit code: 0, 1 after an exception (its traceback is on standard error), or minus the signal."""
    process.join(timeout=280)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode
