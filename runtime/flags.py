"""Flags, errors and signals of a script: what stands around its `main`.

torch is imported where it is used: that alone takes seconds, and a mistake in the flags should be told at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shlex
import signal
import sys
import traceback
import types
import typing
from collections.abc import Callable
from pathlib import Path

from runtime import ranks


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
    if not 0 <= getattr(cfg, "seed", 0) < 2**32:
        parser.error(f"argument --seed: {cfg.seed} is not between 0 and 2^32 - 1")
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
    if ranks.started_as()[0] and not every_rank:
        return
    try:
        with ranks.quiet():
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
        ranks.tell(f"\nstopped; what is finished or saved is kept, and this goes on from there: {command}")
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
    except (MemoryError, RuntimeError) as error:
        if os.environ.get("DEBUG") or not out_of_memory(error):
            raise
        if flag := smaller(cfg, error):
            name, *value = flag.split()  # of a script; a shell script has it in capitals
            setting = f"{name.strip('-').upper()}={(value or ['1'])[0]} bash "
            again = command.replace("bash ", setting, 1) if "CONTINUE" in os.environ else f"{command} {flag}"
            hint = f"what is finished or saved is kept, and this goes on from there with less: {again}"
        else:
            hint = "no flag is left that needs less: take a smaller model"
        ranks.tell(f"error: out of memory; {hint}")
        sys.exit(2)
    except (ValueError, OSError, FloatingPointError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        ours = Path(__file__).resolve().parent.parent in raised_in.parents
        if os.environ.get("DEBUG") or not (ours or isinstance(error, OSError)):
            raise
        text = str(error)
        if isinstance(error, OSError) and error.strerror and error.filename:
            text = f"{error.filename}: {error.strerror}"
        ranks.tell(f"error: {' '.join(text.split())}")
        sys.exit(2)
    finally:
        SIGNALS.wait = False
        for number, handler in before.items():
            signal.signal(number, handler)


def out_of_memory(error: Exception) -> bool:
    """Whether an error says so: Python's, PyTorch's of a GPU, and PyTorch's of a CPU, which is known by its text."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "DefaultCPUAllocator" in str(error)


def smaller(cfg, error: Exception) -> str:
    """The one flag to change when memory did not suffice, by where that was; '' if none is left.

    Fewer rows where it sampled, fewer tokens in a pass of training, at first; then what costs time.
    """
    import torch

    at = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    has = vars(cfg)
    if "generate" in at and has.get("batch_size", 0) > 1:
        return f"--batch_size {cfg.batch_size // 2}"
    state = at & {"load_model", "load_scalar_model", "step", "place"}  # what is there in any case
    if has.get("micro_tokens", 0) >= 1024 and not state:  # below, a text of usual length is alone anyway
        return f"--micro_tokens {cfg.micro_tokens // 2}"
    if has.get("gradient_checkpointing") is False and not state:
        return "--gradient_checkpointing"
    return "--offload" if has.get("offload") is False and torch.cuda.is_available() else ""


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
