"""Before a run of train_all.sh: can it succeed here, and what will it take? Answers within a second, loads nothing.

torch is not imported, because that alone takes seconds.
"""

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import runtime
from runtime import memory, require

PROMPT = 256  # tokens; most of GSM8K's are shorter


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
    gradient_checkpointing: bool = False  # as in the scripts that train
    offload: bool = False  # as in ppo.py
    batch_size: int = 256  # answers that are sampled at once
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
    for name in ("micro_tokens", "batch_size", "new_tokens", "nproc"):
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
    gpu = _gpu_memory()
    student = memory.read_config(cfg.student)
    tokens = max(cfg.micro_tokens, PROMPT + cfg.new_tokens)  # a longer text is read alone
    flags = cfg.gradient_checkpointing, cfg.offload, bool(gpu)
    moments = [memory.ppo(*[student] * 4, cfg.batch_size, PROMPT, cfg.new_tokens, tokens, *flags)]
    if Path(cfg.teacher).is_dir():
        teacher = memory.read_config(cfg.teacher)
        width = memory.file_width(cfg.teacher, teacher) if gpu else 4
        moments.append(
            memory.sampling(teacher, cfg.batch_size, cfg.batch_size, PROMPT, cfg.new_tokens, bool(gpu), width)
        )
    needed = memory.with_process(memory.largest(*moments), bool(gpu))
    # in the end the weights of SFT, the reward model and two PPO runs; before, the second's checkpoint, twice for a
    # moment, and two states of policy and critic with their moments
    disk = (4 + 2 + 2 * 2 * 3) * 4 * memory.parameters(student) + 50e6
    place = next(folder for folder in [Path(cfg.run).resolve(), *Path(cfg.run).resolve().parents] if folder.exists())
    device, free_memory = gpu or ("memory", memory.available_memory())
    free_disk = shutil.disk_usage(place).free
    print(memory.sentence(needed, device, free_memory))
    print(f"needs up to {disk / 1e9:.1f} GB of disk; {free_disk / 1e9:.1f} GB are free", flush=True)
    require(place.is_dir() and os.access(place, os.W_OK), f"OUT={cfg.run}: {place} is no folder that can be written to")
    require(disk < free_disk, f"OUT={cfg.run}: {disk / 1e9:.1f} GB are needed there, {free_disk / 1e9:.1f} GB are free")
    if sum(needed.values()) > free_memory:
        print(f"warning: that is more {device} than is free; docs/scale.md says what needs less", file=sys.stderr)


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


if __name__ == "__main__":
    runtime.launch(main, Config)
