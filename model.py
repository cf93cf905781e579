"""Llama 3 by hand, the scalar model built on it, and the loading and saving of Hugging Face folders.

Read from the top: configuration, rotary positions, attention, feed-forward, block, the two heads; then files, and the
few functions of logits that every other script shares. Module names equal the tensor names in the files, so a state
dict *is* the checkpoint.

Shapes: B sequences, T tokens, V vocabulary, D hidden size, H query heads, K key/value heads, E head size. Batches are
right-padded; attention is causal, so padding on the right is never seen by a real token.

Sources: Llama 3 (arXiv 2407.21783), RoPE (arXiv 2104.09864), GQA (arXiv 2305.13245), SwiGLU (arXiv 2002.05202).
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf.folder import ROPE, read_config, read_score_mean, read_tensors, write_folder
from runtime.chunked import ChunkedLogprobs

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


# ---- rotary positions ----------------------------------------------------------------------------------------------


def rope_table(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, each (length, E), fp32: position t turns pair i by t * theta^(-2i/E).

    Llama 3.1 divides the angular speed of slow pairs (wavelength beyond the original context) by `rope_factor`,
    keeps the fast ones, and blends linearly between the two.
    """
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
    return torch.addcmul(x * cos, torch.cat([-second, first], dim=-1), sin)


# ---- the network ---------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> weight * x / sqrt(mean of x^2 over D + eps), (..., D). Example: [3, 4] -> [0.8485, 1.1314].

        Worked out in fp32, whatever x's dtype: the mean of squares needs it.
        """
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each position sees itself and those before it: q (B, T, H, E), k and v (B, T, K, E) -> (B, T, H, E)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


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
        """x (B, T, D) -> (B, T, D). `rope` is cos and sin; `attend` is causal_attention, or the cache's."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, H, E)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, E)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)  # (B, T, K, E)
        q, k = rotate(torch.cat([q, k], dim=2), *rope).split([q.shape[2], k.shape[2]], dim=2)  # at once, to save time
        out = attend(q, k, v)  # (B, T, H, E)
        return self.o_proj(out.reshape(B, T, -1))  # (B, T, D)


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

    def forward(self, x: Tensor, rope, attend, keep: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)  # (B, T, D)
        if keep is not None:  # the last block: no later layer looks at the other positions
            x = x[:, : keep.shape[1]][keep]  # (N, D)
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

    def forward(self, tokens: Tensor, cache=None, keep: Tensor | None = None) -> Tensor:
        """tokens (B, T) -> hidden states (B, T, D). With a KVCache (generate.py) row b continues at cache.lengths[b].

        With a boolean `keep` (B, at most T) only its N True positions come back, (N, D).
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
            x = block(x, rope, attend, keep if last else None)
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
        self, tokens: Tensor, cache=None, keep: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """tokens (B, T) -> logits (B, T, V), fp32.

        With a boolean `keep` (B, T-1): the log-probabilities of the N tokens that follow its True positions, and the
        entropies there, (N,) each, without the logits of all positions.
        """
        if keep is None:
            return self.lm_head(self.model(tokens, cache)).float()
        hidden, device = self.model(tokens, keep=keep), tokens.device.type  # (N, D)
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))  # as autocast does with the input of any other layer
        with torch.autocast(device, enabled=False):  # which types are used is said above
            return ChunkedLogprobs.apply(hidden, self.lm_head.weight, tokens[:, 1:][keep], temperature)


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

    def forward(self, tokens: Tensor, keep: Tensor | None = None) -> Tensor:
        """tokens (B, T) -> one fp32 number per position, (B, T). Position t has seen tokens[:, :t+1].

        With a boolean `keep` (B, at most T): only those of its N True positions, (N,).
        """
        hidden = self.model(tokens, keep=keep).float()  # (B, T, D) or (N, D)
        with torch.autocast(hidden.device.type, enabled=False):  # bf16 scores would tie
            return (hidden @ self.score.weight[0].float()) - self.score_mean  # (B, T) or (N,)


# ---- files ---------------------------------------------------------------------------------------------------------


def load_model(folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Llama:
    """Load a Hugging Face folder (config.json + model.safetensors, or an index and its shards).

    Without a dtype that of the file stays. ValueError or FileNotFoundError names the file and the tensor.
    """
    with torch.device("meta"):  # shapes only: the weights go straight from the file to their place
        model = Llama(ModelConfig(**read_config(folder)))
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if model.config.tie_word_embeddings else {}
    _fill(model, folder, dtype, device, optional=tied)
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
    with torch.device("meta"):
        model = ScalarModel(ModelConfig(**read_config(folder)))
    _fill(model, folder, dtype, device, optional=dict.fromkeys(["lm_head.weight", "score.weight"] if new_head else []))
    if new_head:
        std = {"normal": 1 / math.sqrt(model.config.hidden_size + 1), "zero": 0.0}[new_head]
        rng = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device
        weight = torch.zeros(1, model.config.hidden_size).normal_(std=std, generator=rng)  # (1, D)
        model.score.weight = nn.Parameter(weight.to(model.model.norm.weight))
    else:
        model.score_mean = read_score_mean(folder)
    return model


def _fill(model: nn.Module, folder: str | Path, dtype, device, optional: dict[str, str | None]) -> None:
    """Give every parameter of a meta-device model, but for the optional ones, its tensor of the folder."""
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in optional}
    tensors = read_tensors(folder, wanted, optional, dtype, device or "cpu")
    model.load_state_dict(tensors, assign=True, strict=False)  # all that strict would check is checked


def save_model(model: Llama | ScalarModel, folder: str | Path, stop_ids: Iterable[int] = ()) -> None:
    """Write a folder that transformers loads unchanged, with `stop_ids` among its end tokens.

    A save cut short leaves the old weights in place.
    """
    config, tensors = model.config, model.state_dict()
    # absent token ids are written as null: without the key transformers takes 1 and 2 for bos and eos
    raw = {key: value for key, value in vars(config).items() if not key.startswith("rope_")}
    raw |= {"rope_theta": config.rope_theta, "hidden_act": "silu"}
    if config.rope_type == "llama3":
        raw["rope_scaling"] = {key.removeprefix("rope_"): getattr(config, key) for key in ROPE}
        raw["rope_scaling"]["rope_type"] = "llama3"
    raw["torch_dtype"] = str(model.model.norm.weight.dtype).removeprefix("torch.")
    ends = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    if stop_ids:
        ends = raw["eos_token_id"] = sorted({*ends, *stop_ids} - {None})
    family = "Qwen2" if config.model_type == "qwen2" else "Llama"
    if isinstance(model, Llama):
        raw["architectures"] = [f"{family}ForCausalLM"]
        if config.tie_word_embeddings:
            del tensors["lm_head.weight"]
    else:
        raw |= {"architectures": [f"{family}ForSequenceClassification"], "num_labels": 1}
        raw["score_mean"] = model.score_mean
        if config.pad_token_id in ends:  # transformers would take a text's last token for padding
            raw["pad_token_id"] = None
    write_folder(folder, raw, tensors)


Llama.save = ScalarModel.save = save_model  # by this name a stage saves any network


# ---- functions of logits and masks ---------------------------------------------------------------------------------


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each next token: logits (B, T, V), tokens (B, T) -> (B, T-1), fp32 or wider. The definition
    that masked_logprobs is tested against.

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
    logprobs, entropies = model(tokens, keep=mask, temperature=temperature)  # (N,), (N,)
    zeros = torch.zeros(mask.shape, dtype=logprobs.dtype, device=tokens.device)  # (B, T-1)
    return zeros.masked_scatter(mask, logprobs), zeros.masked_scatter(mask, entropies)


def masked_values(model: ScalarModel, tokens: Tensor, mask: Tensor) -> Tensor:
    """One number for each cell of the (B, T-1) frame where mask is True, before its token is read; 0 elsewhere."""
    values = model(tokens, keep=mask)  # (N,)
    return torch.zeros(mask.shape, device=tokens.device).masked_scatter(mask, values)  # (B, T-1)


def last_token(lengths: Tensor, T: int) -> Tensor:
    """True at each row's last real token: lengths (B,) -> (B, T). Not at [:, -1]: that is padding.

    Example: lengths [2, 1], T 3 -> [[False, True, False], [True, False, False]].
    """
    return torch.arange(1, T + 1, device=lengths.device) == lengths[:, None]


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x where mask is True; a masked-out cell may hold NaN. An empty mask gives 0."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)
