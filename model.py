"""Llama 3 by hand, the scalar model built on it, and the loading and saving of Hugging Face folders.

Read from the top: configuration, rotary positions, cache, attention, feed-forward, block, the two heads, files,
then the few functions of logits that every other script shares. Module names equal the tensor names in the files, so
a state dict *is* the checkpoint.

Shapes: B sequences, T tokens, S cached positions, V vocabulary, D hidden size, H query heads, K key/value heads,
E head size. Batches are right-padded; attention is causal, so padding on the right is never seen by a real token.

Sources: Llama 3 (arXiv 2407.21783), RoPE (arXiv 2104.09864), GQA (arXiv 2305.13245), SwiGLU (arXiv 2002.05202).
"""

import contextlib
import functools
import json
import math
import os
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from runtime.chunked import ChunkedLogprobs

# ---- configuration -------------------------------------------------------------------------------------------------


UNSUPPORTED = {  # keys of config.json that make another network, the value that does not, and what is wrong otherwise
    "hidden_act": ("silu", "Llama uses silu"),
    "quantization_config": ({}, "convert the weights to bf16, fp16 or fp32 first"),
    "partial_rotary_factor": (1, "all of a head is rotated here"),
    "num_local_experts": (0, "a mixture of experts is not implemented"),
    "num_experts": (0, "a mixture of experts is not implemented"),
    "use_sliding_window": (False, "only full attention is implemented"),
}


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that define a Llama, under the names of Hugging Face's `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_type: str = "default"  # or "llama3": slow pairs are stretched (Llama 3.1), by the next four numbers
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_position_embeddings: int = 8192
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # a bias on q, k, v (and on o, but for qwen2)
    mlp_bias: bool = False
    model_type: str = "llama"  # or "qwen2"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read `folder/config.json`. Raises ValueError or FileNotFoundError, naming the file and the key."""
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} not found: a model is a folder with config.json and model.safetensors")
        raw = {key: value for key, value in _read_object(path).items() if value is not None}  # null means left out

        def refuse(key: str, value: object, supported: str) -> None:
            raise ValueError(f"{path}: {key} = {value!r:.80} is not supported; {supported}")

        if "auto_map" in raw:
            print(f"warning: {path} names Python code to run (auto_map); it is not run here", file=sys.stderr)
        model_type = raw.get("model_type")
        if model_type not in ("llama", "qwen2"):
            refuse("model_type", model_type, "this code reads llama and qwen2")
        # transformers 5 writes rope_parameters, older versions rope_scaling beside rope_theta
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            refuse("rope_scaling", rope, "it must be an object")
        for key, (harmless, supported) in UNSUPPORTED.items():
            value = (raw | rope).get(key, harmless)
            if value != harmless:
                refuse(key, value, supported)
        if model_type == "llama" and "sliding_window" in raw:  # qwen2 files carry one that is switched off
            refuse("sliding_window", raw["sliding_window"], "only full attention is implemented")
        raw |= {key if key.startswith("rope_") else f"rope_{key}": value for key, value in rope.items()}
        if raw.get("rope_type", "default") not in ("default", "llama3"):
            refuse("rope_scaling type", raw["rope_type"], "only 'default' and 'llama3' are")

        kinds = {field.name: field.type for field in fields(cls)}
        required = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
        if raw.get("rope_type") == "llama3":
            required += [key for key in kinds if key.startswith("rope_") and key != "rope_theta"]
        for key in required:
            if key not in raw:
                raise ValueError(f"{path}: the key {key.removeprefix('rope_')!r} is missing")
        given = {key: value for key, value in raw.items() if key in kinds}
        for key, value in given.items():
            most = 1024 if key == "num_hidden_layers" else 2**24  # a slip of the pen must not fill the memory
            if kinds[key] is int and not (type(value) is int and 0 < value <= most):
                refuse(key, value, f"it must be a whole number from 1 to {most}")
            if kinds[key] is float and not (type(value) in (int, float) and 0 < value < 1e30):
                refuse(key, value, "it must be a number above 0")
            if kinds[key] is bool and type(value) is not bool:
                refuse(key, value, "it must be true or false")
            several = key == "eos_token_id" and isinstance(value, list)
            if key.endswith("_token_id") and not all(type(token) is int for token in (value if several else [value])):
                refuse(key, value, "it must be a token id")
            given[key] = tuple(value) if several else value
        heads, hidden = given["num_attention_heads"], given["hidden_size"]
        defaults = {"num_key_value_heads": heads, "head_dim": hidden // heads, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
        config = cls(**defaults | given | ({"attention_bias": True} if model_type == "qwen2" else {}))
        if heads % config.num_key_value_heads:
            refuse("num_key_value_heads", config.num_key_value_heads, f"it must divide the {heads} query heads")
        if config.head_dim % 2 or not config.head_dim:
            refuse("head_dim", config.head_dim, "rotary positions turn pairs of features")
        if config.rope_type == "llama3" and config.rope_low_freq_factor >= config.rope_high_freq_factor:
            refuse("low_freq_factor", config.rope_low_freq_factor, "it must be below high_freq_factor")
        return config

    def to_json(self, **extra: object) -> dict:
        """The contents of a `config.json` that this code and transformers both read; `extra` keys are added.

        Absent token ids are written as null: without the key transformers takes 1 and 2 for bos and eos.
        """
        rope = {key: value for key, value in vars(self).items() if key.startswith("rope_")}
        raw = {key: value for key, value in vars(self).items() if key not in rope}
        raw |= {"rope_theta": rope.pop("rope_theta"), "hidden_act": "silu"}
        if self.rope_type != "default":
            scaling = {key.removeprefix("rope_"): value for key, value in rope.items()}
            raw["rope_scaling"] = {"rope_type": scaling.pop("type")} | scaling
        return raw | extra


# ---- rotary positions ----------------------------------------------------------------------------------------------


def rope_table(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, each (length, E), fp32: position t turns pair i by t * theta^(-2i/E).

    Llama 3.1 divides the angular speed of slow pairs (wavelength beyond the original context) by `rope_factor`,
    keeps the fast ones, and blends linearly between the two.
    """
    cos, sin = _rope_table(config, 1 << (length - 1).bit_length(), device)  # powers of two: few tables are kept
    return cos[:length], sin[:length]


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # or a table that generate made first could not be trained with
def _rope_table(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    speed = config.rope_theta ** (-pairs / config.head_dim)  # (E/2,) radians per position
    if config.rope_type == "llama3":
        context = config.rope_original_max_position_embeddings
        turns = context * speed / (2 * math.pi)  # (E/2,) full turns over the original context
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow pair, stretched; 1: fast pair, as it was
        speed = keep * speed + (1 - keep) * speed / config.rope_factor
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), speed)  # (length, E/2)
    angles = torch.cat([angles, angles], dim=-1)  # (length, E): the files pair feature i with i + E/2
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + E/2) of x (B, T, heads, E) by its angle; cos and sin broadcast to x.

    (a, b) becomes (a cos - b sin, b cos + a sin). Example: E 2, a quarter turn (cos 0, sin 1): [1, 2] -> [-2, 1].
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# ---- cache ---------------------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of every layer for rows of different lengths, allocated once.

    Row b holds `lengths[b]` real positions; what lies beyond is garbage that the mask hides and later tokens
    overwrite. So prompts are prefilled right-padded and no row ever carries padding *inside* its text.
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device):
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)  # (B, K, S, E) in each layer
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)  # (B,)
        self.used = 0  # no row is longer than this: how much of S the attention must look at
        self.rope = rope_table(config, max_length, device)  # (S, E), (S, E)

    def extend(self, T: int) -> Tensor:
        """Make room for T more tokens in every row; their positions (B, T)."""
        (B, K, S, _), device = self.keys[0].shape, self.lengths.device
        positions = self.lengths[:, None] + torch.arange(T, device=device)  # (B, T)
        heads = torch.arange(0, B * K * S, S, device=device).view(B, K, 1)  # where each head begins
        self.slots = (heads + positions[:, None]).flatten()  # (B*K*T,) where each layer stores them
        first, self.used, self.lengths = self.used == 0, self.used + T, self.lengths + T
        seen = torch.arange(self.used, device=device) <= positions[:, None, :, None]  # (B, 1, T, S)
        self.mask = None if first else torch.where(seen, 0.0, -math.inf).to(self.keys[0].dtype)  # added to the scores
        return positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v (B, T, K, E) in the room made; what q (B, T, H, E) finds in all that is stored, (B, T, H, E)."""
        for stored, new in ((self.keys[layer], k), (self.values[layer], v)):
            stored.flatten(0, 2).index_copy_(0, self.slots, new.transpose(1, 2).flatten(0, 2))
        if self.mask is None:  # nothing was stored before
            return causal_attention(q, k, v)
        # the G query heads of a key head become G rows of one product: its keys are read once and never copied
        (B, T, H, E), K = q.shape, k.shape[2]
        q = q.view(B, T, K, -1, E).permute(0, 2, 3, 1, 4).reshape(B, K, -1, E)  # (B, K, G*T, E)
        keys, values = self.keys[layer][:, :, : self.used], self.values[layer][:, :, : self.used]  # (B, K, S, E)
        mask = self.mask if T == 1 else self.mask.repeat(1, 1, H // K, 1)  # (B, 1, G*T, S)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)  # (B, K, G*T, E)
        return out.view(B, K, -1, T, E).permute(0, 3, 1, 2, 4).reshape(B, T, H, E)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows (n,) alone, in this order; a row may come several times."""
        for stored in (self.keys, self.values):
            for layer, x in enumerate(stored):  # layer by layer: there is never a second cache
                stored[layer] = x[rows]
        self.lengths = self.lengths[rows]


# ---- the network ---------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> weight * x / sqrt(mean of x^2 over D + eps), (..., D). Example: [3, 4] -> [0.8485, 1.1314].

        Worked out in fp32, brought back to x's dtype, then weighted.
        """
        wide = F.rms_norm(x.float(), self.weight.shape, eps=self.eps)  # the mean of squares needs fp32
        return self.weight * wide.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, E, H, K = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        bias = config.attention_bias
        self.head_dim = E
        self.q_proj = nn.Linear(D, H * E, bias=bias)
        self.k_proj = nn.Linear(D, K * E, bias=bias)
        self.v_proj = nn.Linear(D, K * E, bias=bias)
        self.o_proj = nn.Linear(H * E, D, bias=bias and config.model_type != "qwen2")

    def forward(self, x: Tensor, rope, attend) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, E)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, E)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, E)
        out = attend(rotate(q, *rope), rotate(k, *rope), v)  # (B, T, H, E)
        return self.o_proj(out.reshape(B, T, -1))  # (B, T, D)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each position sees itself and those before it: q (B, T, H, E), k and v (B, T, K, E) -> (B, T, H, E)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(D, inner, bias=bias)
        self.up_proj = nn.Linear(D, inner, bias=bias)
        self.down_proj = nn.Linear(inner, D, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope, attend, read: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)  # (B, T, D)
        if read is not None:
            x = x[:, : read.shape[1]][read]  # (N, D)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Tokens to hidden states: all of Llama but the head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        table = torch.empty(config.vocab_size, config.hidden_size)  # (V, D)
        if not table.is_meta:  # to draw on the meta device PyTorch would import its compiler, for seconds
            nn.init.normal_(table)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=table)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False  # keep a block's input alone, work out the rest again in the backward pass

    def forward(self, tokens: Tensor, cache: KVCache | None = None, read: Tensor | None = None) -> Tensor:
        """tokens (B, T) -> hidden states (B, T, D). With a cache, row b continues at position cache.lengths[b].

        With a boolean `read` (B, at most T) only its N True positions come back, (N, D): no other position has to go
        through the last feed-forward.
        """
        T = tokens.shape[1]
        x = self.embed_tokens(tokens)  # (B, T, D)
        if cache is None:
            cos, sin = rope_table(self.config, T, x.device)  # (T, E)
        else:
            positions = cache.extend(T)  # (B, T)
            cos, sin = cache.rope[0][positions], cache.rope[1][positions]  # (B, T, E)
        rope = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)  # (.., T, 1, E)
        for index, block in enumerate(self.layers):
            attend = causal_attention if cache is None else functools.partial(cache.attend, index)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                block = functools.partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
            last = index == len(self.layers) - 1
            x = block(x, rope, attend, read if last else None)
        return self.norm(x)


class Llama(nn.Module):
    """The language model. Keys of its state dict are those of transformers' LlamaForCausalLM."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(
        self, tokens: Tensor, cache: KVCache | None = None, read: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens (B, T) -> logits (B, T, V), fp32.

        With a boolean `read` (B, T-1): the log-probabilities of the N tokens that follow its True positions, and the
        entropies there, (N,) each, without the logits of all positions.
        """
        if read is None:
            return self.lm_head(self.model(tokens, cache)).float()
        hidden, device = self.model(tokens, read=read), tokens.device.type  # (N, D)
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))  # as autocast does with the input of any other layer
        with torch.autocast(device, enabled=False):  # which types are used is said above
            return ChunkedLogprobs.apply(hidden, self.lm_head.weight, tokens[:, 1:][read], temperature)


class ScalarModel(nn.Module):
    """A Llama with one number per position instead of a vocabulary: the reward model and the critic.

    Saved as transformers' LlamaForSequenceClassification with one label. `score_mean` is subtracted from every score
    so that the reference policy scores 0 on average; it lives in config.json, because that class has no bias.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.score_mean = 0.0

    def forward(self, tokens: Tensor, read: Tensor | None = None) -> Tensor:
        """tokens (B, T) -> one fp32 number per position, (B, T). Position t has seen tokens[:, :t+1].

        With a boolean `read` (B, at most T): only those of its N True positions, (N,).
        """
        hidden = self.model(tokens, read=read).float()  # (B, T, D) or (N, D)
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 scores would tie
            return (hidden @ self.score.weight[0].float()) - self.score_mean  # (B, T) or (N,)


# ---- files ---------------------------------------------------------------------------------------------------------


def load_model(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Llama:
    """Load a Hugging Face folder (config.json + model.safetensors, or an index and its shards).

    dtype and device default to the file's dtype and the CPU. Raises ValueError or FileNotFoundError with one
    sentence naming the file and the tensor.
    """
    with torch.device("meta"):  # shapes only: the weights go straight from the file to their place
        model = Llama(ModelConfig.from_folder(folder))
    skip = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    _fill(model, folder, dtype, device, skip)
    model.tie()
    return model


def load_scalar_model(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    new_head: str | None = None,
    seed: int = 0,
) -> ScalarModel:
    """Load a saved scalar model, or, with `new_head` 'normal' or 'zero', put a new head on a language model's trunk.

    'normal' is N(0, 1/(D+1)) (OpenAI, lm-human-preferences): scores of size one at the start. A missing head is an
    error unless a new one is asked for: a silently random reward model looks healthy in every log.
    """
    if new_head not in (None, "normal", "zero"):
        raise ValueError(f"new_head {new_head!r} is neither 'normal' nor 'zero'")
    with torch.device("meta"):
        model = ScalarModel(ModelConfig.from_folder(folder))
    _fill(model, folder, dtype, device, skip={"lm_head.weight", "score.weight"} if new_head else set())
    if new_head:
        weight = torch.zeros(1, model.config.hidden_size)  # (1, D); drawn on the CPU: the same on every device
        if new_head == "normal":
            rng = torch.Generator().manual_seed(seed)
            weight.normal_(std=1 / math.sqrt(model.config.hidden_size + 1), generator=rng)
        model.score.weight = nn.Parameter(weight.to(model.model.norm.weight))
    else:
        path = Path(folder) / "config.json"
        model.score_mean = _read_object(path).get("score_mean", 0.0)
        if type(model.score_mean) not in (int, float) or not math.isfinite(model.score_mean):
            raise ValueError(f"{path}: score_mean = {model.score_mean!r} is not a number")
    return model


def _fill(model: nn.Module, folder: str | Path, dtype, device, skip: set[str]) -> None:
    """Give every parameter of a meta-device model, but for `skip`, its tensor; no other tensor may be in the files.

    On the CPU and in the file's own dtype a parameter *is* the mapped file: read when first used, copied page by page
    when written to, and valid even if the file is then renamed or deleted.
    """
    folder, device, tensors, places = Path(folder), torch.device(device or "cpu"), {}, {}
    for path in _weight_files(folder):
        with _open(path) as file:  # maps the file, reads no weight yet
            for name in file.keys():
                if name not in skip and not name.endswith("rotary_emb.inv_freq"):
                    tensors[name], places[name] = file.get_tensor(name), path
    if isinstance(model, Llama) and "score.weight" in tensors:
        raise ValueError(f"{folder} is a scalar model (it has score.weight), but a language model is needed here")
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in skip}
    if "score.weight" in wanted and "score.weight" not in tensors:
        where = "give a folder that reward.py wrote, or a new_head for a language model"
        raise ValueError(f"{folder}: the scalar head score.weight is missing; {where}")
    for name, tensor in tensors.items():
        place, shape = f"{places[name]}: the tensor {name}", tuple(tensor.shape)
        if name not in wanted:
            raise ValueError(f"{place} has no place in this model")
        if shape != wanted[name]:
            raise ValueError(f"{place} has shape {shape}, config.json asks for {tuple(wanted[name])}")
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"{place} is {tensor.dtype}; convert the weights to bf16, fp16 or fp32 first")
        if tensor.dim() == 1 and not tensor.isfinite().all():  # all weights of a diverged run are NaN, norms are small
            raise ValueError(f"{place} holds NaN or infinity: the run that wrote it diverged")
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing from the weights, the first is {missing[0]}")
    for name in sorted(tensors, key=lambda name: -tensors[name].numel()):  # largest first: memory is still free
        if (dtype or tensors[name].dtype) != tensors[name].dtype or device.type != "cpu":
            with _open(places[name]) as file:  # mapped anew: what was read of the file leaves memory with this tensor
                tensors[name] = file.get_tensor(name).to(device, dtype or tensors[name].dtype)
    model.load_state_dict(tensors, assign=True, strict=False)  # all that strict would check is checked above


@contextlib.contextmanager
def _open(path: Path):
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None


def _read_object(path: Path) -> dict:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(raw).__name__}")
    return raw


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or else the shards that the index names, as in transformers."""
    index, files = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if index.is_file() and not files[0].is_file():
        places = _read_object(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ValueError(f"{index}: weight_map must be an object with the shard of every tensor")
        for name in places.values():
            if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
                raise ValueError(f"{index}: weight_map names {name!r}, which is not a .safetensors file of this folder")
        files = [folder / name for name in sorted(set(places.values()))]
    for path in files:
        if not path.is_file():
            pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
            hint = f"; {pickled[0].name} is a pickle and is never opened: convert it to safetensors" if pickled else ""
            raise FileNotFoundError(f"{path} not found{hint}")
    return files


def save_model(model: Llama | ScalarModel, folder: str | Path, max_shard_size: int = 5 * 10**9) -> None:
    """Write config.json and model.safetensors, or shards of at most max_shard_size bytes and their index.

    transformers loads the folder unchanged. A save cut short leaves the old weights in place: files get temporary
    names first, new shards never the name of one in use, and one rename (or removal) puts the new in the old's place.
    """
    folder, config, tensors = Path(folder), model.config, model.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    family = "Qwen2" if config.model_type == "qwen2" else "Llama"
    extra = {"torch_dtype": str(model.model.norm.weight.dtype).removeprefix("torch.")}
    if isinstance(model, Llama):
        extra["architectures"] = [f"{family}ForCausalLM"]
        if config.tie_word_embeddings:
            del tensors["lm_head.weight"]
    else:
        extra |= {"architectures": [f"{family}ForSequenceClassification"], "num_labels": 1}
        extra["score_mean"] = model.score_mean
        ends = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
        if config.pad_token_id in ends:  # transformers would take a text's last token for padding
            extra["pad_token_id"] = None
    shards, size = [{}], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards, size = [*shards, {}], 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    names, texts, index = ["model.safetensors"], {}, "model.safetensors.index.json"
    if len(shards) > 1:
        in_use = (folder / index).is_file() and '"model-0' in (folder / index).read_text(encoding="utf-8")
        stem = "model-b" if in_use else "model"
        names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        places = {name: file for file, shard in zip(names, shards) for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        texts[index] = {"metadata": {"total_size": total}, "weight_map": places}
    texts["config.json"] = config.to_json(**extra)
    for name, shard in zip(names, shards):
        shard = {key: tensor.detach().cpu().contiguous() for key, tensor in shard.items()}
        try:
            save_file(shard, folder / f"{name}.tmp", metadata={"format": "pt"})
        except SafetensorError as error:  # such as a full disk
            raise OSError(f"{folder / name} cannot be written: {error}") from None
    for name, text in texts.items():
        (folder / f"{name}.tmp").write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
    for name in [*names, *texts]:
        with (folder / f"{name}.tmp").open("rb") as file:
            os.fsync(file.fileno())  # a rename is no use to a file that a power cut empties
        (folder / f"{name}.tmp").replace(folder / name)
    for path in [folder / "model.safetensors", folder / index, *folder.glob("model-*-of-*.safetensors")]:
        if path.name not in names and path.name not in texts:  # of an earlier save
            path.unlink(missing_ok=True)


# ---- functions of logits and masks ---------------------------------------------------------------------------------


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each next token: logits (B, T, V), tokens (B, T) -> (B, T-1), fp32 or wider.

    Entry t scores tokens[:, t+1] under softmax(logits[:, t] / temperature), finite for any finite logits.
    Example: V 2, logits[:, 0] [0, ln 3], next token 1 -> ln 3/4 = -0.2877.
    """
    logits = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    logits = logits / temperature  # (B, T-1, V)
    chosen = logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)  # (B, T-1)
    return chosen - logits.logsumexp(-1)  # (B, T-1): log softmax, without storing it


def masked_logprobs(model: Llama, tokens: Tensor, mask: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies in the (B, T-1) frame, worked out only where mask is True, 0 elsewhere.

    tokens (B, T), mask (B, T-1) -> logprobs (B, T-1), entropies (B, T-1). Same numbers as token_logprobs, but of
    vocabulary-sized tensors there is never more than a chunk of the N masked-in positions, instead of (B, T, V).
    """
    logprobs, entropies = model(tokens, read=mask, temperature=temperature)  # (N,), (N,)
    zeros = torch.zeros(mask.shape, dtype=logprobs.dtype, device=tokens.device)  # (B, T-1)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropies)


def masked_values(model: ScalarModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """One number for each cell of the (B, T-1) frame where mask is True, before its token is read; 0 elsewhere."""
    values = model(tokens, read=mask)  # (N,)
    return torch.zeros(mask.shape, device=tokens.device).masked_scatter(mask, values)  # (B, T-1)


def last_value(values: Tensor, lengths: Tensor) -> Tensor:
    """The value at each row's last real token: values (B, T), lengths (B,) -> (B,). Never [:, -1]: that is padding.

    Example: values [[1, 2, 9], [3, 9, 9]], lengths [2, 1] -> [2, 3].
    """
    return values.gather(1, lengths[:, None] - 1)[:, 0]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is True; a masked-out cell may hold NaN. An empty mask gives 0."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)
