"""What every run leaves beside its figures: versions, seed, command; and settings checked by name."""

import difflib
import json
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from io import TextIOBase
from math import inf
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from safetensors import SafetensorError

RECORDED_PACKAGES = ("smollm-trm", "torch", "transformers", "peft", "pytorch-lightning", "datasets", "trl")
UNFINISHED = ".part"
OTHER_RUN = "choose another output_dir, or resume='never' to start anew"
Settings = TypeVar("Settings")


class UserMistake(ValueError):
    """What a user can put right: one line that says what was wrong, where, and what to do."""


def name_hint(name: str, known: Sequence[str]) -> str:
    """What to say of an unknown name: the nearest of those known, or all of them."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"


def settings_from(kind: type[Settings], values: Mapping[str, Any] | None, where: str) -> Settings:
    """A settings dataclass from a mapping called `where`; unknown names and wrong types are refused by name."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    values = {name: str(value) if isinstance(value, Path) else value for name, value in (values or {}).items()}
    for name, value in values.items():
        if name not in names:
            raise UserMistake(f"{where}: unknown setting {name!r}; {name_hint(name, names)}")
        hint = get_type_hints(kind)[name]
        if not is_of_type(value, hint):
            wanted = hint.__name__ if get_origin(hint) is None and isinstance(hint, type) else hint
            found = "no finite number" if is_unreal(value) else type(value).__name__
            raise UserMistake(f"{where}: {name}={value!r} must be {wanted}, found {found}")
    return kind(**values)


def picked(settings: Any, *names: str) -> dict[str, Any]:
    """Some fields by their names."""
    return {name: getattr(settings, name) for name in names}


def check_range(least: float = 1, most: float = inf, **values: float | None) -> None:
    """Refuse, by name, a number outside of a range; None is left to a default."""
    for name, value in values.items():
        if value is not None and not least <= value <= most:
            limit = f"at least {least}" if value < least else f"at most {most}"
            raise UserMistake(f"{name}={value}: must be {limit}")


def check_choice(allowed: Iterable[str], **values: str) -> None:
    """Refuse, by name, a value that is none of those allowed."""
    for name, value in values.items():
        if value not in allowed:
            raise UserMistake(f"{name}={value!r}: choose one of {', '.join(allowed)}")


def check_choices(settings: Any, **choices: Iterable[str]) -> None:
    """Refuse, by name, what is not one of a field's choices."""
    for name, allowed in choices.items():
        check_choice(allowed, **picked(settings, name))


def check_folder(**folders: str) -> None:
    """Refuse, by name, the empty name of a folder, which would be the working folder."""
    for name, folder in folders.items():
        if not folder.strip():
            raise UserMistake(f"{name}: it is empty; name a folder")


def is_of_type(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that a field's annotation names, a list's elements too; no NaN, no infinity."""
    allowed = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    plain = [get_origin(one) or one for one in allowed]
    if isinstance(value, bool) or Any in plain:  # Python counts True as an int
        return bool in plain or Any in plain
    if isinstance(value, list) and list in plain:
        return all(is_of_type(one, get_args(allowed[plain.index(list)])[0]) for one in value)
    return isinstance(value, (*plain, int) if float in plain else tuple(plain)) and not is_unreal(value)


def is_unreal(value: Any) -> bool:
    """Whether a number is NaN, infinite or beyond what torch counts to."""
    return isinstance(value, int | float) and not abs(value) < 2**63


def installed_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def run_record() -> dict[str, Any]:
    """Command, versions and machine, as plain values."""
    program, given = Path(sys.argv[0]), [*map(without_local_paths, sys.argv[1:])]
    started = {"__main__.py": ["python", "-m", program.parent.name], "smollm-trm": ["smollm-trm"]}
    script = ["python"] * (program.suffix == ".py") + [without_local_paths(str(program))]
    return {
        "command": re.sub(r"'~/([\w./-]*)'", r"~/\1", shlex.join([*started.get(program.name, script), *given])),
        "versions": installed_versions(),
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
    }


def without_local_paths(text: str) -> str:
    """Absolute paths in a text made relative: below the working folder, below `~`, or else the last name alone."""
    for folder, short in ((Path.cwd(), "."), (Path.home(), "~")):
        text = re.sub(rf"(?<![\w.~/-]){re.escape(str(folder))}(?![^/\s'\",])/?", short + "/", text)
    return re.sub(r"(?<![\w.~/-])/(?:[^\s'\",=/]+/)*(?=[\w.])", "", text)


class AboveBars(TextIOBase):
    """Standard error for messages: they stand above a progress bar, not behind it."""

    def write(self, text: str) -> int:
        from tqdm import tqdm  # a command that says nothing does not wait for it

        tqdm.write(text, file=sys.stderr, end="")
        return len(text)


def first_line(error: Exception) -> str:
    """An error's message without its explanations."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file or folder beside `path`, flush and rename it: it is whole, or what was there stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{UNFINISHED}")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.old{UNFINISHED}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        for written in [*temporary.rglob("*"), temporary]:
            flush_to_disk(written)
        if temporary.is_dir() and path.exists():
            os.replace(path, replaced)
        os.replace(temporary, path)
        flush_to_disk(path.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        reason = getattr(error, "strerror", None) or first_line(error)
        advice = "free some disk space or choose another output folder"
        raise OSError(f"could not write {path}: {reason}; {advice}") from error
    finally:
        remove_path(temporary)
        remove_path(replaced)


def flush_to_disk(path: Path) -> None:
    """Have a file's content, or a folder's entries, on the disk before anything else happens."""
    with suppress(OSError) if path.is_dir() else nullcontext():  # not every system flushes a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_path(path: Path) -> None:
    """Remove a file or a folder, if it is there; a file with one name is emptied first: a mounted Drive keeps trash."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        if not path.is_symlink() and path.stat().st_nlink == 1:
            os.truncate(path, 0)
        path.unlink()


def remove_unfinished(folder: Path) -> None:
    """Remove what `write_whole` left in a folder when its process was killed."""
    for leftover in folder.glob(f".*{UNFINISHED}"):
        remove_path(leftover)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or leave what was there; see `write_whole`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or leave what was there; see `write_whole`."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))


def noted_settings(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError, RecursionError) as error:
        raise UserMistake(f"{path} is damaged: {OTHER_RUN}") from error


def refuse_other_settings(
    path: Path, settings: Mapping[str, Any], ignored: tuple[str, ...], anew: str = "resume='never'"
) -> None:
    """Refuse to go on with a run that was begun with other settings (JSON at `path`), but for the ignored names."""
    before, advice = noted_settings(path), OTHER_RUN.replace("resume='never'", anew)
    for name, now in json.loads(json.dumps(settings)).items():
        if name not in ignored and name in before and before[name] != now:
            raise UserMistake(f"{path.parent} holds a run with {name}={before[name]!r}, now it is {now!r}: {advice}")
