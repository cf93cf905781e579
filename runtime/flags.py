"""A script's command line: what a flag may be, errors in one sentence, signals. What stands around every `main`.

    iterations: Count = 60  # a whole number from 1 up: the type of a field of Config says its range

torch is imported where it is used: that alone takes seconds, and a mistake in the flags should be told at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import runpy
import shlex
import signal
import sys
import traceback
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

from runtime import ranks


class Range(NamedTuple):
    """From `low` to `high`, both allowed; what a user is told of any other number."""

    low: float
    high: float
    told: str


Count = Annotated[int, Range(1, math.inf, "must be 1 or more")]
Natural = Annotated[int, Range(0, math.inf, "must be 0 or more")]
Positive = Annotated[float, Range(5e-324, math.inf, "must be greater than 0")]
NotNegative = Annotated[float, Range(0, math.inf, "must not be negative")]
Share = Annotated[float, Range(0, 1, "must be from 0 to 1")]
Input = Annotated[str, "input"]  # a file or a folder: it counts by its contents, a changed one redoes the stage
Questions = Annotated[str, "input", "or a name"]  # a file, or the name of a question set such as arith:test
Inputs = Annotated[tuple[str, ...], "input"]  # words NAME=PATH
Function = Annotated[str, "input", "function"]  # FILE.py:NAME, a function of the user's own (`function`)

# These change the memory that is needed and not the result: a run that had too little goes on with less. train_all.sh
# has them under the same names.
AtOnce = Annotated[int, Range(1, math.inf, "must be 1 or more"), "memory"]  # rows or tokens
Saving = Annotated[bool, "memory"]


def check(cfg: object) -> None:
    """ValueError that names the first flag outside its range."""
    for name, kind in typing.get_type_hints(type(cfg), include_extras=True).items():
        for rule in getattr(kind, "__metadata__", ()):
            if isinstance(rule, Range) and not rule.low <= getattr(cfg, name) <= rule.high:
                raise ValueError(f"--{name} {getattr(cfg, name)}: {rule.told}")


def memory(cfg: object) -> list[str]:
    """The names of a Config's flags that change memory alone."""
    kinds = typing.get_type_hints(type(cfg), include_extras=True)
    return [name for name, kind in kinds.items() if "memory" in getattr(kind, "__metadata__", ())]


def inputs(cfg: object) -> dict[str, str]:
    """The paths that a Config names: {flag: path}, and of words NAME=PATH {NAME: path}. Empty ones are left out."""
    found = {}
    for name, kind in typing.get_type_hints(type(cfg), include_extras=True).items():
        if "input" in getattr(kind, "__metadata__", ()):
            value = getattr(cfg, name)
            value = value.rpartition(":")[0] if "function" in kind.__metadata__ else value
            words = [(name, value)] if isinstance(value, str) else [word.partition("=")[::2] for word in value]
            named = "or a name" in kind.__metadata__ and re.fullmatch(r"\w+(:\w*)?", value) and not Path(value).exists()
            found |= {key: path for key, path in words if path and not named}
    return found


def function(spec: str, flag: str) -> Callable:
    """The function that FILE.py:NAME names. Its file may import the project's own modules."""
    path, _, name = spec.rpartition(":")
    require(path.endswith(".py"), f"{flag} {spec}: FILE.py:NAME is expected")
    found = runpy.run_path(path).get(name)
    require(callable(found), f"{flag} {spec}: {path} has no function '{name}'")
    return found


# ---- the command line ----------------------------------------------------------------------------------------------


def cli(Config: type, argv: list[str] | None = None):
    """Parse the command line into a Config: one --flag per field of the dataclass. A bad flag exits with code 2.

    A field of type tuple[str, ...] takes the words that stand without a flag, one at least.
    """
    parser = argparse.ArgumentParser(description=Config.__doc__, allow_abbrev=False)
    types = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        if types[field.name] == tuple[str, ...]:
            parser.add_argument(field.name, nargs="+")
            continue
        kind = {"type": {float: _finite}.get(types[field.name], types[field.name])}
        if types[field.name] is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        if field.default is dataclasses.MISSING:
            parser.add_argument(f"--{field.name}", required=True, **kind)
        else:
            parser.add_argument(f"--{field.name}", default=field.default, help="default: %(default)s", **kind)
    cfg = Config(**vars(parser.parse_args(argv)))
    if not 0 <= getattr(cfg, "seed", 0) < 2**63:
        parser.error(f"argument --seed: {cfg.seed} is not between 0 and 2^63 - 1")
    return cfg


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise argparse.ArgumentTypeError(f"'{text}' is not a finite number")
    return value


def launch(main: Callable, Config: type, argv: list[str] | None = None, every_rank: bool = False) -> None:
    """Run a script: parse its flags, call main, and turn the user's mistakes into one sentence and exit code 2.

    A ValueError or FloatingPointError raised by our own code and any OSError is a message to the user; a ValueError
    raised elsewhere is a bug and keeps its traceback. DEBUG=1 shows every traceback. Ctrl-C exits with 130 and SIGTERM
    with 143, after a loop with a checkpoint has saved its state, and with the command that goes on from there
    (CONTINUE, where a shell script runs the stages). Where memory did not suffice, code 2, and that command with less.
    Under torchrun rank 0 works alone, unless the script shares its work: `every_rank`.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a terminal in another encoding shows '?' and never ends a stage
        sys.stdout.reconfigure(errors="replace")
    if ranks.started_as()[0] and not every_rank:
        return
    try:
        with ranks.only_rank0_prints():
            cfg = cli(Config, argv)
            words = [Path(sys.executable).name, *(sys.argv if argv is None else [sys.argv[0], *argv])]
            _run(main, cfg, os.environ.get("CONTINUE") or shlex.join(words), every_rank)
    except SystemExit as end:
        ranks.leave(end.code)
        raise
    ranks.leave()


def _run(main: Callable, cfg: object, command: str, every_rank: bool) -> None:
    before = {number: signal.signal(number, _on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if every_rank:
            ranks.join()
        main(cfg)
    except KeyboardInterrupt as stop:
        if "CONTINUE" not in os.environ:  # else the shell script says so
            ranks.last_words(f"\nstopped; what is finished or saved is kept, and this goes on from there: {command}")
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
    except (MemoryError, RuntimeError) as error:
        if os.environ.get("DEBUG") or not out_of_memory(error):
            raise
        hint = " or ".join(smaller(cfg)) or "a smaller model"
        ranks.last_words(f"error: out of memory; what is finished or saved is kept, and {command} goes on with {hint}")
        sys.exit(2)
    except (ValueError, OSError, FloatingPointError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        root = Path(__file__).resolve().parent.parent
        ours = root in raised_in.parents and "site-packages" not in raised_in.parts  # a .venv may lie in the root
        if os.environ.get("DEBUG") or not (ours or isinstance(error, OSError)):
            raise
        text = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename:
            text = f"{error.filename}: {error.strerror}"
        ranks.last_words(f"error: {' '.join(text.split())}")
        sys.exit(2)
    finally:
        SIGNALS.wait = False
        for number, handler in before.items():
            signal.signal(number, handler)


def out_of_memory(error: Exception) -> bool:
    """Whether an error says so: Python's, PyTorch's of a GPU, and PyTorch's of a CPU, which is known by its text."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "DefaultCPUAllocator" in str(error)


def smaller(cfg: object) -> list[str]:
    """What needs less memory. Example: ["--micro_tokens 2048 (train_all.sh: micro_tokens=2048)"]."""
    found = []
    for flag in memory(cfg):
        value = getattr(cfg, flag)
        if type(value) is int and value > 1:
            found.append(f"--{flag} {value // 2} (train_all.sh: {flag}={value // 2})")
        elif value is False:
            found.append(f"--{flag} (train_all.sh: {flag}=1)")
    return found


# a loop that can save its state sets `wait`, and looks at `came` after each step
SIGNALS = types.SimpleNamespace(wait=False, came=None)


def _on_signal(number: int, frame: object) -> None:
    """Stop at once; in a loop that can save its state after the step at work, unless the same signal comes twice."""
    if not SIGNALS.wait or SIGNALS.came == number:
        raise KeyboardInterrupt(number)
    SIGNALS.came = number
    if ranks.RANK == 0:
        os.write(2, b"\nstopping after this step; once more stops at once\n")  # print may be what was interrupted


def require(condition: bool, message: str) -> None:
    """The user's input must satisfy a condition; else ValueError, which `launch` prints as one sentence."""
    if not condition:
        raise ValueError(message)
