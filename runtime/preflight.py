"""Before a run of train_all.sh: can it succeed here, and what will it take? Answers within a second, without torch.

Memory is estimated from the sizes in config.json, part by part, to within a fifth of what was measured
(docs/running.md). V is the size of the vocabulary, D of a hidden state, F of the feed-forward, Q and K of all query and
all key heads.
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
from runtime.flags import Count, Natural, check, require
from runtime.steps import bf16

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
    micro_tokens: Count = 4096  # tokens that are trained at once
    gradient_checkpointing: bool = False  # as in the scripts that train
    lora: Natural = 0  # as in the scripts that train
    batch_size: Count = 256  # answers that are sampled at once
    max_new_tokens: Count = 256  # the longest answer
    changed: str = ""  # numbers of the preset that the environment has set
    needs: str = ""  # what the preset takes, in words
    hub: str = ""  # where the preset's default models are published: an organisation on huggingface.co
    nproc: Count = 1  # ranks, one per GPU where there are any
    rounds: Count = 1  # of sampling, vote, reward model and PPO


def main(cfg: Config) -> None:
    try:
        torch, *_ = map(importlib.metadata.version, ("torch", "tokenizers", "safetensors", "numpy", "matplotlib"))
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install -r requirements.txt") from None
    threads = os.environ.get("OMP_NUM_THREADS") or "by the size of the model"
    print(f"preset {cfg.preset}, seed {cfg.seed}; made for {cfg.needs or 'what it does not say'}")
    if cfg.changed:
        print(f"numbers that the environment has set: {cfg.changed}")
    for name in ("run", "questions", "teacher", "student"):
        print(f"{name:9} {getattr(cfg, name)}")
    versions = f"python {platform.python_version()}, torch {torch}"
    print(f"{versions}, {os.cpu_count()} cores, threads {threads}", flush=True)
    check(cfg)
    if cfg.nproc > 1:
        check_ranks(cfg.nproc)
    check_inputs(cfg)
    check_room(cfg)


def check_ranks(nproc: int) -> None:
    torch_version = importlib.metadata.version("torch").split("+")[0]
    new_enough = tuple(map(int, torch_version.split(".")[:2])) >= (2, 6)
    require(new_enough, f"NPROC={nproc}: fully_shard came with torch 2.6, this is {torch_version}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = len(_gpus()) if visible is None else sum(name.strip() not in ("", "-1") for name in visible.split(","))
    require(not gpus or nproc <= gpus, f"NPROC={nproc}: each rank needs a GPU, and there are {gpus}")


def check_inputs(cfg: Config) -> None:
    known = cfg.questions in ("arith", "gsm8k", "mmlu_pro", "mawps") or Path(cfg.questions).is_file()
    require(known, f"QUESTIONS={cfg.questions}: neither arith, gsm8k, mmlu_pro, mawps nor a file")
    recorded = not cfg.teacher_test or Path(cfg.teacher_test).is_file()
    require(recorded, f"TEACHER_TEST={cfg.teacher_test}: there is no such file")
    for name, place in (("TEACHER", Path(cfg.teacher)), ("STUDENT", Path(cfg.student))):
        if name == "TEACHER" and place.is_file():  # recorded answers
            continue
        kind = "file or folder" if name == "TEACHER" else "folder"
        require(place.is_dir(), f"{name}={place}: there is no such {kind}{_how_to_get(cfg.hub, place)}")
        adapter = (place / "adapter_config.json").is_file()
        for file in ("config.json", "tokenizer.json"):
            told = "an adapter: merge it into its model first" if adapter else f"a model folder, but without {file}"
            require((place / file).is_file(), f"{name}={place}: {told}")


def _how_to_get(hub: str, folder: Path) -> str:
    """How to download a preset's model; nothing for a folder of the user's own or a bundled one."""
    if not hub:
        return ""
    name = f"{hub}/{folder.name}"
    licence = f"accept the licence on huggingface.co/{name}, run `hf auth login`, then " if hub == "meta-llama" else ""
    return f"; to get it: {licence}`pip install huggingface_hub && hf download {name} --local-dir {folder}`"


def check_room(cfg: Config) -> None:
    """Say what memory and disk the run takes. Too little memory is a warning, because the memory is an estimate."""
    from hf.folder import read_config  # not before it is known that its packages are installed

    gpus, student = _gpus(), read_config(cfg.student)
    device, free = gpus[0] if gpus else ("memory", _available_memory())
    moments = ppo_moments(cfg, student, bool(gpus))
    if Path(cfg.teacher).is_dir():
        width = 2 if bf16(bool(gpus)) else 4  # of published weights
        moments.append(sampling(read_config(cfg.teacher), cfg.batch_size, cfg.max_new_tokens, bool(gpus), width))
    needed = max(moments, key=lambda parts: sum(parts.values()))
    needed["process"] = 0.6e9 if gpus else 0.27e9  # what CUDA keeps for itself; Python with its libraries
    if bf16(False) and not gpus:  # oneDNN, which multiplies in bf16, keeps something of every shape that it has met
        needed["process"] += min(2e9, 16 * parameters(student))
    told = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in needed.items() if size >= 5e6)
    ranks = f" (on one device: {cfg.nproc} ranks share the weights)" if cfg.nproc > 1 else ""
    total = sum(needed.values())
    print(f"needs about {total / 1e9:.1f} of {free / 1e9:.1f} GB {device} ({told}){ranks}")

    # the weights of SFT and of PPO on the raw vote, and of each round's reward model and PPO; while PPO runs its policy
    # is kept, twice for a moment, and two states of what learns in policy and critic, with its moments
    policy = learner(student, bool(gpus), False, cfg.lora)
    disk = (2 + 2 * cfg.rounds + 2) * policy["weights"] + 2 * 2 * 1.5 * policy["moments"] + 50e6
    run = Path(cfg.run).resolve()
    place = next(folder for folder in [run, *run.parents] if folder.exists())
    free_disk = shutil.disk_usage(place).free
    print(f"needs up to {disk / 1e9:.1f} of {free_disk / 1e9:.1f} GB disk", flush=True)
    require(place.is_dir() and os.access(place, os.W_OK), f"OUT={cfg.run}: {place} is no folder that can be written to")
    require(disk < free_disk, f"OUT={cfg.run}: {disk / 1e9:.1f} GB are needed there, {free_disk / 1e9:.1f} GB are free")
    if total > free and cfg.nproc == 1:
        print("warning: that is more than is free; docs/running.md says what needs less", file=sys.stderr)


# ---- memory, in bytes ----------------------------------------------------------------------------------------------


def parameters(config: dict, scalar: bool = False) -> int:
    """How many numbers a language model has, tied embeddings once; or a scalar model, whose head is one row."""
    V, D, F, Q, K = _letters(config)
    block = 2 * D * (Q + K) + 3 * D * F + 2 * D + config["mlp_bias"] * (2 * F + D)
    block += config["attention_bias"] * (Q + 2 * K + D * (config["model_type"] != "qwen2"))
    head = D if scalar else V * D * (not config["tie_word_embeddings"])
    return V * D + config["num_hidden_layers"] * block + D + head


def _letters(config: dict) -> tuple[int, int, int, int, int]:
    """V, D, F, Q, K."""
    Q, K = (config[heads] * config["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
    return config["vocab_size"], config["hidden_size"], config["intermediate_size"], Q, K


def adapters(config: dict, rank: int) -> int:
    """How many numbers the adapters of a rank have: A and B of each linear map of the blocks (lora.py)."""
    _, D, F, Q, K = _letters(config)
    return rank * config["num_hidden_layers"] * (7 * D + 2 * Q + 2 * K + 3 * F)


def learner(config: dict, cuda: bool, scalar: bool, lora: int) -> dict[str, float]:
    """A network that learns: fp32 with Adam's moments, or frozen, in bf16 on a GPU, with adapters that have them."""
    N = parameters(config, scalar)
    if not lora:
        return {"weights": 4 * N, "moments": 8 * N}
    return {"weights": (2 if bf16(cuda) else 4) * N + 4 * adapters(config, lora), "moments": 8 * adapters(config, lora)}


def training(
    config: dict, tokens: int, checkpointing: bool, cuda: bool, scalar: bool = False, lora: int = 0
) -> dict[str, float]:
    """A network's optimiser step in passes of `tokens` tokens.

    A block keeps of a token: inputs, scaled inputs and outputs of two norms, q, k, v, what attention found, and four
    of the feed-forward. In bf16 (autocast) a part of that takes half, all of it where the weights are bf16 too; else
    bf16 copies of the weights wait for the backward pass. On a CPU gradients lie between what is kept, and glibc does
    not give back the holes: 0.6 of it.
    """
    V, D, F, Q, K = _letters(config)
    layers, parts = config["num_hidden_layers"], learner(config, cuda, scalar, lora)
    of_block = tokens * ((2 if lora else 2.6) if bf16(cuda) else 4) * (6 * D + 2 * Q + 2 * K + 4 * F)
    kept = tokens * layers * 4 * D + of_block if checkpointing else layers * of_block
    at_work, holes = tokens * 4 * (3 * F + 2 * D), 0 if cuda else 0.6 * layers * of_block
    if bf16(cuda) and not checkpointing and not lora:
        parts["weights"] += 2 * (parameters(config, scalar) - V * D)
    logits = 0 if scalar else 8 * min(tokens * V, 2**24)  # in chunks
    if not (scalar or lora):
        logits += 8 * V * D  # the gradient of the head, and a part of it
    return parts | {"gradients": parts["moments"] / 2, "activations": kept + at_work + holes, "logits": logits}


def sampling(config: dict, rows: int, new: int, cuda: bool, width: int = 4) -> dict[str, float]:
    """`rows` answers of up to `new` tokens at once; weights and cache have `width` bytes a number."""
    V, D, F, Q, K = _letters(config)
    read = min(rows * PROMPT, 2**16 if cuda else 2**11) * width * (max(3 * F, 5 * Q) + 4 * D)  # a part of the prompts
    drawn = 16 * rows * V  # logits, probabilities, and their sums in float64
    cache = 2 * config["num_hidden_layers"] * rows * (PROMPT + new) * K * width
    return {"weights": width * parameters(config), "moments": 0, "cache": cache, "activations": max(read, drawn)}


def ppo_moments(cfg: Config, student: dict, cuda: bool) -> list[dict[str, float]]:
    """PPO's three: sampling, a step of the policy, a step of the critic."""
    tokens = max(cfg.micro_tokens, PROMPT + cfg.max_new_tokens)  # a longer text is read alone
    policy, critic = (learner(student, cuda, scalar, cfg.lora) for scalar in (False, True))
    sample = sampling(student, cfg.batch_size, cfg.max_new_tokens, cuda, 2 if cfg.lora and bf16(cuda) else 4) | policy
    steps = [training(student, tokens, cfg.gradient_checkpointing, cuda, scalar, cfg.lora) for scalar in (False, True)]
    for parts, other in ((sample, critic), (steps[0], critic), (steps[1], policy)):
        parts["weights"] += other["weights"]
        parts["moments"] += other["moments"]
        if not cfg.lora:  # reference and reward model: without adapters they are copies
            parts["frozen"] = 4 * (parameters(student) + parameters(student, scalar=True))
    return [sample, *steps]


def _available_memory() -> float:
    """Bytes of memory that new processes can have; infinity where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024
    except (OSError, StopIteration):
        return float("inf")


def _gpus() -> list[tuple[str, float]]:
    """Name and free bytes of each GPU, without the seconds that importing torch takes."""
    command = ["nvidia-smi", "--query-gpu=name,memory.free", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.splitlines()
        pairs = [line.rsplit(",", 1) for line in lines]
        return [(f"memory on {name}", float(megabytes) * 2**20) for name, megabytes in pairs]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


if __name__ == "__main__":
    runtime.launch(main, Config)
