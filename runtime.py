"""The process, never the maths: flags, errors, seeds, progress, metrics, and stages that finish once.

A stage is one script run that fills one folder. `done.json`, written last, says what was done to what; the next run
with the same flags and the same inputs skips the stage, any other redoes it and keeps the old folder aside.

As a script this is the preflight of train_all.sh. torch is imported where it is used, because that alone takes seconds
and a preflight should answer at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
import traceback
import typing
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

if typing.TYPE_CHECKING:
    import torch

# ---- flags and errors ----------------------------------------------------------------------------------------------


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
        kind = {"action": argparse.BooleanOptionalAction} if types[field.name] is bool else {"type": types[field.name]}
        if field.default is dataclasses.MISSING:
            parser.add_argument(f"--{field.name}", required=True, **kind)
        else:
            parser.add_argument(f"--{field.name}", default=field.default, help="default: %(default)s", **kind)
    return Config(**vars(parser.parse_args(argv)))


def launch(main: Callable, Config: type, argv: list[str] | None = None) -> None:
    """Run a script: parse its flags, call main, and turn the user's mistakes into one sentence and exit code 2.

    A ValueError, OSError or FloatingPointError raised by our own code is a message to the user; raised elsewhere, it is
    a bug and keeps its traceback. DEBUG=1 shows every traceback.
    """
    cfg = cli(Config, argv)
    try:
        main(cfg)
    except KeyboardInterrupt:
        print("\ninterrupted: finished stages are kept, the same command continues after them", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        ours = raised_in.parent == Path(__file__).resolve().parent
        if os.environ.get("DEBUG") or not (ours or isinstance(error, PermissionError)):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def require(condition: bool, message: str) -> None:
    """The user's input must satisfy a condition; else ValueError, which `launch` prints as one sentence."""
    if not condition:
        raise ValueError(message)


# ---- device, seeds, schedule ---------------------------------------------------------------------------------------


SMALL = 5e6  # parameters: below, a second thread costs more than it brings


def default_device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_threads(model: torch.nn.Module) -> None:
    """One thread for a small model, all of them for a larger one; where OMP_NUM_THREADS is set, it decides instead.

    A small layer is done in less time than threads need to meet: with 0.16M parameters two of them were five times
    slower than one on a busy machine.
    """
    import torch

    parameters = sum(p.numel() for p in model.parameters())
    if parameters < SMALL and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1)
    chosen = f"{torch.get_num_threads()} thread(s) for {parameters / 1e6:.2f}M parameters; OMP_NUM_THREADS=N to choose"
    print(chosen, file=sys.stderr, flush=True)  # stdout is for results


def mixed_precision() -> torch.autocast:
    """On a GPU matrix products in bf16; weights, norms, log-probs and values stay fp32. On a CPU all stays fp32."""
    import torch

    device = default_device().type
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


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

    def __init__(self, label: str, total: int):
        self.label, self.total, self.count = label, total, 0
        self.start = self.last = time.monotonic()
        self.bar = tqdm(total=total, desc=label, leave=False, dynamic_ncols=True) if sys.stderr.isatty() else None

    def update(self, count: int = 1, note: str = "") -> None:
        self.count += count
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(count)
        elif now - self.last >= 10:
            self.last = now
            left = int((now - self.start) / self.count * (self.total - self.count))
            print(f"{self.label} {self.count}/{self.total} {note} left {left // 60}:{left % 60:02d}", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


# ---- stages --------------------------------------------------------------------------------------------------------


class Stage:
    """The folder `cfg.out` of one script run.

    `inputs` names the fields of cfg that are paths; they count by the contents of their files, not by their names, so
    that a run folder can be moved. `finished` is True when done.json already says that this work is done.
    """

    def __init__(self, cfg, inputs: typing.Iterable[str] = ()):
        self.out, self.start = Path(cfg.out), time.monotonic()
        config = dataclasses.asdict(cfg)
        paths = {name: config[name] for name in inputs if config[name]}
        # a question set may be a name such as arith:test instead of a file
        hashes = {
            name: _hash(Path(path), name) for name, path in paths.items() if Path(path).exists() or ":" not in path
        }
        settings = {name: value for name, value in config.items() if name != "out" and name not in hashes}
        self.record = {"config": config, "settings": settings, "inputs": hashes}
        done = self._read_done()
        self.finished = done is not None and all(done.get(key) == self.record[key] for key in ("settings", "inputs"))
        if self.finished:
            print(f"{self.out}: done already ({done['seconds']:.0f} s), skipped", flush=True)
            return
        if done is not None:
            changed = [
                f"{key} {done[part].get(key)} -> {self.record[part].get(key)}"
                for part in ("settings", "inputs")
                for key in {**done[part], **self.record[part]}
                if done[part].get(key) != self.record[part].get(key)
            ]
            aside = next(
                path for i in range(1, 10**6) if not (path := self.out.with_name(f"{self.out.name}.old{i}")).exists()
            )
            self.out.rename(aside)
            print(f"{self.out}: redone, the old one is kept in {aside.name} ({'; '.join(changed)[:200]})", flush=True)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "metrics.jsonl").unlink(missing_ok=True)  # of an attempt that was cut off

    def _read_done(self) -> dict | None:
        """done.json if it is whole and the files it lists are still there at their sizes."""
        try:
            done = json.loads((self.out / "done.json").read_text(encoding="utf-8"))
            whole = all((self.out / name).stat().st_size == size for name, size in done["outputs"].items())
            return done if whole and {"settings", "inputs", "seconds"} <= done.keys() else None
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return None

    def log(self, step: int, **values: float) -> None:
        """Append one line to metrics.jsonl."""
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def finish(self, tokens: int = 0, flops: float = 0.0, **results: object) -> None:
        """Write done.json: what was asked, what it cost, what came out. `results` are the stage's own numbers."""
        import torch

        outputs = {
            str(path.relative_to(self.out)): path.stat().st_size
            for path in sorted(self.out.rglob("*"))
            if path.is_file() and path.name != "done.json"
        }
        done = self.record | {
            "seconds": round(time.monotonic() - self.start, 2),
            "peak_memory_mb": round(peak_memory_mb()),
            "tokens": int(tokens),
            "flops": float(flops),
            "results": results,
            "outputs": outputs,
            "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
            "threads": torch.get_num_threads(),
        }
        write_json(self.out / "done.json", done)


def write_json(path: Path, value: object) -> None:
    """Write under a temporary name, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


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
        with file.open("rb") as stream:
            digest.update(
                hashlib.file_digest(stream, "sha256").digest()
                if hasattr(hashlib, "file_digest")
                else hashlib.sha256(stream.read()).digest()
            )
    return digest.hexdigest()[:16]


# ---- the script: preflight -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """Check, before anything is loaded, that a run of train_all.sh can succeed here, and say what it will take."""

    run: str  # the run folder
    preset: str
    seed: int
    teacher: str  # model folder, or a JSONL of recorded answers
    student: str  # model folder
    questions: str  # question set
    teacher_test: str = ""  # recorded answers to the test questions
    micro_tokens: int = 4096  # tokens that are trained at once
    new_tokens: int = 256  # the longest answer
    needs: str = ""  # what the preset takes, in words
    hub: str = ""  # where the preset's default models are published: an organisation on huggingface.co


def main(cfg: Config) -> None:
    versions = []
    for package in ("torch", "tokenizers", "safetensors", "numpy"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(f"{package} is not installed: pip install -r requirements.txt") from None
    print(f"preset {cfg.preset} · seed {cfg.seed} · run {cfg.run}")
    print(
        f"{' · '.join(versions)} · python {platform.python_version()} · {os.cpu_count()} cores, "
        f"threads: {os.environ.get('OMP_NUM_THREADS') or 'by the size of the model'}"
    )
    print(f"teacher {cfg.teacher} · student {cfg.student} · questions {cfg.questions}")
    print(f"the preset is made for: {cfg.needs or 'not stated'}", flush=True)
    if cfg.questions not in ("arith", "gsm8k", "mmlu_pro"):
        require(Path(cfg.questions).is_file(), f"QUESTIONS={cfg.questions}: neither arith, gsm8k, mmlu_pro nor a file")
    require(
        not cfg.teacher_test or Path(cfg.teacher_test).is_file(),
        f"TEACHER_TEST={cfg.teacher_test}: there is no such file",
    )
    for name, folder in (("TEACHER", cfg.teacher), ("STUDENT", cfg.student)):
        recorded = name == "TEACHER" and Path(folder).is_file()
        require(
            recorded or Path(folder).is_dir(),
            f"{name}={folder}: there is no such {'file or ' * (name == 'TEACHER')}folder{_how_to_get(cfg.hub, folder)}",
        )
        for file in () if recorded else ("config.json", "tokenizer.json"):
            require((Path(folder) / file).is_file(), f"{name}={folder}: a model folder, but without {file}")
    student, teacher = _bytes_in_training(cfg), sum(f.stat().st_size for f in Path(cfg.teacher).glob("*.safetensors"))
    memory = 0.6e9 + max(student, 1.2 * teacher)  # the teacher is there alone, as it is in its files
    disk = 5 * 4 * _parameters(cfg.student) + 50e6
    place = next(folder for folder in [Path(cfg.run).resolve(), *Path(cfg.run).resolve().parents] if folder.exists())
    device, free_memory = _gpu_memory() or ("memory", available_memory())
    free_disk = shutil.disk_usage(place).free
    print(
        f"these models need about {memory / 1e9:.1f} GB of {device} ({free_memory / 1e9:.1f} GB are free) and "
        f"{disk / 1e9:.1f} GB disk ({free_disk / 1e9:.1f} GB are free)",
        flush=True,
    )
    require(os.access(place, os.W_OK), f"OUT={cfg.run}: {place} is not writable")
    require(disk < free_disk, f"OUT={cfg.run}: {disk / 1e9:.1f} GB are needed there, {free_disk / 1e9:.1f} GB are free")
    if memory > free_memory:
        print(f"warning: that is more {device} than is free; a smaller STUDENT= needs less", file=sys.stderr)


def _config(folder: str) -> dict:
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    require(isinstance(config, dict), f"{path} must hold a JSON object, not a {type(config).__name__}")
    return config


def _parameters(folder: str) -> float:
    """How many numbers a model folder holds, from the size of its weights."""
    config = _config(folder)
    width = 4 if "32" in str(config.get("torch_dtype") or config.get("dtype") or "float32") else 2
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / width


def _bytes_in_training(cfg: Config, prompt_tokens: int = 256, logits_at_once: int = 2**24) -> float:
    """Bytes that PPO takes with this student, for prompts of 256 tokens: most of GSM8K's are shorter.

    Two copies train in fp32 (weight, gradient, two moments: 16 bytes a parameter each) and two are frozen. One of them
    at a time keeps what its backward pass needs: about 15 vectors of the hidden and 4 of the inner size per layer and
    token (a longer text than --micro_tokens is read alone), and 3 of the vocabulary's size for a chunk of tokens.
    """
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    given = _config(cfg.student)  # a size that is missing or no number is refused when the model is loaded
    hidden, inner, layers, vocabulary = (given[key] if isinstance(given.get(key), int) else 0 for key in sizes)
    tokens = max(cfg.micro_tokens, prompt_tokens + cfg.new_tokens)
    kept = tokens * layers * (15 * hidden + 4 * inner) + 3 * min(tokens * vocabulary, logits_at_once)
    return 40 * _parameters(cfg.student) + 4 * kept


def _how_to_get(hub: str, folder: str) -> str:
    """How to download a preset's model; nothing for a folder of the user's own or a bundled one."""
    if not hub:
        return ""
    name = f"{hub}/{Path(folder).name}"
    licence = f"accept the licence on huggingface.co/{name}, run `hf auth login`, then " if hub == "meta-llama" else ""
    return f"; to get it: {licence}`pip install huggingface_hub && hf download {name} --local-dir {folder}`"


def _gpu_memory() -> tuple[str, float] | None:
    """Name and free bytes of the first GPU, without the seconds that importing torch takes; None without a GPU."""
    try:
        command = ["nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"]
        line = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines()[0]
        name, megabytes = line.rsplit(",", 1)
        return f"memory on {name}", float(megabytes) * 2**20
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None


def available_memory() -> float:
    """Bytes of memory that new processes can have; infinity where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024
    except (OSError, StopIteration):
        return float("inf")


if __name__ == "__main__":
    launch(main, Config)
