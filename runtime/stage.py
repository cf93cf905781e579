"""A stage: one script run that fills one folder.

    @runtime.stage                                # checks the flags, opens the folder cfg.out, skips what is done
    def main(cfg: Config, stage: runtime.Stage) -> None:
        for step in stage.steps(total, "loss {loss:.3f}", model=model, adam=adam):  # goes on where it was killed
            ...
            stage.log(step, {"loss": loss})
        stage.save(model, tokenizer)

`done.json`, written last, says what was done to what: the next run with the same flags and inputs skips the stage, any
other redoes it and keeps the old folder aside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from runtime import flags, ranks
from runtime.files import read_jsonl, sha256, sync, write_json


def stage(main: Callable) -> Callable:
    """main(cfg, stage) as main(cfg): the flags are checked, the folder is opened, what is done already is skipped."""

    @functools.wraps(main)
    def run(cfg) -> None:
        flags.check(cfg)
        opened = Stage(cfg)
        if opened.finished:
            return
        try:
            main(cfg, opened)
        except FloatingPointError as error:  # from steps.step, before a step was taken
            told = f"step {opened.step}: {error}; stopped"
            if (log := opened.folder / "metrics.jsonl").exists():
                told += f". {log} shows how it came; beside it is the last good model, if one was kept. "
                told += "Usual causes: a learning rate too high, a broken model"
            raise ValueError(told) from None

    return run


class Progress:
    """How far a loop is and how long it still takes, in lines that stay, on a terminal and piped alike: one after ten
    seconds and a fiftieth of the work, or `at_once`."""

    def __init__(self, label: str, total: int, first: int = 0):
        self.label, self.total, self.first = label, total, first
        self.count = self.said = first
        self.start = self.last = time.monotonic()

    def update(self, count: int = 1, note: str = "", at_once: bool = False) -> None:
        self.count += count
        now = time.monotonic()
        if at_once or (now - self.last >= 10 and self.count - self.said >= self.total / 50):
            self.last, self.said = now, self.count
            left = int((now - self.start) / (self.count - self.first) * (self.total - self.count))
            place = f"{self.count:{len(str(self.total))}}/{self.total}"
            print(self.label, place, *[note] * bool(note), f"left {left // 60}:{left % 60:02d}", flush=True)


def shown(text: str) -> str:
    """What a model said, on one line and harmless: a control character, of an escape sequence say, becomes its code."""
    line = text.replace("\n", " | ")
    return "".join(c if c.isprintable() else " " if c.isspace() else c.encode("unicode_escape").decode() for c in line)


def _hash(path: Path, flag: str) -> str:
    """SHA-256 of a file, or of a model folder's config, weights and tokenizer."""
    if not path.exists():
        raise FileNotFoundError(f"--{flag} {path}: there is no such file or folder")
    files, own = [path], ("done.json", "metrics.jsonl")
    if path.is_dir():
        read = {".json", ".jinja", ".jsonl", ".safetensors"}
        files = sorted(file for file in path.iterdir() if file.suffix in read and file.name not in own)
    digest = hashlib.sha256()
    for file in files:
        if file != path:  # a file counts by its contents, a folder's files by their names too
            digest.update(file.name.encode())
        digest.update(bytes.fromhex(sha256(file)))
    return digest.hexdigest()[:16]


LOCKS: dict[tuple[int, int], int] = {}  # folders that this process works in: (device, inode) -> handle


class Stage:
    """The folder `cfg.out` of one script run, which rank 0 alone writes to.

    Inputs count by the contents of their files, not by their names, so that a run folder can be moved; flags that
    change memory alone do not count. `finished` is True when done.json already says that this work is done.
    """

    def __init__(self, cfg):
        self.folder, self.start, self.step = Path(cfg.out), time.monotonic(), 0
        self.memory = flags.memory(cfg)
        hashes = {name: _hash(Path(path), name) for name, path in flags.inputs(cfg).items()}
        config = dataclasses.asdict(cfg)
        named = {"out", *hashes, *(name for name, value in config.items() if isinstance(value, tuple))}
        settings = {name: value for name, value in config.items() if name not in named}
        if self.memory and os.environ.get("PRECISION"):  # a script with such flags has a network
            settings["precision"] = os.environ["PRECISION"]
        self.record = {"config": config, "settings": settings, "inputs": hashes}
        self.done = self._read_done()
        self.finished = ranks.broadcast(self.done is not None and not self._changes(self.done))
        if self.finished:
            print(f"{self.folder.name}: done already ({self.done['seconds']:.0f} s), skipped", flush=True)
            if ranks.RANK == 0:  # a kill right after done.json leaves it
                shutil.rmtree(self.folder / "resume", ignore_errors=True)
            return
        place = next(path for path in [self.folder.resolve(), *self.folder.resolve().parents] if path.exists())
        good = place.is_dir() and os.access(place, os.W_OK)
        flags.require(good, f"--out {self.folder}: {place} is no folder to write to")
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

    def steps(self, total: int, note: str = "", units: Sequence[int] = (), **parts: object) -> Iterator[int]:
        """The steps that are left of a loop. `parts`, its networks and optimisers, are saved now and then and loaded
        again, so that a run that was killed goes on with the same bits. `note` is filled with what `log` is given;
        `units` is how much of the work each step is, else 1."""
        from runtime.checkpoint import Checkpoint

        state = Checkpoint(self, parts)
        units = units or [1] * total
        self.note, self.progress = note, Progress(self.folder.name, sum(units), sum(units[: state.step]))
        for self.step in state.steps(total):
            yield self.step

    def log(self, step: int, metrics: dict[str, float], line: str = "") -> None:
        """A line of metrics.jsonl, and on the screen `line`, or else the note of `steps` now and then."""
        self.append("metrics.jsonl", json.dumps({"step": step, **metrics}) + "\n")
        self.progress.update(1, line or self.note.format_map(metrics), at_once=bool(line))

    def logged(self) -> list[dict]:
        """What `log` was given so far, with the step."""
        return self.rows("metrics.jsonl")

    def append(self, name: str, text: str) -> None:
        """Add to a text file, one of checkpoint.GROWING: what was added after the last saved state is cut off again."""
        if ranks.RANK == 0:
            with (self.out / name).open("a", encoding="utf-8") as file:
                file.write(text)

    def rows(self, name: str) -> list[dict]:
        """The objects of a JSONL that `append` filled. Call on every rank."""
        path = self.folder / name
        return ranks.broadcast(list(read_jsonl(path)) if ranks.RANK == 0 and path.exists() else [])

    def keep(self, model, tokenizer) -> None:
        """Write the model into the folder as it is now; done.json is still missing, so the stage is not over."""
        full = ranks.full_model(model)
        if ranks.RANK == 0:
            full.save(self.out, tokenizer.stop_ids)
            tokenizer.save(self.out)

    def save(self, model, tokenizer, **results: object) -> None:
        """The trained model, and done.json."""
        self.keep(model, tokenizer)
        self.finish(**results)

    def finish(self, tokens: int = 0, flops: float = 0.0, **results: object) -> None:
        """Write done.json: what was asked, what it cost, what came out. `results` are the stage's own numbers."""
        if ranks.RANK:
            return
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
            "versions": {"torch": importlib.metadata.version("torch"), "python": sys.version.split()[0]},
            "ranks": ranks.SIZE,
        }
        write_json(self.out / "done.json", done)
        shutil.rmtree(self.out / "resume", ignore_errors=True)
        handle = LOCKS.pop((self.out.stat().st_dev, self.out.stat().st_ino), None)
        if handle is not None:
            os.close(handle)


def peak_memory_mb() -> float:
    """The most memory this process ever held, in MB: on the GPU where there is one, else resident."""
    torch = sys.modules.get("torch")  # a stage without a network does not wait for its import
    if torch and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
