"""Llama 3 by hand, the scalar model built on it, and the loading and saving of Hugging Face folders.

Read from the top: configuration, rotary positions, cache, attention, feed-forward, block, the two heads, files,
then the few functions of logits that every other script shares. Module names equal the tensor names in the files, so
a state dict *is* the checkpoint.

Shapes: B sequences, T tokens, S cached positions, V vocabulary, D hidden size, H query heads, K key/value heads,
E head size. Batches are right-padded; attention is causal, so padding on the right is never seen by a real token.

Sources: Llama 3 (arXiv 2407.21783), RoPE (arXiv 2104.09864), GQA (arXiv 2305.13245), SwiGLU (arXiv 2002.05202).
"""

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

# ---- configuration -------------------------------------------------------------------------------------------------


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
    rope_type: str = "default"  # "llama3" stretches the low frequencies (Llama 3.1), by the next four numbers
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192
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
            raise FileNotFoundError(
                f"{path} not found: a model is a Hugging Face folder with config.json, "
                "model.safetensors and tokenizer.json"
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None

        def refuse(key: str, value: object, supported: str) -> None:
            raise ValueError(f"{path}: {key} = {value!r} is not supported; {supported}")

        model_type = raw.get("model_type")
        if model_type not in ("llama", "qwen2"):
            refuse("model_type", model_type, "this code reads llama and qwen2")
        if raw.get("hidden_act", "silu") != "silu":
            refuse("hidden_act", raw["hidden_act"], "Llama uses silu")
        if raw.get("quantization_config"):
            refuse("quantization_config", raw["quantization_config"], "convert the weights to bf16, fp16 or fp32 first")
        if raw.get("use_sliding_window"):
            refuse("use_sliding_window", True, "only full attention is implemented")
        # transformers 5 writes rope_parameters, older versions rope_scaling beside rope_theta
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            refuse("rope_scaling type", rope_type, "only 'default' and 'llama3' are")
        try:
            heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
            eos = raw.get("eos_token_id")
            config = cls(
                vocab_size=raw["vocab_size"],
                hidden_size=hidden,
                intermediate_size=raw["intermediate_size"],
                num_hidden_layers=raw["num_hidden_layers"],
                num_attention_heads=heads,
                num_key_value_heads=raw.get("num_key_value_heads") or heads,
                head_dim=raw.get("head_dim") or hidden // heads,
                max_position_embeddings=raw.get("max_position_embeddings", 2048),
                rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
                rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
                rope_type=rope_type,
                tie_word_embeddings=raw.get("tie_word_embeddings", False),
                attention_bias=True if model_type == "qwen2" else raw.get("attention_bias", False),
                mlp_bias=raw.get("mlp_bias", False),
                model_type=model_type,
                bos_token_id=raw.get("bos_token_id"),
                eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
                pad_token_id=raw.get("pad_token_id"),
                **(
                    {}
                    if rope_type == "default"
                    else dict(
                        rope_factor=rope["factor"],
                        rope_low_freq_factor=rope["low_freq_factor"],
                        rope_high_freq_factor=rope["high_freq_factor"],
                        rope_original_length=rope["original_max_position_embeddings"],
                    )
                ),
            )
        except KeyError as error:
            raise ValueError(f"{path}: the key {error} is missing") from None
        if config.num_attention_heads % config.num_key_value_heads:
            refuse("num_key_value_heads", config.num_key_value_heads, f"it must divide the {heads} query heads")
        return config

    def to_json(self, **extra: object) -> dict:
        """The contents of a `config.json` that this code and transformers both read; `extra` keys are added."""
        raw = {key: value for key, value in vars(self).items() if not key.startswith("rope_") and value is not None}
        raw |= {"rope_theta": self.rope_theta, "hidden_act": "silu"}
        if self.rope_type == "llama3":
            raw["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": self.rope_factor,
                "low_freq_factor": self.rope_low_freq_factor,
                "high_freq_factor": self.rope_high_freq_factor,
                "original_max_position_embeddings": self.rope_original_length,
            }
        return raw | extra


# ---- rotary positions ----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def rope_table(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, each (length, E), fp32: position t turns pair i by t * theta^(-2i/E).

    Llama 3.1 divides the angular speed of slow pairs (wavelength beyond the original context) by `rope_factor`,
    keeps the fast ones, and blends linearly between the two.
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    speed = config.rope_theta ** (-pairs / config.head_dim)  # (E/2,) radians per position
    if config.rope_type == "llama3":
        turns = config.rope_original_length * speed / (2 * math.pi)  # (E/2,) full turns over the original context
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow pair, stretched; 1: fast pair, as it was
        speed = keep * speed + (1 - keep) * speed / config.rope_factor
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), speed)  # (length, E/2)
    angles = torch.cat([angles, angles], dim=-1)  # (length, E): the files pair feature i with i + E/2
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + E/2) of x (B, heads, T, E) by its angle; cos and sin broadcast to x."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# ---- cache ---------------------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of every layer for rows of different lengths, allocated once.

    Row b holds `lengths[b]` real positions; what lies beyond is garbage that the mask hides and later tokens
    overwrite. So prompts are prefilled right-padded and no row ever carries padding *inside* its text.
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # (layers, B, K, S, E)
        self.values = torch.zeros(shape, dtype=dtype, device=device)  # (layers, B, K, S, E)
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)  # (B,)
        self.used = 0  # no row is longer than this: how much of S the attention must look at

    def write(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, K, T, E) at `positions` (B, T); return all keys and values up to `used`, (B, K, S, E)."""
        rows = torch.arange(len(k), device=k.device)[:, None]  # (B, 1), pairs up with positions (B, T)
        self.keys[layer].transpose(1, 2)[rows, positions] = k.transpose(1, 2)
        self.values[layer].transpose(1, 2)[rows, positions] = v.transpose(1, 2)
        return self.keys[layer, :, :, : self.used], self.values[layer, :, :, : self.used]

    def keep(self, rows: Tensor) -> None:
        """Drop every row but `rows` (indices): finished sequences cost nothing more."""
        self.keys, self.values, self.lengths = self.keys[:, rows], self.values[:, rows], self.lengths[rows]


# ---- the network ---------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()  # the mean of squares needs fp32
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


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

    def forward(self, x: Tensor, rope, mask: Tensor | None, store) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, E)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, E)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, E)
        q, k = rotate(q, *rope), rotate(k, *rope)
        keys, values = store(k, v)  # (B, K, S, E); without a cache simply k and v
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


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

    def forward(self, x: Tensor, rope, mask: Tensor | None, store) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, store)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Tokens to hidden states: all of Llama but the head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) -> hidden states (B, T, D). With a cache, row b continues at position cache.lengths[b]."""
        T = tokens.shape[1]
        x = self.embed_tokens(tokens)  # (B, T, D)
        if cache is None:
            cos, sin = self.rope(T, tokens.device)  # (T, E)
            mask = positions = None  # the plain causal mask
        else:
            positions = cache.lengths[:, None] + torch.arange(T, device=tokens.device)  # (B, T)
            first, cache.used = cache.used == 0, cache.used + T
            cos, sin = (table[positions][:, None] for table in self.rope(cache.used, tokens.device))  # (B, 1, T, E)
            seen = torch.arange(T if first else cache.used, device=tokens.device)  # (S,)
            mask = None if first else seen <= positions[:, None, :, None]  # (B, 1, T, S)
            cache.lengths = cache.lengths + T
        for index, block in enumerate(self.layers):
            store = (
                (lambda k, v: (k, v)) if cache is None else functools.partial(cache.write, index, positions=positions)
            )
            x = block(x, (cos.to(x.dtype), sin.to(x.dtype)), mask, store)
        return self.norm(x)

    def rope(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        table = rope_table(self.config, 1 << (length - 1).bit_length(), device)  # powers of two: few tables are kept
        return table[0][:length], table[1][:length]


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

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens (B, T) -> logits (B, T, V), fp32."""
        return self.lm_head(self.model(tokens, cache)).float()


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

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> one fp32 number per position, (B, T). Position t has seen tokens[:, :t+1]."""
        hidden = self.model(tokens).float()  # (B, T, D); bf16 scores would tie
        return (hidden @ self.score.weight[0].float()) - self.score_mean  # (B, T)


# ---- files ---------------------------------------------------------------------------------------------------------


def load_model(folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Llama:
    """Load a Hugging Face folder (config.json + model.safetensors, or an index and its shards).

    dtype and device default to the file's dtype and the CPU. Raises ValueError or FileNotFoundError with one sentence
    naming the file and the tensor.
    """
    with torch.device("meta"):  # shapes only: the weights go straight from the file to their place
        model = Llama(ModelConfig.from_folder(folder))
    _fill(model, folder, dtype, device)
    model.tie()
    return model


def load_scalar_model(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    new_head: str | None = None,
) -> ScalarModel:
    """Load a saved scalar model, or, with `new_head` 'normal' or 'zero', put a new head on a language model's trunk.

    'normal' is N(0, 1/(D+1)) (OpenAI, lm-human-preferences): scores of size one at the start. A missing head is an
    error unless a new one is asked for: a silently random reward model looks healthy in every log.
    """
    if new_head not in (None, "normal", "zero"):
        raise ValueError(f"new_head {new_head!r} is neither 'normal' nor 'zero'")
    path = Path(folder) / "config.json"
    with torch.device("meta"):
        model = ScalarModel(ModelConfig.from_folder(folder))
    _fill(model, folder, dtype, device, skip={"lm_head.weight", "score.weight"} if new_head else set())
    if new_head:
        weight = torch.zeros(1, model.config.hidden_size)  # (1, D); drawn on the CPU: the same on every device
        if new_head == "normal":
            weight.normal_(std=1 / math.sqrt(model.config.hidden_size + 1))
        model.score.weight = nn.Parameter(weight.to(model.model.norm.weight))
    else:
        model.score_mean = json.loads(path.read_text(encoding="utf-8")).get("score_mean", 0.0)
    return model


def _fill(model: nn.Module, folder: str | Path, dtype, device, skip: set[str] = frozenset()) -> None:
    """Give every parameter of a meta-device model its tensor; exactly the expected tensors must be there."""
    folder, wanted, found = Path(folder), model.state_dict(), {}
    tied = isinstance(model, Llama) and model.config.tie_word_embeddings
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt", device=str(device or "cpu")) as file:
                for name in file.keys():
                    if name in skip or name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
                        continue
                    if name not in wanted:
                        raise ValueError(f"{path}: the tensor {name} has no place in this model")
                    tensor = file.get_tensor(name)
                    if tensor.shape != wanted[name].shape:
                        raise ValueError(
                            f"{path}: {name} has shape {tuple(tensor.shape)}, "
                            f"config.json asks for {tuple(wanted[name].shape)}"
                        )
                    found[name] = tensor.to(dtype or tensor.dtype)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None
    if tied:
        found["lm_head.weight"] = found.get("model.embed_tokens.weight")
    missing = [name for name in wanted if found.get(name) is None and name not in skip]
    if missing:
        raise ValueError(f"{folder}: {len(missing)} tensors are missing from the weights, the first is {missing[0]}")
    model.load_state_dict(found, assign=True, strict=not skip)


def _weight_files(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    files = [single]
    if index.is_file():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, KeyError):
            raise ValueError(f"{index} is not a safetensors index") from None
    for path in files:
        if not path.is_file():
            pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))
            hint = f"; {pickled[0].name} is a pickle and is never opened: convert it to safetensors" if pickled else ""
            raise FileNotFoundError(f"{path} not found{hint}")
    return files


def save_model(model: Llama | ScalarModel, folder: str | Path) -> None:
    """Write config.json and model.safetensors, each under a temporary name first; transformers loads the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    family = "Qwen2" if model.config.model_type == "qwen2" else "Llama"
    if isinstance(model, Llama):
        extra = {"architectures": [f"{family}ForCausalLM"]}
        if model.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
    else:
        extra = {
            "architectures": [f"{family}ForSequenceClassification"],
            "num_labels": 1,
            "score_mean": model.score_mean,
        }
    dtype = str(model.model.norm.weight.dtype).removeprefix("torch.")
    config = json.dumps(model.config.to_json(torch_dtype=dtype, **extra), indent=2) + "\n"
    save_file(tensors, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    (folder / "config.json.tmp").write_text(config, encoding="utf-8")
    (folder / "model.safetensors.tmp").replace(folder / "model.safetensors")
    (folder / "config.json.tmp").replace(folder / "config.json")


# ---- functions of logits and masks ---------------------------------------------------------------------------------


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each next token: logits (B, T, V), tokens (B, T) -> (B, T-1), fp32 or wider.

    Entry t scores tokens[:, t+1] under softmax(logits[:, t] / temperature).
    """
    logits = logits[:, :-1] if logits.dtype == torch.float64 else logits[:, :-1].float()
    logits = logits / temperature  # (B, T-1, V)
    chosen = logits.gather(-1, tokens[:, 1:, None]).squeeze(-1)  # (B, T-1)
    return chosen - logits.logsumexp(-1)  # (B, T-1): log softmax, without storing it


def masked_logprobs(model: Llama, tokens: Tensor, mask: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies in the (B, T-1) frame, worked out only where mask is True, 0 elsewhere.

    tokens (B, T), mask (B, T-1) -> logprobs (B, T-1), entropies (B, T-1). Same numbers as token_logprobs, but the
    vocabulary-sized tensor is (N, V) for the N masked-in positions instead of (B, T, V).
    """
    hidden = model.model(tokens)[:, :-1][mask]  # (N, D)
    logits = model.lm_head(hidden).float() / temperature  # (N, V)
    log_norm = logits.logsumexp(-1)  # (N,)
    chosen = logits.gather(-1, tokens[:, 1:][mask][:, None]).squeeze(-1)  # (N,)
    with torch.no_grad():  # only ever logged
        entropy = log_norm - (torch.softmax(logits, -1) * logits).sum(-1)  # (N,)
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device=tokens.device)  # (B, T-1)
    return zeros.masked_scatter(mask, chosen - log_norm), zeros.masked_scatter(mask, entropy)


def last_value(values: Tensor, lengths: Tensor) -> Tensor:
    """The value at each row's last real token: values (B, T), lengths (B,) -> (B,). Never [:, -1]: that is padding."""
    return values.gather(1, lengths[:, None] - 1)[:, 0]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is True; a masked-out cell may hold NaN. An empty mask gives 0."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)
