"""The process, never the maths: flags, errors, signals, seeds, progress, whole files, and stages that finish once.

A stage is one script run that fills one folder. `done.json`, written last, says what was done to what; the next run
with the same flags and the same inputs skips the stage, any other redoes it and keeps the old folder aside. What lets a
stage go on in its middle is in checkpoint.py.

torch is imported where it is used: that alone takes seconds, and a mistake in the flags should be told at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import random
import shlex
import shutil
import signal
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

import ranks

if typing.TYPE_CHECKING:
    import torch

# ---- flags, errors, signals ------------------------------------------------------------------------------------


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
        ours = raised_in.parent == Path(__file__).resolve().parent
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


# ---- device, seeds, schedule ---------------------------------------------------------------------------------------


SMALL = 5e6  # parameters: below, a second thread costs more than it brings


def default_device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_threads(model: torch.nn.Module, say: bool = True) -> None:
    """One thread for a small model, all of them for a larger one; where OMP_NUM_THREADS is set, it decides instead.

    A small layer is done in less time than threads need to meet: with 0.16M parameters two of them were five times
    slower than one on a busy machine.
    """
    import torch

    parameters = sum(p.numel() for p in model.parameters())
    if parameters < SMALL and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1)
    if say:
        threads = torch.get_num_threads()
        print(f"{threads} thread(s) for {parameters / 1e6:.2f}M parameters; OMP_NUM_THREADS=N to choose", flush=True)


def mixed_precision() -> torch.autocast:
    """On a GPU matrix products in bf16; weights, norms, log-probs and values stay fp32. On a CPU all stays fp32."""
    import torch

    device = default_device().type
    # no cache of weights in bf16: each is asked for once in a pass, and with checkpointing they would all be kept
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False)


def inference_dtype() -> torch.dtype | None:
    """What a model that only answers is loaded in: its file's type (None) on a GPU, fp32 on a CPU, where bf16 is slow.

    Measured on one core with SmolLM2-135M, batch 16: fp32 65 to 75 tokens/s, bf16 38 to 40.
    """
    import torch

    return None if default_device().type == "cuda" else torch.float32


def seed_all(seed: int) -> torch.Generator:
    """Seed python, numpy and torch; return a generator for what a script draws itself."""
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def lr_at(step: int, total: int, warmup: int) -> float:
    """Share of the peak learning rate at a step: linear up over `warmup` steps, then linear to 0 at `total`."""
    return min((step + 1) / max(warmup, 1), (total - step) / max(total - warmup, 1))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


# ---- progress ------------------------------------------------------------------------------------------------------


class Progress:
    """A bar with the time left on a terminal; a plain line every ten seconds where the output is piped."""

    def __init__(self, label: str, total: int, first: int = 0):
        self.label, self.total, self.first, self.count = label, total, first, first
        self.start = self.last = time.monotonic()
        options = {"total": total, "initial": first, "desc": label, "leave": False, "dynamic_ncols": True}
        self.bar = tqdm(**options) if sys.stderr.isatty() else None

    def update(self, count: int = 1, note: str = "") -> None:
        self.count += count
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif now - self.last >= 10:
            self.last = now
            left = int((now - self.start) / (self.count - self.first) * (self.total - self.count))
            print(f"{self.label} {self.count}/{self.total} {note} left {left // 60}:{left % 60:02d}", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


# ---- files ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[typing.IO]:
    """A file to be written, which takes the place of `path` once it is whole and on the disk; till then the old stands.

    A full disk, or a folder that cannot be written to, is an OSError that names `path`.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk does not say which file did not fit
            error.filename = error.filename or str(path)
        raise


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    if os.name != "nt":  # where folders cannot be opened
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: Path, value: object) -> None:
    """Write a file that is always whole: the new one or the old one."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _hash(path: Path, flag: str) -> str:
    """SHA-256 of a file, or of a model folder's config, weights and tokenizer."""
    if not path.exists():
        raise FileNotFoundError(f"--{flag} {path}: there is no such file or folder")
    files = (
        [path]
        if path.is_file()
        else sorted(
            file
            for file in path.iterdir()
            if file.suffix in (".json", ".jsonl", ".safetensors") and file.name not in ("done.json", "metrics.jsonl")
        )
    )
    digest = hashlib.sha256()
    for file in files:
        if file != path:  # a file counts by its contents, a folder's files by their names too
            digest.update(file.name.encode())
        digest.update(bytes.fromhex(sha256(file)))
    return digest.hexdigest()[:16]


# ---- stages --------------------------------------------------------------------------------------------------------


LOCKS: dict[tuple[int, int], int] = {}  # folders that this process works in: (device, inode) -> handle


class Stage:
    """The folder `cfg.out` of one script run, which rank 0 alone writes to.

    `inputs` names the fields of cfg that are paths; they count by the contents of their files, not by their names, so
    that a run folder can be moved; `memory` those that change what memory is needed and not what comes out, so that a
    run that had too little goes on with less. `finished` is True when done.json already says that this work is done.
    """

    def __init__(self, cfg, inputs: typing.Iterable[str] = (), memory: typing.Iterable[str] = ()):
        self.folder, self.start, self.memory = Path(cfg.out), time.monotonic(), frozenset(memory)
        config = dataclasses.asdict(cfg)
        paths = {name: config[name] for name in inputs if config[name]}
        # a question set may be a name such as arith:test instead of a file
        hashes = {
            name: _hash(Path(path), name) for name, path in paths.items() if Path(path).exists() or ":" not in path
        }
        settings = {name: value for name, value in config.items() if name != "out" and name not in hashes}
        self.record = {"config": config, "settings": settings, "inputs": hashes}
        self.done = self._read_done()
        self.finished = ranks.of_first(self.done is not None and not self._changes(self.done))
        if self.finished:
            print(f"{self.folder}: done already ({self.done['seconds']:.0f} s), skipped", flush=True)
            return
        place = next(path for path in [self.folder.resolve(), *self.folder.resolve().parents] if path.exists())
        require(place.is_dir() and os.access(place, os.W_OK), f"--out {self.folder}: {place} is no folder to write to")
        if self.folder.exists() and ranks.RANK == 0:
            self._lock()

    @functools.cached_property
    def out(self) -> Path:
        """The folder to fill, made by rank 0 when it first asks: once the inputs are known to be good, or a slip in one
        of them would push a finished stage aside. Then one that was made otherwise is kept under another name."""
        if ranks.RANK:
            return self.folder
        if (old := self.done or self._saved()) and (changes := self._changes(old)):
            names = (self.folder.with_name(f"{self.folder.name}.old{i}") for i in range(1, 10**6))
            aside = next(path for path in names if not path.exists())
            self.folder.rename(aside)
            text = "; ".join(changes)[:200]
            print(f"{self.folder}: redone, the old one is kept in {aside.name} ({text})", flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        for path in self.folder.rglob("*.tmp"):  # of an attempt that was cut off
            path.unlink()
        if not (self.folder / "resume").exists():
            (self.folder / "metrics.jsonl").unlink(missing_ok=True)
        return self.folder

    def _changes(self, old: dict) -> list[str]:
        """Which settings and inputs are other ones than those of an earlier run."""
        return [
            f"{key} {old[part].get(key)} -> {self.record[part].get(key)}"
            for part in ("settings", "inputs")
            for key in {**old[part], **self.record[part]}
            if old[part].get(key) != self.record[part].get(key) and key not in self.memory
        ]

    def _read_done(self) -> dict | None:
        """done.json if it is whole and the files it lists are still there as they were written."""
        try:
            done = json.loads((self.folder / "done.json").read_text(encoding="utf-8"))
            if not {"settings", "inputs", "seconds"} <= done.keys():
                return None
            for name, size in done["outputs"].items():
                path, digest = self.folder / name, done.get("sha256", {}).get(name)
                if not path.is_file() or path.stat().st_size != size or (digest and sha256(path) != digest):
                    print(f"{path} is not as it was written: the stage is done again", flush=True)
                    return None
            return done
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return None

    def _saved(self) -> dict | None:
        """Settings and inputs of the state that an attempt that was cut off saved."""
        for path in sorted((self.folder / "resume").glob("*.json"), reverse=True):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                saved = json.loads(path.read_text(encoding="utf-8"))
                return {"settings": dict(saved["settings"]), "inputs": dict(saved["inputs"])}
        return None

    def _lock(self) -> None:
        """Refuse a folder that another process works in. The system's lock ends with its process, even at kill -9."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        handle = os.open(self.folder, os.O_RDONLY)
        key = os.fstat(handle).st_dev, os.fstat(handle).st_ino
        if key in LOCKS:
            os.close(handle)
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            LOCKS[key] = handle
        except BlockingIOError:
            os.close(handle)
            raise ValueError(f"--out {self.folder}: another process is at work in this folder; wait for it") from None
        except OSError:  # a network's file system without locks
            os.close(handle)

    def log(self, step: int, **values: float) -> None:
        """Append one line to metrics.jsonl; rank 0 does it."""
        if ranks.RANK:
            return
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def finish(self, tokens: int = 0, flops: float = 0.0, **results: object) -> None:
        """Write done.json: what was asked, what it cost, what came out. `results` are the stage's own numbers."""
        import torch

        files = [path for path in sorted(self.out.rglob("*")) if path.is_file() and path.name != "done.json"]
        files = [path for path in files if path.relative_to(self.out).parts[0] != "resume"]
        for path in {*files, *(path.parent for path in files)}:
            sync(path)  # or a power cut could leave done.json and half of what it lists
        done = self.record | {
            "seconds": round(time.monotonic() - self.start, 2),
            "peak_memory_mb": round(peak_memory_mb()),
            "tokens": int(tokens),
            "flops": float(flops),
            "results": results,
            "outputs": {str(path.relative_to(self.out)): path.stat().st_size for path in files},
            "sha256": {str(path.relative_to(self.out)): sha256(path) for path in files},
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
            "threads": torch.get_num_threads(),
            "ranks": ranks.SIZE,
        }
        write_json(self.out / "done.json", done)
        shutil.rmtree(self.out / "resume", ignore_errors=True)
        handle = LOCKS.pop((self.out.stat().st_dev, self.out.stat().st_ino), None)
        if handle is not None:
            os.close(handle)


def peak_memory_mb() -> float:
    """The most memory this process ever held, in MB: on the GPU where there is one, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return 0.0  # no getrusage there
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
