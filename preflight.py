"""Before a run of train_all.sh: can it succeed here, and what will it take? Answers within a second, loads nothing.

torch is not imported, because that alone takes seconds.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import runtime
from runtime import require


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
    nproc: int = 1  # ranks, one per GPU where there are any


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
    for name in ("micro_tokens", "new_tokens", "nproc"):
        require(getattr(cfg, name) > 0, f"--{name} {getattr(cfg, name)}: must be greater than 0")
    torch_version = importlib.metadata.version("torch").split("+")[0]
    old = cfg.nproc > 1 and tuple(map(int, torch_version.split(".")[:2])) < (2, 6)
    require(not old, f"NPROC={cfg.nproc}: fully_shard came with torch 2.6, this is {torch_version}")
    gpus = _gpus() if cfg.nproc > 1 else 0
    require(not gpus or cfg.nproc <= gpus, f"NPROC={cfg.nproc}: a GPU for each rank is needed, and there are {gpus}")
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
    require(place.is_dir() and os.access(place, os.W_OK), f"OUT={cfg.run}: {place} is no folder that can be written to")
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


def _gpus() -> int:
    """How many GPUs there are to share, without the seconds that importing torch takes."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return sum(name.strip() not in ("", "-1") for name in visible.split(","))
    try:
        return len(subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=5, check=True).stdout.splitlines())
    except (OSError, subprocess.SubprocessError):
        return 0


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
    runtime.launch(main, Config)
