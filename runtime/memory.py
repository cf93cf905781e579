"""How much memory a stage needs, part by part: worked out from the numbers of config.json, before a weight is loaded.

    parts = memory.training(config, tokens=512, gradient_checkpointing=False, cuda=False)
    memory.say(parts)    # needs about 3.9 GB of memory: weights 0.54, gradients 0.54, ...; 23.1 GB are free

A stage needs the most at one of a few moments; each function returns the parts of that moment, in bytes. docs/scale.md
compares them with peaks that were measured on a CPU (bench/peaks.py). With `cuda`, products are in bf16 (autocast), and
so is what is kept of them for the backward pass; that is computed, not measured.

`config` has the numbers of a model's config.json under their names: a ModelConfig of model.py, or what `read_config`
returns without the seconds that importing torch takes. V vocabulary, D hidden size, F inner size, Q and K features of
all query and of all key heads.
"""

import json
import types
from pathlib import Path

from runtime import ranks, require

PROCESS = {False: 0.27e9, True: 0.6e9}  # by `cuda`: Python with its libraries; what CUDA keeps for itself
LOGITS_AT_ONCE = 2**24  # as in model.py
READ_AT_ONCE = {False: 2**11, True: 2**16}  # tokens of prompts, by `cuda`, as in decode.py
# What is free and not given back. On a CPU gradients lie between activations, in all blocks, checkpointed or not; glibc
# then keeps 0.6 of what a pass without checkpointing keeps (measured). On a GPU a twentieth (assumed).
HOLES = {False: 0.6, True: 0.05}


def read_config(folder: str | Path) -> types.SimpleNamespace:
    """The sizes in a folder's config.json. What is missing or no number is 0: loading the model will refuse it."""
    path = Path(folder) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    require(isinstance(raw, dict), f"{path} must hold a JSON object, not a {type(raw).__name__}")

    def size(key: str, default: int = 0) -> int:
        return raw[key] if type(raw.get(key)) is int else default

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    return types.SimpleNamespace(
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_hidden_layers=size("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=size("num_key_value_heads", heads),
        head_dim=size("head_dim", hidden // max(heads, 1)),
        tie_word_embeddings=raw.get("tie_word_embeddings") is True,
        attention_bias=raw.get("attention_bias") is True or raw.get("model_type") == "qwen2",
        mlp_bias=raw.get("mlp_bias") is True,
        model_type=raw.get("model_type"),
    )


def letters(config) -> tuple[int, int, int, int, int]:
    """V, D, F, Q, K."""
    Q, K = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    return config.vocab_size, config.hidden_size, config.intermediate_size, Q, K


def parameters(config, scalar: bool = False) -> int:
    """How many numbers a language model has, tied embeddings once; or a scalar model, whose head is one row."""
    V, D, F, Q, K = letters(config)
    block = 2 * D * (Q + K) + 3 * D * F + 2 * D
    block += config.attention_bias * (Q + 2 * K + D * (config.model_type != "qwen2")) + config.mlp_bias * (2 * F + D)
    head = D if scalar else V * D * (not config.tie_word_embeddings)
    return V * D + config.num_hidden_layers * block + D + head


def kept(config, cuda: bool = False) -> int:
    """Bytes that one block keeps of a token for its backward pass.

    The norms' inputs, what they scale and their outputs (6 D), q and what attention found (2 Q), k and v (2 K), the
    feed-forward's four (4 F), two root mean squares and a number per head. With autocast every product has kept a bf16
    copy of its input, and the norms' inputs and what they scale are in fp32.
    """
    _, D, F, Q, K = letters(config)
    heads = config.num_attention_heads
    if cuda:
        return 26 * D + 4 * Q + 4 * K + 8 * F + 4 * heads + 8
    return 4 * (6 * D + 2 * Q + 2 * K + 4 * F + heads + 2)


def training(config, tokens: int, gradient_checkpointing: bool, cuda: bool, scalar: bool = False) -> dict[str, float]:
    """One network's step in passes of `tokens` tokens: weights, gradients and moments in fp32.

    Logits are worked out chunk by chunk; the gradient of the head waits for the embedding's. Not seen: that the last
    block's feed-forward reads the answers alone, and that in a step of one pass gradients come as activations go.
    """
    V, D, F, _, _ = letters(config)
    N, layers, of_block = parameters(config, scalar), config.num_hidden_layers, tokens * kept(config, cuda)
    activations = tokens * layers * 4 * D + of_block if gradient_checkpointing else layers * of_block
    activations += tokens * 4 * (3 * F + 2 * D)  # the block that is worked on
    chunked, of_head = tokens * V > LOGITS_AT_ONCE, (6 if cuda else 4) * V * D  # on a GPU its gradient is in bf16 first
    logits = 0 if scalar else 8 * min(tokens * V, LOGITS_AT_ONCE) + of_head * (1 + (chunked and not cuda))
    weights = 4 * N + 2 * (N - V * D) * (cuda and not gradient_checkpointing)  # bf16 copies wait for the backward pass
    parts = {"weights": weights, "gradients": 4 * N, "moments": 8 * N, "activations": activations, "logits": logits}
    return parts | {"holes": HOLES[cuda] * (4 * N + activations + logits if cuda else layers * of_block)}


def sampling(config, rows: int, prompts: int, prompt: int, new: int, cuda: bool, width: float = 4) -> dict[str, float]:
    """`rows` answers of up to `new` tokens at once, to `prompts` different prompts of up to `prompt` tokens.

    Weights and cache have `width` bytes a number. Either the prompts are read or tokens are drawn.
    """
    V, D, F, Q, K = letters(config)
    read = min(prompts * prompt, max(prompt, READ_AT_ONCE[cuda])) * width * (max(3 * F, 5 * Q) + 4 * D)
    drawn = rows * V * 16  # logits, probabilities, and their sums in float64
    cache = 2 * config.num_hidden_layers * rows * (prompt + new) * K * width
    return {"weights": width * parameters(config), "cache": cache, "activations": max(read, drawn)}


def file_width(folder: str | Path, config) -> float:
    """Bytes a number in a folder's weights."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / max(parameters(config), 1)


def with_scorer(parts: dict[str, float], config, tokens: int) -> dict[str, float]:
    """And a scalar model in fp32, which reads `tokens` tokens at once when all are drawn, keeping nothing."""
    _, D, F, Q, _ = letters(config)
    read = 4 * tokens * (max(3 * F, 5 * Q) + 4 * D)
    return parts | {"frozen": 4 * parameters(config, scalar=True), "activations": max(parts["activations"], read)}


def ppo(
    policy, critic, reference, scorer, rows: int, prompt: int, new: int, tokens: int,
    gradient_checkpointing: bool, offload: bool, cuda: bool,
) -> dict[str, float]:  # fmt: skip
    """Sampling `rows` answers, a step of the policy, or one of the critic. scorer None: without a reward model.

    With `offload`, on a GPU, only the network at work is there. All four read the answers in between; that takes less.
    """
    sample = {"moments": 0.0} | sampling(policy, rows, rows, prompt, new, cuda)
    steps = [
        training(config, tokens, gradient_checkpointing, cuda, scalar)
        for config, scalar in ((policy, False), (critic, True))
    ]
    if not (offload and cuda):
        N, C = parameters(policy), parameters(critic, scalar=True)
        frozen = 4 * parameters(reference) + (4 * parameters(scorer, scalar=True) if scorer else 0)
        sample["moments"] = 8 * N
        for parts, other in ((sample, C), (steps[0], C), (steps[1], N)):  # the other network and its moments
            parts["weights"] += 4 * other
            parts["moments"] += 8 * other
            parts["frozen"] = frozen
    return largest(sample, *steps)


def pass_size(longest: int, rows: int, micro_tokens: int) -> int:
    """Tokens of the largest pass of a step of `rows` texts, the longest of so many tokens: that one may be alone."""
    return min(max(micro_tokens, longest), rows * longest)


def largest(*moments: dict[str, float]) -> dict[str, float]:
    return max(moments, key=lambda parts: sum(parts.values()))


def with_process(parts: dict[str, float], cuda: bool) -> dict[str, float]:
    """And what is there without any model: CUDA's own, or Python and its libraries."""
    return parts | {"process": PROCESS[cuda]}


def sentence(parts: dict[str, float], device: str, has: float) -> str:
    """What is needed and what there is, in GB of 10^9 bytes, on one line."""
    told = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size >= 5e6)
    return f"needs about {sum(parts.values()) / 1e9:.1f} GB of {device}: {told}; {has / 1e9:.1f} GB are free"


def say(parts: dict[str, float]) -> None:
    """Print that for the device that a script will use; not of several ranks, which hold shards (bench/scale.py)."""
    if ranks.SIZE > 1:
        return
    import torch

    device, has, cuda = "memory", available_memory(), torch.cuda.is_available()
    if cuda:
        device, has = f"memory on {torch.cuda.get_device_name()}", torch.cuda.mem_get_info()[0]
    print(sentence(with_process(parts, cuda), device, has), flush=True)


def available_memory() -> float:
    """Bytes of memory that new processes can have; infinity where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024
    except (OSError, StopIteration):
        return float("inf")
