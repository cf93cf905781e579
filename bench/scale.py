"""The computed tables of docs/scale.md: which flags fit which GPU, and a plan for students that need several.

    python bench/scale.py              # prints them; tests/test_memory.py compares

Bytes come from memory.py. For several GPUs they are shared out as FSDP2 does it: weights, gradients and moments of all
networks in fp32, 1/8 on each rank; a block is gathered when it computes; each rank samples its share of the answers
with a whole copy of the policy. Nothing here was measured; the assumptions about time are the constants below.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sides import SHAPES, llama

from model import ModelConfig
from runtime import memory

QWEN = ModelConfig(151936, 896, 4864, 24, 14, 2, 64, tie_word_embeddings=True, attention_bias=True, model_type="qwen2")
LLAMA_70B = llama(128256, 8192, 28672, 80, 64, 8, 128, tied=False)
PROMPT, NEW = 256, 320  # tokens of GSM8K's longer questions in the chat template, and of the presets' answers
RANKS, PEAK, BANDWIDTH, LINK = 8, 989e12, 3.35e12, 450e9  # H100: bf16 FLOP/s, its memory's and NVLink's bytes/s
SHARE = 0.3  # of the peak FLOP/s in training, and of both bandwidths: assumed, small matrices and waiting included
QUESTIONS, TEACHER_SAMPLES, STUDENT_SAMPLES, ITERATIONS, ROLLOUT = 7000, 4, 4, 150, 256  # as in train_all.sh
TEXT = 350  # tokens of question and answer, on average, 200 of them said: assumed
SAID = 200

ONE_GPU = [  # GPU in GB, name, config, BATCH_SIZE, MICRO_TOKENS, checkpointing, offload
    (8, "SmolLM2-135M", SHAPES["smollm2"].model, 64, 1024, False, False),
    (8, "SmolLM2-135M", SHAPES["smollm2"].model, 64, 1024, False, True),
    (16, "Qwen2.5-0.5B", QWEN, 128, 1024, False, False),
    (16, "Qwen2.5-0.5B", QWEN, 128, 1024, False, True),
    (24, "Llama-3.2-1B", SHAPES["llama-1b"].model, 128, 1024, False, True),
    (24, "Llama-3.2-1B", SHAPES["llama-1b"].model, 128, 1024, True, True),
    (80, "Llama-3.2-1B", SHAPES["llama-1b"].model, 256, 2048, False, False),
]


def one_gpu() -> list[str]:
    rows = ["| GPU, GB | student | flags | PPO | SFT | |", "|---|---|---|---|---|---|"]
    for room, name, config, batch, micro, checkpointing, offload in ONE_GPU:
        ppo = memory.ppo(*[config] * 4, batch, PROMPT, NEW, micro, checkpointing, offload, True)
        sft = memory.training(config, micro, checkpointing, True)
        need = [sum(memory.with_process(parts, True).values()) / 1e9 for parts in (ppo, sft)]
        flags = f"`BATCH_SIZE={batch} MICRO_TOKENS={micro}"
        flags += " GRADIENT_CHECKPOINTING=1" * checkpointing + " OFFLOAD=1" * offload + "`"
        fits = "fits" if max(need) < room else "does not fit"
        rows.append(f"| {room} | {name} | {flags} | {need[0]:.1f} | {need[1]:.1f} | {fits} |")
    return rows


def per_rank(config, micro: int) -> dict[str, float]:
    """Bytes of a rank's parts, of all its moments; the total is that of the larger moment."""
    N, C = memory.parameters(config), memory.parameters(config, scalar=True)
    V, D, *_ = memory.letters(config)
    block = (N - V * D * (1 if config.tie_word_embeddings else 2)) / config.num_hidden_layers
    step = memory.training(config, micro, True, True)
    sample = memory.sampling(config, ROLLOUT // RANKS, ROLLOUT // RANKS, PROMPT, NEW, True)
    parts = {
        "policy: weights, moments": 12 * N / RANKS,
        "critic: weights, moments": 12 * C / RANKS,
        "gradients of one": 4 * N / RANKS,
        "reference, reward model": 4 * (N + C) / RANKS,
        "gathered: two blocks, embedding, head": 4 * (2 * block + 2 * V * D),
        "activations, logits": step["activations"] + step["logits"] + step["holes"],
        "sampler's copy": 4 * N,
        "cache": sample["cache"],
        "reading prompts": sample["activations"],
    }
    sampling = {"sampler's copy", "cache", "reading prompts"}
    training = {"gradients of one", "gathered: two blocks, embedding, head", "activations, logits"}
    parts["most at once"] = max(sum(v for k, v in parts.items() if k not in other) for other in (sampling, training))
    parts["most at once"] += memory.PROCESS[True]
    return parts


def hours(config, micro: int) -> dict[str, float]:
    """Hours of a run's parts on 8 GPUs: products, weights gathered for every pass, and sampling bound by bandwidth."""
    N = memory.parameters(config)

    def train(tokens: float, networks: int) -> float:
        passes = tokens / RANKS / micro
        return networks * (8 * N * tokens / RANKS / PEAK + passes * 16 * N / LINK) / SHARE / 3600  # checkpointed

    def sample(answers: float, rows: int) -> float:
        token = 4 * N + rows * memory.sampling(config, 1, 1, PROMPT, NEW, True)["cache"]
        return answers / RANKS / rows * NEW * token / BANDWIDTH / SHARE / 3600

    rollouts = ITERATIONS * ROLLOUT
    return {
        "SFT": train(2 * QUESTIONS * TEACHER_SAMPLES * TEXT, 1),
        "student's answers": sample(QUESTIONS * STUDENT_SAMPLES, 256),
        "reward model": train(2 * QUESTIONS * 2 * TEXT, 1),
        "PPO, twice": 2 * (sample(rollouts, ROLLOUT // RANKS) + train(rollouts * TEXT, 3)),
    }


def several() -> list[str]:
    plans = [("3B", SHAPES["llama-3b"].model, 4096), ("8B", SHAPES["llama-8b"].model, 4096)]
    bytes_of = [per_rank(config, micro) for _, config, micro in plans]
    hours_of = [hours(config, micro) for _, config, micro in plans]
    rows = [f"| of each of {RANKS} ranks, GB | 3B | 8B |", "|---|---|---|"]
    rows += [f"| {part} | {' | '.join(f'{b[part] / 1e9:.1f}' for b in bytes_of)} |" for part in bytes_of[0]]
    rows += ["", f"| hours on {RANKS} GPUs | 3B | 8B |", "|---|---|---|"]
    rows += [f"| {part} | {' | '.join(f'{h[part]:.1f}' for h in hours_of)} |" for part in hours_of[0]]
    return [*rows, f"| together | {' | '.join(f'{sum(h.values()):.1f}' for h in hours_of)} |"]


def teacher() -> list[str]:
    N, rows = memory.parameters(LLAMA_70B), 256
    cache = memory.sampling(LLAMA_70B, rows, 1, PROMPT, NEW, True, width=2)["cache"]
    steps = QUESTIONS * TEACHER_SAMPLES / rows * SAID
    seconds = steps * (2 * N + cache) / RANKS / BANDWIDTH / SHARE
    seconds += 2 * N * QUESTIONS * PROMPT / RANKS / PEAK / SHARE
    return [
        "| 70B teacher in bf16, tensor-parallel on 8 | |",
        "|---|---|",
        f"| weights, of each rank | {2 * N / RANKS / 1e9:.1f} GB |",
        f"| cache of {rows} answers at once, of each rank | {cache / RANKS / 1e9:.1f} GB |",
        f"| {QUESTIONS * TEACHER_SAMPLES} answers of {SAID} tokens | {seconds / 3600:.1f} hours |",
    ]


if __name__ == "__main__":
    print("\n\n".join("\n".join(table()) for table in (one_gpu, several, teacher)))
