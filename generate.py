"""Tokens in, tokens out: batched sampling with a key/value cache; and questions in, answers out.

    python generate.py --model weights/tiny-teacher --questions arith:test --out runs/try --temperatures 0.7,1.0
    python generate.py --model folder --questions gsm8k:test --shots 8 --out runs/few     # worked examples, no chat

Sampling draws from the full softmax at a temperature: no top-k, no top-p, no repetition penalty. The log-probability
returned with a token is therefore the one that it was drawn with, which PPO depends on.

Shapes are those of model.py, and S cached positions.
"""

import copy
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import runtime
from answers import extract_answer
from data import Question, Tokenizer, collate, load_questions
from model import Llama, ModelConfig, causal_attention, load_model, rope_table
from runtime import ranks, seed_of
from runtime.files import lines
from runtime.flags import AtOnce, Count, Input, Natural, Questions
from tasks.published import STOP_TEXT, few_shot_prompt

READ_AT_ONCE = {"cpu": 2**11, "cuda": 2**16}  # tokens of prompts: what fits into a core's own cache is read faster

# ---- tokens in, tokens out -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Response:
    """What a model said: token ids (those it ended with included), their log-probs, and why it stopped."""

    tokens: list[int]
    logprobs: list[float]
    finish: str  # 'stop': an end token or a stop text was sampled; 'length': max_new_tokens were
    text: str = ""  # the tokens read, up to a stop text: `answers_to` adds it, `generate` knows no letters


def generate(
    model: Llama, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0,
    stop_ids: Collection[int] = (), seed: int | Sequence[int] = 0, batch_size: int = 256,
    ended: Callable[[list[int]], bool] = lambda tokens: False, progress: Callable[[int], None] = lambda count: None,
    compile: bool = False,
) -> list[Response]:  # fmt: skip
    """Continue every prompt until a stop id or max_new_tokens; the answers come in the prompts' order.

    temperature 0 is greedy. The log-probs are under softmax(logits / temperature), for greedy under softmax(logits).
    `seed`: one number for each prompt, or one number, of which the prompts' own follow. Same prompts and seed: same
    text, whatever the batch size, but for rounding. `ended`, asked after each token with all new tokens of a row, may
    end the row too. Call it on every rank: each continues some prompts, and all get all answers. Raises ValueError for
    an empty prompt or one that leaves no room in the context, FloatingPointError if the model computes NaN.
    """
    room = model.config.max_position_embeddings - max_new_tokens
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= room:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones the model's context of "
                f"{room + max_new_tokens} takes 1 to {room}"
            )
    seeds = [seed_of(seed, i) for i in range(len(prompts))] if isinstance(seed, int) else seed
    model = ranks.full_model(model)
    step = torch.compile(model, dynamic=True) if compile else model  # for one new token a row; prompts are read plainly
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), prompts[i]))  # like lengths come together
    order, responses = order[ranks.RANK :: ranks.SIZE], {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        chances = np.stack([np.random.default_rng(seeds[i]).random(max_new_tokens) for i in rows])  # (B, new)
        batch = [prompts[i] for i in rows]
        answers = continue_batch(model, step, batch, chances, temperature, frozenset(stop_ids), ended, progress)
        responses |= dict(zip(rows, answers, strict=True))
    responses = {i: response for part in ranks.gather(responses) for i, response in part.items()}
    return [responses[i] for i in range(len(prompts))]


@torch.inference_mode()
def continue_batch(model, step, prompts, chances, temperature, stop_ids, ended, progress) -> list[Response]:
    """Draw token after token for every row of a batch: chances (B, new), a random number in [0, 1) for each token.

    `step` is the model, compiled or not, which reads one token a row; rows that have ended leave the batch.
    """
    device = model.lm_head.weight.device
    chances = torch.from_numpy(chances).to(device)  # (B, new)
    tokens, logprobs, finish = [[] for _ in prompts], [[] for _ in prompts], ["length"] * len(prompts)
    cache, logits = prefill(model, prompts)  # _, (B, V)
    going = list(range(len(prompts)))  # the prompt that each row of the cache continues
    for t in range(chances.shape[1]):
        token, logprob = sample_token(logits, temperature, chances[:, t])  # (b,), (b,)
        stay = []
        for row, (i, token_id, lp) in enumerate(zip(going, token.tolist(), logprob.tolist())):
            if finish[i] == "stop":  # a row that has ended goes on until enough of them have
                continue
            tokens[i].append(token_id)
            logprobs[i].append(lp)
            if token_id in stop_ids or ended(tokens[i]):
                finish[i] = "stop"
                progress(1)
            else:
                stay.append(row)
        if not stay or t == chances.shape[1] - 1:
            break
        if len(stay) <= 0.8 * len(going):  # enough to pay for the copy
            rows = torch.tensor(stay, device=device)
            cache.select(rows)
            token, chances, going = token[rows], chances[rows], [going[row] for row in stay]
        logits = step(token[:, None], cache)[:, 0]  # (b, V)
    progress(finish.count("length"))
    if not all(math.isfinite(sum(row)) for row in logprobs):
        raise FloatingPointError("the model computes NaN: the run that made its weights diverged")
    return [Response(*row) for row in zip(tokens, logprobs, finish)]


def prefill(model: Llama, prompts: list[list[int]]) -> tuple["KVCache", Tensor]:
    """A cache that holds the prompts, and the logits at their ends (B, V).

    Equal prompts are read once, and not all at the same time.
    """
    distinct = list(dict.fromkeys(map(tuple, prompts)))
    longest, device, dtype = max(map(len, distinct)), model.lm_head.weight.device, model.lm_head.weight.dtype
    cache, logits = KVCache(model.config, len(distinct), longest + 1, dtype, device), []
    size = max(1, READ_AT_ONCE[device.type] // longest)  # prompts
    for start in range(0, len(distinct), size):
        texts = distinct[start : start + size]
        tokens, _, lengths = collate(texts, [()] * len(texts), device)  # (U, P), _, (U,)
        ends = torch.arange(1, tokens.shape[1] + 1, device=device) == lengths[:, None]  # (U, P)
        here = slice(start, start + size)
        logits.append(model.lm_head(model.model(tokens, cache.part(here), keep=ends)).float())  # (U, V)
        cache.lengths[here] = lengths  # what lies beyond a row's own prompt is forgotten
    cache.used = longest
    logits = torch.cat(logits)
    if len(distinct) < len(prompts):
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        rows = torch.tensor([row_of[tuple(prompt)] for prompt in prompts], device=device)  # (B,)
        cache.select(rows)
        logits = logits[rows]
    return cache, logits


def sample_token(logits: Tensor, temperature: float, chance: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row from softmax(logits / temperature), or the largest logit if temperature is 0.

    logits (B, V) in fp32, chance (B,) in float64, uniform in [0, 1) -> token (B,), its log-probability (B,) in fp32
    under the distribution it was drawn from; for temperature 0 under softmax(logits). The token is the first whose
    cumulative probability exceeds the chance: one draw per row instead of V. Sums are in float64, and the chance is
    multiplied by the last of them, so that no token is lost and none of probability 0 is drawn.
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


# ---- the cache -----------------------------------------------------------------------------------------------------

GROWS_BY = 32  # positions


class KVCache:
    """Keys and values of every layer for rows of different lengths.

    Row b holds `lengths[b]` real positions; what lies beyond is garbage that the mask hides and later tokens
    overwrite. So prompts are read right-padded and no row ever carries padding *inside* its text. Every step reads
    all S positions, since a CPU reads memory twice as fast without gaps, and S grows as it has to.
    """

    def __init__(self, config: ModelConfig, batch_size: int, length: int, dtype: torch.dtype, device: torch.device):
        self.config = config
        shape = (batch_size, config.num_key_value_heads, 0, config.head_dim)  # (B, K, S, E) in each layer
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        self.lengths = torch.zeros(batch_size, dtype=torch.long, device=device)  # (B,)
        self.used = 0  # no row is longer than this
        self.grow(length)

    def grow(self, length: int) -> None:
        """Room for `length` positions in each row, and for a few more, since all is copied."""
        length = math.ceil(length / GROWS_BY) * GROWS_BY
        for stored in (self.keys, self.values):
            for layer, x in enumerate(stored):  # layer by layer: there is never a second cache
                stored[layer] = F.pad(x, (0, 0, 0, length - x.shape[2]))
        self.places = torch.arange(length, device=self.lengths.device)  # (S,)
        self.rope = rope_table(self.config, length, self.lengths.device)  # (S, E), (S, E)

    def extend(self, T: int) -> Tensor:
        """Make room for T more tokens in every row; their positions (B, T)."""
        first = self.used == 0
        self.used += T
        if self.used > len(self.places):
            self.grow(self.used)
        B, K, S, _ = self.keys[0].shape
        positions = self.lengths[:, None] + self.places[:T]  # (B, T)
        self.lengths = self.lengths + T
        heads = torch.arange(0, B * K * S, S, device=positions.device).view(B, K, 1)  # where each head begins
        self.slots = (heads + positions[:, None]).flatten()  # (B*K*T,) where each layer stores them
        hidden = self.places > positions[:, None, :, None]  # (B, 1, T, S)
        mask = torch.zeros_like(hidden, dtype=self.keys[0].dtype).masked_fill_(hidden, -math.inf)  # (B, 1, T, S)
        self.mask = None if first else mask.expand(-1, K, -1, -1).flatten(0, 1)  # (B*K, T, S), is added to the scores
        return positions

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v (B, T, K, E) in the room made; what q (B, T, H, E) finds in all that is stored, (B, T, H, E)."""
        keys, values = self.keys[layer].flatten(0, 1), self.values[layer].flatten(0, 1)  # (B*K, S, E)
        for stored, new in ((keys, k), (values, v)):
            stored.flatten(0, 1).index_copy_(0, self.slots, new.transpose(1, 2).flatten(0, 2))
        if self.mask is None:  # nothing was stored before
            return causal_attention(q, k, v)
        # the G query heads of a key head become G rows of one product: its keys are read once and never copied
        (B, T, H, E), K = q.shape, k.shape[2]
        q = q.view(B, T, K, -1, E).permute(0, 2, 3, 1, 4).reshape(B * K, -1, E)  # (B*K, G*T, E)
        mask = self.mask if T == 1 else self.mask.repeat(1, H // K, 1)  # (B*K, 1 or G*T, S)
        scores = torch.baddbmm(mask, q, keys.transpose(1, 2), alpha=E**-0.5)  # (B*K, G*T, S)
        out = torch.bmm(scores.softmax(-1), values)  # (B*K, G*T, E)
        return out.view(B, K, -1, T, E).permute(0, 3, 1, 2, 4).reshape(B, T, H, E)

    def part(self, rows: slice) -> "KVCache":
        """The same storage for some neighbouring rows alone, which must have room for what they read."""
        part = copy.copy(self)
        part.keys, part.values = [x[rows] for x in self.keys], [x[rows] for x in self.values]  # views
        part.lengths = self.lengths[rows]
        return part

    def select(self, rows: Tensor) -> None:
        """Go on with these rows (n,) alone, in this order; a row may come several times."""
        for stored in (self.keys, self.values):
            for layer, x in enumerate(stored):  # layer by layer: there is never a second cache
                stored[layer] = x[rows]
        self.lengths = self.lengths[rows]


# ---- questions in, answers out -------------------------------------------------------------------------------------


def prompts_of(
    config: ModelConfig, tokenizer: Tokenizer, questions: Sequence[Question], max_new_tokens: int, shots: int = 0
) -> list[list[int]]:
    """The token ids that ask each question: in the chat template, or after `shots` worked examples, to be completed.

    ValueError for a question that leaves no room for its answer.
    """
    prompts, context = [], config.max_position_embeddings
    for question in questions:
        prompt = tokenizer.text(few_shot_prompt(question, shots)) if shots else tokenizer.chat(question.prompt)
        runtime.require(
            len(prompt) + max_new_tokens <= context,
            f"question '{question.id}': a prompt of {len(prompt)} tokens and --max_new_tokens {max_new_tokens} exceed "
            f"the model's context of {context}: lower --max_new_tokens{' or --shots' * bool(shots)}, or leave it out",
        )
        prompts.append(prompt)
    return prompts


def answers_to(
    model: Llama, tokenizer: Tokenizer, prompts: list[list[int]], max_new_tokens: int, batch_size: int,
    temperature: float = 0.0, seed: int | Sequence[int] = 0, stop_text: str = "", **options,
) -> list[Response]:  # fmt: skip
    """`generate`, with each response's text. It also ends where it says `stop_text`, which its text leaves out."""

    def says(tokens: list[int]) -> bool:  # a token holds a byte or more, so a short tail is enough
        return bool(stop_text) and stop_text in tokenizer.decode(tokens[-len(stop_text.encode()) - 3 :])

    responses = generate(
        model, prompts, max_new_tokens, temperature, tokenizer.stop_ids, seed, batch_size, ended=says, **options
    )
    texts = [tokenizer.decode(response.tokens) for response in responses]
    return [replace(r, text=text.split(stop_text)[0] if stop_text else text) for r, text in zip(responses, texts)]


PART = 512  # answers between two saves of a stage


def answer_in_parts(
    stage: runtime.Stage, cfg, model: Llama, tokenizer: Tokenizer, prompts: list[list[int]], purpose: str,
    temperatures: Sequence[float] = (0.0,), samples: int = 1, **options,
) -> Iterator[tuple[float, range, list[list[Response]]]]:  # fmt: skip
    """Ask a stage's questions in parts, `samples` times at each temperature: the temperature, which ones, the answers.

    What the caller keeps by stage.append outlives a kill: the next run goes on with the part that is missing. Random
    numbers follow from run seed, purpose, and the indices of temperature, question and sample, so that parts and
    batches change nothing.
    """
    size = max(1, PART // samples)  # questions of a part
    starts = range(0, len(prompts), size)
    parts = [(t, range(i, min(i + size, len(prompts)))) for t in range(len(temperatures)) for i in starts]
    for step in stage.steps(len(parts), units=[samples * len(asked) for _, asked in parts]):
        index, asked = parts[step]
        seeds = [seed_of(cfg.seed, purpose, index, i, sample) for i in asked for sample in range(samples)]
        repeated = [prompts[i] for i in asked for _ in range(samples)]
        responses = answers_to(
            model, tokenizer, repeated, cfg.max_new_tokens, cfg.batch_size, temperatures[index], seeds,
            progress=stage.progress.update, **options,
        )  # fmt: skip
        yield temperatures[index], asked, [responses[i : i + samples] for i in range(0, len(responses), samples)]


def load(folder: str) -> tuple[Llama, Tokenizer]:
    """A model that only answers, and its tokenizer."""
    model = load_model(folder, runtime.inference_dtype(), runtime.default_device())
    runtime.set_threads(model)
    return model, Tokenizer(folder)


def answer(model: Llama, tokenizer: Tokenizer, question: Question, max_new_tokens: int = 256) -> Response:
    """The greedy answer to one question, of at most as many tokens as the context has room for."""
    [prompt] = prompts_of(model.config, tokenizer, [question], 1)
    room = min(max_new_tokens, model.config.max_position_embeddings - len(prompt))
    [response] = answers_to(model, tokenizer, [prompt], room, 1)
    return response


# ---- the script ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Sample answers to every question of a set."""

    model: Input  # Hugging Face folder
    questions: Questions  # question set: a JSONL, arith:train, gsm8k:train ...
    out: str  # folder for samples.jsonl
    source: str = "teacher"  # who is speaking, written beside every sample: teacher or student
    samples: Count = 8  # answers per question and temperature
    temperatures: str = "1.0"  # comma-separated; several give the vote more variety
    max_new_tokens: Count = 256  # an answer that has not ended by then counts as unfinished
    batch_size: AtOnce = 256  # rows sampled together
    limit: Natural = 0  # only the first questions; 0: all
    shots: Natural = 0  # worked examples before the question, as published scores have them; 0: a chat without
    lenient: bool = False  # read the last number or letter where no answer is stated
    seed: int = 0
    compile: bool = False  # torch.compile for the step of a GPU: a minute at first, then faster; for long runs


@runtime.stage
def main(cfg: Config, stage: runtime.Stage) -> None:
    try:
        temperatures = [float(text) for text in cfg.temperatures.split(",")]
    except ValueError:
        temperatures = [-1.0]
    good = all(0 <= temperature <= 100 for temperature in temperatures)
    runtime.require(good, f"--temperatures {cfg.temperatures}: one or more numbers from 0 to 100, comma-separated")
    runtime.require(cfg.source in ("teacher", "student"), f"--source {cfg.source}: 'teacher' or 'student'")
    questions = load_questions(cfg.questions, cfg.limit or None)
    model, tokenizer = load(cfg.model)
    prompts = prompts_of(model.config, tokenizer, questions, cfg.max_new_tokens, cfg.shots)
    options = {"stop_text": STOP_TEXT[questions[0].kind] if cfg.shots else "", "compile": cfg.compile}
    parts = answer_in_parts(stage, cfg, model, tokenizer, prompts, cfg.source, temperatures, cfg.samples, **options)
    for temperature, asked, answers in parts:
        rows = [
            {
                "id": questions[i].id,
                "source": cfg.source,
                "response": response.text,
                "answer": extract_answer(response.text, questions[i].kind, cfg.lenient),
                "finish": response.finish,
                "logprob": round(sum(response.logprobs), 4),
                "temperature": temperature,
                "tokens": len(response.tokens),
            }
            for i, responses in zip(asked, answers)
            for response in responses
        ]
        stage.append("samples.jsonl", lines(rows))
    rows = stage.rows("samples.jsonl")
    ended = sum(row["finish"] == "stop" for row in rows) / len(rows)
    answered = sum(row["answer"] is not None for row in rows) / len(rows)
    tokens = sum(row["tokens"] for row in rows)
    print(
        f"{len(rows)} answers to {len(questions)} questions: {ended:.1%} ended, {answered:.1%} with a result, "
        f"{tokens / len(rows):.0f} tokens"
    )
    read = sum(map(len, prompts)) * cfg.samples * len(temperatures)
    flops = 2 * sum(p.numel() for p in model.parameters()) * (tokens + read)
    stage.finish(tokens=tokens, flops=flops, ended=ended, answered=answered)


if __name__ == "__main__":
    runtime.launch(main, Config, every_rank=True)
