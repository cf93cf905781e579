"""Tokens in, tokens out: batched sampling with a key/value cache.

Sampling draws from the full softmax at a temperature: no top-k, no top-p, no repetition penalty. The log-probability
returned with a token is therefore the one that it was drawn with, which PPO depends on.

`prefill` reads prompts by the network's own forward pass. `Decoder.step` is that pass once more for one token per row,
written flat: with one row and a small model the time goes into starting operations, and one token needs few of those
that the modules start (0.44M parameters on one core: 1.24 ms a step with the modules, 0.45 ms so).
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import KVCache, Llama, RMSNorm, rotate
from runtime import ranks

LOOK_EVERY = {"cpu": 1, "cuda": 8}  # steps between two looks at who has ended: a GPU must be waited for
READ_AT_ONCE = {"cpu": 2**11, "cuda": 2**16}  # tokens of prompts: what fits into a core's own cache is read faster


@dataclass(frozen=True)
class Response:
    """What a model said: token ids (those it ended with included), their log-probs, and why it stopped."""

    tokens: list[int]
    logprobs: list[float]
    finish: str  # 'stop': an end token or a stop text was sampled; 'length': max_new_tokens were
    text: str = ""  # the tokens read, up to a stop text: answer_questions adds it, generate knows no letters


@torch.inference_mode()
def generate(
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    stop_ids: Collection[int] = (),
    seed: int = 0,
    batch_size: int = 256,
    progress: Callable = lambda count: None,
    ended: Callable[[list[int]], bool] | None = None,
    compile: bool = False,
) -> list[Response]:
    """Continue every prompt until a stop id or max_new_tokens; the answers come in the prompts' order.

    All ranks call it together: each continues its share, and all get all answers.
    `ended`, asked after each new token with all new tokens of a row, may end the row too.
    temperature 0 is greedy. The log-probs are under softmax(logits / temperature), for greedy under softmax(logits).
    Same prompts and seed: same text, whatever the batch size, but for rounding. `compile` (torch.compile, on a GPU with
    CUDA graphs) is for GPUs, where nobody has measured it yet; on a CPU it gains nothing (0.44M parameters, 256 rows:
    432 ms instead of 392). Raises ValueError for an empty prompt or one that leaves no room in the model's context,
    FloatingPointError if the model computes NaN.
    """
    weight, T = model.lm_head.weight, max_new_tokens
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= (room := model.config.max_position_embeddings - T):
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens; with {T} new ones the model's "
                f"context of {room + T} takes 1 to {room}"
            )
    responses: list[Response | None] = [None] * len(prompts)
    waiting = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))  # the longest enter first
    waiting = waiting[ranks.RANK :: ranks.SIZE]
    device, stop, step, B = weight.device, frozenset(stop_ids), 0, min(batch_size, len(waiting))
    look = 1 if ended else min(LOOK_EVERY[device.type], T)
    T += look  # a row at its end goes on until the next look
    cache = KVCache(model.config, B, max(map(len, prompts), default=0) + T, weight.dtype, device)
    decoder = Decoder(model, cache, compile)
    # of every row of the batch: the prompt that it answers, -1 for none; how many tokens it has said
    asked, length, free = [-1] * B, [0] * B, list(range(B))
    hidden = torch.zeros(B, weight.shape[1], dtype=weight.dtype, device=device)  # (B, D)
    tokens, logprobs = torch.zeros(B, T, dtype=torch.long, device=device), torch.zeros(B, T, device=device)  # (B, T)
    chances = torch.zeros(B, T, dtype=torch.float64, device=device)  # (B, T)
    back = torch.arange(look, 0, -1, device=device)  # (look,)
    cell = T * torch.arange(B, device=device)  # (B,) the place in these three of each row's next token
    while waiting or len(free) < len(asked):
        if waiting and 4 * len(free) >= B:  # many prompts enter at once: a few would cost nearly as much
            rows = torch.tensor(free[: len(waiting)], device=device)  # (n,)
            group = [waiting.pop() for _ in free[: len(rows)]]
            hidden[rows] = prefill(model, cache, rows, [prompts[i] for i in group])  # (n, D)
            own = [np.random.default_rng((seed % 2**64, i)).random(T) for i in group]  # whoever shares the batch
            chances[rows] = torch.from_numpy(np.stack(own)).to(device)  # (n, T)
            for row, index in zip(free, group):
                asked[row], length[row] = index, 0
            free = free[len(group) :]
        token, logprob = sample_token(model.lm_head(hidden).float(), temperature, chances.take(cell))  # (B,), (B,)
        tokens.put_(cell, token)
        logprobs.put_(cell, logprob)
        cell, length, step = cell + 1, [n + 1 for n in length], step + 1
        if step % look == 0:
            newest = tokens.take(cell[:, None] - back).tolist()  # (B, look)
            over = {}  # row: how many of its tokens count, and whether the last of them stopped it
            for row in (row for row, index in enumerate(asked) if index >= 0):
                ends = [length[row] - look + i for i, token_id in enumerate(newest[row], 1) if token_id in stop]
                n = min([*ends, length[row], max_new_tokens])
                stopped = n in ends or bool(ended and ended(tokens[row, :n].tolist()))
                if stopped or n == max_new_tokens:
                    over[row] = n, stopped
            said = (tokens[[*over]].tolist(), logprobs[[*over]].tolist()) if over else ()
            for (row, (n, stopped)), ids, chosen in zip(over.items(), *said):
                if not math.isfinite(sum(chosen[:n])):
                    raise FloatingPointError("the model computes NaN: the run that made its weights diverged")
                responses[asked[row]] = Response(ids[:n], chosen[:n], "stop" if stopped else "length")
                asked[row] = -1
                progress(1)
            stay = [row for row, index in enumerate(asked) if index >= 0]
            if not waiting and 0 < len(stay) <= (0.5 if compile else 0.8) * len(asked):  # enough to pay for the copy
                cache.keep(torch.tensor(stay, device=device))
                decoder = Decoder(model, cache, compile)
                token, tokens, logprobs, chances = (x[stay] for x in (token, tokens, logprobs, chances))
                asked, length = [asked[row] for row in stay], [length[row] for row in stay]
                cell = T * torch.arange(len(stay), device=device) + torch.tensor(length, device=device)  # (B',)
            if free := [row for row, index in enumerate(asked) if index < 0]:
                cell[free] = T * torch.tensor(free, device=device)  # back at the beginning, or they would leave their
                cache.lengths[free] = 0  # room
        if len(free) < len(asked):
            most = max(len(prompts[i]) + n for i, n in zip(asked, length) if i >= 0)  # one shape, if compiled
            cache.used = cache.keys.shape[3] if compile else most - 1
            hidden = decoder.step(token).clone()  # (B, D), not a graph's own memory
    return [next(filter(None, found)) for found in zip(*ranks.everyones(responses))]


def sample_token(logits: Tensor, temperature: float, chance: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row from softmax(logits / temperature), or the largest logit if temperature is 0.

    logits (B, V) in fp32, chance (B,) in float64, uniform in [0, 1) -> token (B,), its log-probability (B,) in fp32
    under the distribution it was drawn from; for temperature 0 under softmax(logits). The token is the first whose
    cumulative probability exceeds the chance: one draw per row instead of V. Sums are in float64, and the chance is a
    share of the last of them, so that no token is lost and none of probability 0 is drawn.
    Example: [0, ln 3], temperature 1: chance 0.2 -> token 0, ln 1/4 = -1.3863; chance 0.3 -> token 1, ln 3/4 = -0.2877.
    """
    probs = torch.softmax(logits / (temperature or 1.0), dim=-1)  # (B, V)
    if temperature == 0:
        token = probs.argmax(-1, keepdim=True)  # (B, 1)
    else:
        below = probs.cumsum(-1, dtype=torch.float64)  # (B, V); in fp32 the rare tokens would be lost
        token = torch.searchsorted(below, chance[:, None] * below[:, -1:], right=True)  # (B, 1)
        token = token.clamp(max=logits.shape[-1] - 1)  # of NaN
    return token[:, 0], probs.gather(-1, token)[:, 0].log()


# ---- the network, a token at a time --------------------------------------------------------------------------------


def prefill(model: Llama, cache: KVCache, rows: Tensor, prompts: list[list[int]]) -> Tensor:
    """Read n prompts into `rows` (n,) of the cache, equal ones once: the hidden states at their ends, (n, D)."""
    device, hidden = rows.device, []
    places = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    distinct = list(places)
    size = max(1, READ_AT_ONCE[device.type] // max(map(len, distinct)))
    for start in range(0, len(distinct), size):
        part = distinct[start : start + size]
        width, here = max(map(len, part)), rows[start : start + len(part)]
        padded = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in part], device=device)  # (U, P)
        lengths = torch.tensor([len(prompt) for prompt in part], device=device)  # (U,)
        ends = torch.arange(1, width + 1, device=device) == lengths[:, None]  # (U, P)
        hidden.append(model.model(padded, cache.only(here), read=ends))  # (U, D)
        cache.lengths[here] = lengths  # what lies beyond a row's own prompt is forgotten
        cache.used = max(cache.used, width)
    which = torch.tensor([places[tuple(prompt)] for prompt in prompts], device=device)  # (n,)
    if len(distinct) < len(rows):
        cache.copy(rows[which], rows)
    return torch.cat(hidden)[which]  # (n, D)


class Decoder:
    """The trunk for one new token in every row of a cache. Made anew when rows leave the cache.

    The same numbers as `model.model(tokens[:, None], cache)`, but for rounding; in bf16 attention scores are rounded to
    bf16. Three things differ: a norm is a hypotenuse, sqrt(|x|^2 + D eps); turning by a position is a product with a
    matrix (rotate is linear), made once for all layers; attention is written out, and the query heads that share a key
    head are the rows of one product, so that keys are neither copied nor read twice.
    """

    def __init__(self, model: Llama, cache: KVCache, compile: bool = False):
        trunk, c, self.cache = model.model, model.config, cache
        S, E, weight = *cache.keys.shape[3:], trunk.norm.weight
        self.embedding, self.last_scale = trunk.embed_tokens.weight, self.scale(trunk.norm)
        self.floor = torch.tensor((c.hidden_size * c.rms_norm_eps) ** 0.5, device=weight.device)
        self.axes = torch.eye(E, device=weight.device)[None]  # (1, E, E)
        self.layers = []  # every weight, looked up once: for one row that costs as much as an operation
        for block, keys, values in zip(trunk.layers, cache.keys, cache.values):
            scales = self.scale(block.input_layernorm), self.scale(block.post_attention_layernorm)
            a, m = block.self_attn, block.mlp
            linear = [(x.weight, x.bias) for x in (a.q_proj, a.k_proj, a.v_proj, a.o_proj)]
            linear += [(x.weight, x.bias) for x in (m.gate_proj, m.up_proj, m.down_proj)]
            self.layers.append((*scales, *linear, keys.view(-1, S, E), values.view(-1, S, E)))  # (B*K, S, E)
        if compile:  # on a GPU with CUDA graphs, which must know that the cache stays in its place
            for stored in (x for layer in self.layers for x in layer[-2:]):
                torch._dynamo.mark_static_address(stored)
            mode = "reduce-overhead" if weight.is_cuda else None
            self.read = torch.compile(self.read, mode=mode)

    def scale(self, norm: RMSNorm) -> Tensor:
        """What a norm multiplies unit vectors by: sqrt(D) * weight, (D,), fp32."""
        return norm.weight.float() * len(norm.weight) ** 0.5

    def norm(self, x: Tensor, scale: Tensor) -> Tensor:
        """RMSNorm of x (B, D) in four operations."""
        wide = x.float()
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).hypot(self.floor)  # (B, 1)
        return (wide / size * scale).to(x.dtype)

    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens (B,) to their rows: the hidden states there, (B, D)."""
        cache, (B, K) = self.cache, self.cache.keys.shape[1:3]
        positions = cache.extend(1)  # (B, 1)
        turn = rotate(self.axes, cache.rope[0][positions], cache.rope[1][positions])  # (B, E, E)
        mask = cache.mask.expand(B, K, 1, -1).reshape(B * K, 1, -1)  # (B*K, 1, S)
        return self.read(tokens, turn.to(self.embedding.dtype), mask, cache.slots)

    def read(self, tokens: Tensor, turn: Tensor, mask: Tensor, slots: Tensor) -> Tensor:
        x, (B, E, _), S = F.embedding(tokens, self.embedding), turn.shape, mask.shape[2]  # (B, D)
        for scale1, scale2, q, k, v, o, gate, up, down, keys, values in self.layers:
            h = self.norm(x, scale1)  # (B, D)
            query = torch.bmm(F.linear(h, *q).view(B, -1, E), turn).view(len(keys), -1, E)  # (B*K, G, E)
            key, value = torch.bmm(F.linear(h, *k).view(B, -1, E), turn), F.linear(h, *v)  # (B, K, E), (B, K*E)
            keys.view(-1, E).index_copy_(0, slots, key.view(-1, E))
            values.view(-1, E).index_copy_(0, slots, value.view(-1, E))
            share = torch.baddbmm(mask, query, keys[:, :S].transpose(1, 2), alpha=E**-0.5).softmax(-1)  # (B*K, G, S)
            x = x + F.linear(torch.bmm(share, values[:, :S]).view(B, -1), *o)  # (B, D)
            h = self.norm(x, scale2)  # (B, D)
            x = x + F.linear(F.silu(F.linear(h, *gate)) * F.linear(h, *up), *down)  # (B, D)
        return self.norm(x, self.last_scale)
