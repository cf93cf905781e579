"""Tokens in, tokens out: batched sampling with a key/value cache. As a script it answers questions.

    python generate.py --model weights/tiny-teacher --questions arith:test --out runs/try --temperatures 0.7,1.0
    python generate.py --model folder --questions gsm8k:test --shots 8 --out runs/few     # worked examples, no chat
    python generate.py --model weights/tiny-teacher --ask "Ava has 3 pens. Ava buys 4 more. How many pens does ...?"

Sampling draws from the full softmax at a temperature: no top-k, no top-p, no repetition penalty. The log-probability
returned with a token is therefore the one that it was drawn with, which PPO depends on.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

import runtime
from answers import extract_answer
from chat import Tokenizer
from checkpoint import Checkpoint
from data import STOP_TEXT, Question, few_shot_prompt, load_questions, write_jsonl
from model import KVCache, Llama, load_model

LOOK_EVERY = {"cpu": 1, "cuda": 8}  # steps between two looks at who has ended: a GPU must be waited for


@dataclass(frozen=True)
class Response:
    """What a model said: token ids (those it ended with included), their log-probs, and why it stopped."""

    tokens: list[int]
    logprobs: list[float]
    finish: str  # 'stop': an end token or a stop text was sampled; 'length': max_new_tokens were
    text: str = ""  # the tokens read, up to a stop text: answer_questions adds it, generate knows no letters


@torch.inference_mode()
def generate(
    model: Llama, prompts: list[list[int]], max_new_tokens: int, temperature: float = 1.0,
    stop_ids: Collection[int] = (), seed: int = 0, batch_size: int = 256, progress: Callable = lambda count: None,
    ended: Callable[[list[int]], bool] | None = None, compile: bool = False,
) -> list[Response]:
    """Continue every prompt until a stop id or max_new_tokens; the answers come in the prompts' order.

    `ended`, asked after each new token with all new tokens of a row, may end the row too.
    temperature 0 is greedy. The log-probs are under softmax(logits / temperature), for greedy under softmax(logits).
    Same prompts and seed: same text, whatever the batch size, but for rounding. `compile` (torch.compile, on a GPU with
    CUDA graphs) is there to make every step faster; what it gives has not been measured yet. Raises ValueError for an
    empty prompt or one that leaves no room in the model's context, FloatingPointError if the model computes NaN.
    """
    weight, S = model.lm_head.weight, max(map(len, prompts), default=0) + max_new_tokens
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= (room := model.config.max_position_embeddings - max_new_tokens):
            raise ValueError(f"prompt {index} has {len(prompt)} tokens; with {max_new_tokens} new ones the model's "
                             f"context of {room + max_new_tokens} takes 1 to {room}")
    responses: list[Response | None] = [None] * len(prompts)
    waiting = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))  # the longest enter first
    device, B, T, trunk = weight.device, min(batch_size, len(prompts)), max_new_tokens + 1, model.model
    trunk = torch.compile(trunk, mode="reduce-overhead" if device.type == "cuda" else None) if compile else trunk
    look = 1 if ended else LOOK_EVERY[device.type]
    stop = torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)
    cache = KVCache(model.config, B, S, weight.dtype, device)
    # rows of the batch; one at its end stands still, in the cell beyond its answer, until the next look
    asked = torch.full((B,), -1)  # (B,) the prompt that it answers; -1: free
    hidden = torch.zeros(B, weight.shape[1], dtype=weight.dtype, device=device)  # (B, D)
    length = torch.zeros(B, dtype=torch.long, device=device)  # (B,) of the answer so far
    stopped = torch.zeros(B, dtype=torch.bool, device=device)  # (B,)
    tokens, logprobs = torch.zeros(B, T, dtype=torch.long, device=device), torch.zeros(B, T, device=device)  # (B, T)
    chances = torch.zeros(B, T, dtype=torch.float64, device=device)  # (B, T)
    step = 0
    while waiting or (asked >= 0).any():
        if waiting and 4 * (asked < 0).sum() >= B:  # many prompts enter at once: a few would cost nearly as much
            free = (asked < 0).nonzero()[: len(waiting), 0]  # (n,)
            group = [waiting.pop() for _ in free]
            hidden[free] = prefill(model, cache, free.to(device), [prompts[i] for i in group])  # (n, D)
            own = [np.random.default_rng((seed % 2**64, i)).random(T) for i in group]  # whoever shares the batch
            chances[free] = torch.from_numpy(np.stack(own)).to(device)  # (n, T)
            asked[free], length[free], stopped[free] = torch.tensor(group), 0, False
            cache.used = S if compile else cache.used  # one shape for every step
        cell = torch.arange(len(length), device=device), length
        token, logprobs[cell] = sample_token(model.lm_head(hidden).float(), temperature, chances[cell])  # (B,), (B,)
        tokens[cell] = token
        active = ~stopped & (length < max_new_tokens)  # (B,)
        length += active
        stopped |= active & torch.isin(token, stop)
        step += 1
        if step % look == 0:
            if ended:
                for row in ((asked >= 0) & ~stopped.cpu()).nonzero()[:, 0].tolist():
                    stopped[row] = ended(tokens[row, : length[row]].tolist())
            over = ((asked >= 0) & (stopped | (length == max_new_tokens)).cpu()).nonzero()[:, 0]  # (n,)
            columns = (x[over].tolist() for x in (asked, length, stopped, tokens, logprobs))
            for index, n, stop_seen, ids, chosen in zip(*columns):
                if not math.isfinite(sum(chosen[:n])):
                    raise FloatingPointError("the model computes NaN: the run that made its weights diverged")
                responses[index] = Response(ids[:n], chosen[:n], "stop" if stop_seen else "length")
                progress(1)
            asked[over] = -1
            stay = (asked >= 0).nonzero()[:, 0]  # (B',)
            if not len(stay):
                continue
            if not waiting and len(stay) <= (0.5 if compile else 0.8) * len(asked):  # enough leave to pay for the copy
                cache.keep(stay.to(device))
                state = (asked, length, stopped, token, tokens, logprobs, chances)
                asked, length, stopped, token, tokens, logprobs, chances = (x[stay] for x in state)
            if len(over) and not compile:
                cache.used = int(cache.lengths.max())
        hidden = trunk(token[:, None], cache)[:, 0].clone()  # (B, D), not the graph's own memory
        cache.lengths = cache.lengths - (stopped | (length == max_new_tokens)).long()
    return responses


def prefill(model: Llama, cache: KVCache, rows: Tensor, prompts: list[list[int]]) -> Tensor:
    """Read n prompts into `rows` (n,) of the cache, equal ones once: the hidden states at their ends, (n, D)."""
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    width, device = max(map(len, distinct)), rows.device
    padded = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in distinct], device=device)  # (U, P)
    lengths = torch.tensor([len(prompt) for prompt in distinct], device=device)  # (U,)
    which = torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=device)  # (n,)
    hidden = model.model(padded, cache.only(rows[: len(distinct)]))  # (U, P, D)
    cache.used = max(cache.used, width)
    if len(distinct) < len(rows):
        cache.copy(rows[which], rows)
    cache.lengths[rows] = lengths[which]  # what lies beyond a row's own prompt is forgotten
    return hidden[torch.arange(len(distinct), device=device), lengths - 1][which]  # (n, D)


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


def prompt_tokens(tokenizer: Tokenizer, question: Question, shots: int) -> list[int]:
    """How a question is asked: as a chat without examples, or, with shots, as a text to be completed."""
    return tokenizer.text(few_shot_prompt(question, shots)) if shots else tokenizer.chat(question.prompt)


def says(tokenizer: Tokenizer, stop: str) -> Callable[[list[int]], bool]:
    """Whether new tokens have just completed a stop text. A token holds a byte or more, so a short tail is enough."""
    return lambda tokens: stop in tokenizer.decode(tokens[-len(stop.encode()) - 3 :])


def answer_questions(
    model: Llama, tokenizer: Tokenizer, questions: list[Question], max_new_tokens: int, temperature: float, seed: int,
    batch_size: int, label: str = "generate", samples: int = 1, shots: int = 0, compile: bool = False,
) -> list[list[Response]]:
    """`samples` responses to each question, with their text and a progress bar.

    shots 0 asks in the chat template. With shots the model completes a text (data.few_shot_prompt), and a response ends
    where it begins a question of its own: its tokens include that beginning, its text does not. All questions are then
    of one kind. Raises ValueError for a question that does not fit into the model's context.
    """
    context, prompts = model.config.max_position_embeddings, []
    for question in questions:
        prompt = prompt_tokens(tokenizer, question, shots)
        runtime.require(
            len(prompt) + max_new_tokens <= context,
            f"question '{question.id}': a prompt of {len(prompt)} tokens and --max_new_tokens {max_new_tokens} exceed "
            f"the model's context of {context}: lower --max_new_tokens{' or --shots' * bool(shots)}, or leave it out",
        )
        prompts += [prompt] * samples
    stop = STOP_TEXT[questions[0].kind] if shots else None
    ended = says(tokenizer, stop) if stop else None
    bar = runtime.Progress(label, len(prompts))
    flat = generate(
        model, prompts, max_new_tokens, temperature, tokenizer.stop_ids, seed, batch_size, bar.update, ended, compile
    )
    bar.close()
    texts = (tokenizer.decode(response.tokens) for response in flat)
    flat = [replace(response, text=text.split(stop)[0] if stop else text) for response, text in zip(flat, texts)]
    return [flat[i : i + samples] for i in range(0, len(flat), samples)]


def answer_stage(
    stage: runtime.Stage, model: Llama, tokenizer: Tokenizer, questions: list[Question], max_new_tokens: int,
    temperatures: list[float], seed: int, batch_size: int, label: str, samples: int = 1, shots: int = 0,
    compile: bool = False,
) -> list[list[list[Response]]]:
    """answer_questions at each temperature, as the work of a stage: a run that is killed goes on where it was.

    The questions are asked in parts of some eight batches, whose answers do not depend on the other parts; what is
    answered is saved between them.
    """
    size = max(1, 8 * batch_size // samples)
    parts = [(index, start) for index in range(len(temperatures)) for start in range(0, len(questions), size)]
    at = {"answers": [[] for _ in temperatures]}
    for step in Checkpoint(stage, {}, at).steps(len(parts)):
        index, start = parts[step]
        answers = answer_questions(
            model, tokenizer, questions[start : start + size], max_new_tokens, temperatures[index],
            seed + index + (start << 32),  # a part's rows draw chances of their own
            batch_size, f"{label} T={temperatures[index]:g}", samples, shots, compile,
        )
        at["answers"][index] += [[vars(response) for response in responses] for responses in answers]
    return [[[Response(**fields) for fields in responses] for responses in answers] for answers in at["answers"]]


# ---- the script ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Sample answers to every question of a set, or, with --ask, print one answer."""

    model: str  # Hugging Face folder
    questions: str = ""  # question set: a JSONL, arith:train, gsm8k:train ...
    out: str = ""  # folder for samples.jsonl
    source: str = "teacher"  # who is speaking, written beside every sample: teacher or student
    samples: int = 8  # answers per question and temperature
    temperatures: str = "1.0"  # comma-separated; several give the vote more variety
    max_new_tokens: int = 256  # an answer that has not ended by then counts as unfinished
    batch_size: int = 256  # rows sampled together
    limit: int = 0  # only the first questions; 0: all
    shots: int = 0  # worked examples before the question, as published scores have them; 0: a chat without
    lenient: bool = False  # read the last number or letter where no answer is stated
    seed: int = 0
    compile: bool = False  # torch.compile, on a GPU with CUDA graphs: a minute at first, then faster; for long runs
    ask: str = ""  # one question to be answered greedily on the screen


def main(cfg: Config) -> None:
    try:
        temperatures = [float(text) for text in cfg.temperatures.split(",")]
    except ValueError:
        temperatures = [-1.0]
    good = all(0 <= temperature <= 100 for temperature in temperatures)
    runtime.require(good, f"--temperatures {cfg.temperatures}: one or more numbers from 0 to 100, comma-separated")
    for name in ("samples", "max_new_tokens", "batch_size"):
        runtime.require(getattr(cfg, name) > 0, f"--{name} {getattr(cfg, name)}: at least 1 is needed")
    for name in ("shots", "limit"):
        runtime.require(getattr(cfg, name) >= 0, f"--{name} {getattr(cfg, name)}: 0 or more")
    runtime.require(cfg.source in ("teacher", "student"), f"--source {cfg.source}: 'teacher' or 'student'")
    runtime.require(bool(cfg.ask) or bool(cfg.questions and cfg.out), "give --questions and --out, or --ask")
    stage = None if cfg.ask else runtime.Stage(cfg, inputs=["model", "questions"])
    if stage and stage.finished:
        return
    questions = [Question("--ask", cfg.ask)] if cfg.ask else load_questions(cfg.questions, cfg.limit or None)
    tokenizer, model = Tokenizer(cfg.model), load_model(cfg.model, runtime.inference_dtype(), runtime.default_device())
    runtime.set_threads(model, say=not cfg.ask)  # --ask prints an answer and nothing else
    if cfg.ask:
        [[response]] = answer_questions(model, tokenizer, questions, cfg.max_new_tokens, 0.0, 0, 1, shots=cfg.shots)
        print(response.text)
        return
    rows, tokens, settings = [], 0, (cfg.batch_size, cfg.source, cfg.samples, cfg.shots, cfg.compile)
    sampling = (cfg.max_new_tokens, temperatures, cfg.seed, *settings)
    for temperature, answers in zip(temperatures, answer_stage(stage, model, tokenizer, questions, *sampling)):
        for question, responses in zip(questions, answers):
            for response in responses:
                tokens += len(response.tokens)
                answer = extract_answer(response.text, question.kind, cfg.lenient)
                rows.append({
                    "id": question.id, "source": cfg.source, "response": response.text, "answer": answer,
                    "finish": response.finish, "logprob": round(sum(response.logprobs), 4),
                    "temperature": temperature, "tokens": len(response.tokens),
                })
    write_jsonl(stage.out / "samples.jsonl", rows)
    ended = sum(row["finish"] == "stop" for row in rows) / len(rows)
    answered = sum(row["answer"] is not None for row in rows) / len(rows)
    print(f"{len(rows)} answers to {len(questions)} questions: {ended:.1%} ended, {answered:.1%} state an answer, "
          f"{tokens / len(rows):.1f} tokens each")
    read = sum(len(prompt_tokens(tokenizer, q, cfg.shots)) for q in questions) * cfg.samples * len(temperatures)
    parameters = sum(p.numel() for p in model.parameters())
    stage.finish(tokens=tokens, flops=2 * parameters * (tokens + read), ended=ended, answered=answered)


if __name__ == "__main__":
    runtime.launch(main, Config)
