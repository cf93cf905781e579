"""Tokens in, tokens out: batched sampling with a key/value cache. As a script it answers questions.

    python generate.py --model weights/tiny-teacher --questions arith:test --out runs/try --temperatures 0.7,1.0
    python generate.py --model folder --questions gsm8k:test --shots 8 --out runs/few     # worked examples, no chat
    python generate.py --model weights/tiny-teacher --ask "Ava has 3 pens. Ava buys 4 more. How many pens does ...?"

Sampling draws from the full softmax at a temperature: no top-k, no top-p, no repetition penalty. The log-probability
returned with a token is therefore the one that it was drawn with, which PPO depends on.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import runtime
from answers import extract_answer
from chat import Tokenizer
from data import STOP_TEXT, Question, few_shot_prompt, load_questions, write_jsonl
from model import KVCache, Llama, load_model


@dataclass(frozen=True)
class Response:
    """What a model said: token ids (those it ended with included), their log-probs, and why it stopped."""

    tokens: list[int]
    logprobs: list[float]
    finish: str  # 'stop': an end token or a stop text was sampled; 'length': max_new_tokens were
    text: str = ""  # the tokens read, up to a stop text: answer_questions adds it, generate knows no letters


@torch.no_grad()
def generate(
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    stop_ids: Collection[int] = (),
    seed: int = 0,
    batch_size: int = 256,
    progress: Callable[[int], None] = lambda count: None,
    ended: Callable[[list[int]], bool] | None = None,
) -> list[Response]:
    """Continue every prompt until a stop id or max_new_tokens; the answers come in the prompts' order.

    `ended`, asked after each new token with all new tokens of a row, may end the row too.
    temperature 0 is greedy. The log-probs are under softmax(logits / temperature), for greedy under softmax(logits).
    Same prompts, seed and batch size on the same machine: same text. Raises ValueError for an empty prompt or one
    that leaves no room in the model's context, FloatingPointError if the model computes NaN.
    """
    room = model.config.max_position_embeddings - max_new_tokens
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= room:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens; with {max_new_tokens} new ones the model's "
                f"context of {model.config.max_position_embeddings} takes 1 to {room}"
            )
    rng = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    stop = torch.tensor(sorted(stop_ids), dtype=torch.long, device=model.lm_head.weight.device)
    responses: list[Response | None] = [None] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding within a batch
    for start in range(0, len(prompts), batch_size):
        rows = by_length[start : start + batch_size]
        batch = [prompts[i] for i in rows]
        for row, response in _generate_batch(model, batch, max_new_tokens, temperature, stop, rng, ended):
            responses[rows[row]] = response
            progress(1)
    return responses


def _generate_batch(
    model: Llama,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    stop: Tensor,
    rng: torch.Generator,
    text_ended: Callable[[list[int]], bool] | None,
) -> Iterator[tuple[int, Response]]:
    """Yield (row, response) as rows end. B rows are in the batch; those that ended leave it, and the cache, in bulk."""
    device = stop.device
    lengths = torch.tensor([len(prompt) for prompt in prompts])  # (B,)
    width = int(lengths.max())
    padded = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=device)  # (B, P)
    cache = KVCache(model.config, len(prompts), width + max_new_tokens, model.lm_head.weight.dtype, device)

    # prefill: one pass over all prompts, logits only where each prompt ends
    hidden = model.model(padded, cache)  # (B, P, D)
    cache.lengths = lengths.to(device)  # what lies beyond a row's own prompt is forgotten
    hidden = hidden[torch.arange(len(prompts), device=device), cache.lengths - 1]  # (B, D)

    alive = torch.arange(len(prompts))  # (B,) the row each batch entry answers
    ended = torch.zeros(len(prompts), dtype=torch.bool)  # (B,) entries that have stopped but not yet left
    tokens = torch.zeros(len(prompts), max_new_tokens, dtype=torch.long)  # (rows, T)
    logprobs = torch.zeros(len(prompts), max_new_tokens)  # (rows, T)
    for t in range(max_new_tokens):
        logits = model.lm_head(hidden).float()  # (B, V)
        if not logits.isfinite().all():
            raise FloatingPointError("the model computes NaN or infinity: the run that made its weights diverged")
        token, logprob = sample_token(logits, temperature, rng)  # (B,), (B,)
        tokens[alive, t], logprobs[alive, t] = token.cpu(), logprob.cpu()
        stopped = torch.isin(token, stop).cpu() & ~ended  # (B,)
        if text_ended is not None:
            for entry in (~stopped & ~ended).nonzero()[:, 0].tolist():
                stopped[entry] = text_ended(tokens[alive[entry], : t + 1].tolist())
        for row in alive[stopped].tolist():
            yield row, Response(tokens[row, : t + 1].tolist(), logprobs[row, : t + 1].tolist(), "stop")
        ended |= stopped
        if ended.all() or t == max_new_tokens - 1:
            break
        if ended.float().mean() > 0.2:  # enough to pay for the copy: they leave the batch and the cache
            going = (~ended).nonzero().squeeze(1)  # (B',)
            alive, ended, token = alive[going], ended[going], token[going.to(device)]
            cache.keep(going.to(device))
        hidden = model.model(token[:, None], cache)[:, 0]  # (B, D)
    for row in alive[~ended].tolist():
        yield row, Response(tokens[row].tolist(), logprobs[row].tolist(), "length")


def sample_token(logits: Tensor, temperature: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one token per row from softmax(logits / temperature), or the largest logit if temperature is 0.

    logits (B, V) -> token (B,), its log-probability (B,) under the distribution it was drawn from; for temperature 0
    under softmax(logits). Every draw comes from `rng`. Example: [0, ln 3], temperature 0 -> token 1, ln 3/4 = -0.2877.
    """
    logprobs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)  # (B, V)
    token = (
        logprobs.argmax(-1) if temperature == 0 else torch.multinomial(logprobs.exp(), 1, generator=rng)[:, 0]
    )  # (B,)
    return token, logprobs.gather(-1, token[:, None])[:, 0]


def prompt_tokens(tokenizer: Tokenizer, question: Question, shots: int) -> list[int]:
    """How a question is asked: as a chat without examples, or, with shots, as a text to be completed."""
    return tokenizer.text(few_shot_prompt(question, shots)) if shots else tokenizer.chat(question.prompt)


def says(tokenizer: Tokenizer, stop: str) -> Callable[[list[int]], bool]:
    """Whether new tokens have just completed a stop text. A token holds a byte or more, so a short tail is enough."""
    return lambda tokens: stop in tokenizer.decode(tokens[-len(stop.encode()) - 3 :])


def answer_questions(
    model: Llama,
    tokenizer: Tokenizer,
    questions: list[Question],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    label: str = "generate",
    samples: int = 1,
    shots: int = 0,
) -> list[list[Response]]:
    """`samples` responses to each question, with their text and a progress bar.

    shots 0 asks in the chat template. With shots the model completes a text (data.few_shot_prompt), and a response ends
    where it begins a question of its own: its tokens include that beginning, its text does not. All questions are then
    of one kind. Raises ValueError for a question that does not fit into the model's context.
    """
    context = model.config.max_position_embeddings
    prompts = []
    for question in questions:
        prompt = prompt_tokens(tokenizer, question, shots)
        runtime.require(
            len(prompt) + max_new_tokens <= context,
            f"question '{question.id}': a prompt of {len(prompt)} tokens and --max_new_tokens {max_new_tokens} exceed "
            f"the model's context of {context}: lower --max_new_tokens{' or --shots' * bool(shots)}, or leave it out",
        )
        prompts += [prompt] * samples
    stop = STOP_TEXT[questions[0].kind] if shots else None
    bar = runtime.Progress(label, len(prompts))
    flat = generate(
        model,
        prompts,
        max_new_tokens,
        temperature,
        tokenizer.stop_ids,
        seed,
        batch_size,
        bar.update,
        says(tokenizer, stop) if stop else None,
    )
    bar.close()
    texts = (tokenizer.decode(response.tokens) for response in flat)
    flat = [replace(response, text=text.split(stop)[0] if stop else text) for response, text in zip(flat, texts)]
    return [flat[i : i + samples] for i in range(0, len(flat), samples)]


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
    ask: str = ""  # one question to be answered greedily on the screen


def main(cfg: Config) -> None:
    temperatures = [_temperature(text) for text in cfg.temperatures.split(",")]
    runtime.require(cfg.samples > 0, f"--samples {cfg.samples}: at least 1 is needed")
    runtime.require(cfg.max_new_tokens > 0, f"--max_new_tokens {cfg.max_new_tokens}: at least 1 is needed")
    runtime.require(cfg.batch_size > 0, f"--batch_size {cfg.batch_size}: at least 1 is needed")
    runtime.require(cfg.shots >= 0, f"--shots {cfg.shots}: 0 or more")
    runtime.require(cfg.source in ("teacher", "student"), f"--source {cfg.source}: 'teacher' or 'student'")
    runtime.require(bool(cfg.ask) or bool(cfg.questions and cfg.out), "give --questions and --out, or --ask")
    if cfg.ask:
        tokenizer = Tokenizer(cfg.model)
        model = load_model(cfg.model, runtime.inference_dtype(), runtime.default_device())
        asked = [Question("--ask", cfg.ask)]
        [[response]] = answer_questions(model, tokenizer, asked, cfg.max_new_tokens, 0.0, 0, 1, shots=cfg.shots)
        print(response.text)
        return
    stage = runtime.Stage(cfg, inputs=["model", "questions"])
    if stage.finished:
        return
    questions = load_questions(cfg.questions, cfg.limit or None)
    tokenizer, model = Tokenizer(cfg.model), load_model(cfg.model, runtime.inference_dtype(), runtime.default_device())
    rows, tokens = [], 0
    for index, temperature in enumerate(temperatures):
        answers = answer_questions(
            model,
            tokenizer,
            questions,
            cfg.max_new_tokens,
            temperature,
            cfg.seed + index,
            cfg.batch_size,
            f"{cfg.source} T={temperature}",
            cfg.samples,
            cfg.shots,
        )
        for question, responses in zip(questions, answers):
            for response in responses:
                tokens += len(response.tokens)
                rows.append(
                    {
                        "id": question.id,
                        "source": cfg.source,
                        "response": response.text,
                        "answer": extract_answer(response.text, question.kind, cfg.lenient),
                        "finish": response.finish,
                        "logprob": round(sum(response.logprobs), 4),
                        "temperature": temperature,
                        "tokens": len(response.tokens),
                    }
                )
    write_jsonl(stage.out / "samples.jsonl", rows)
    ended = sum(row["finish"] == "stop" for row in rows) / len(rows)
    answered = sum(row["answer"] is not None for row in rows) / len(rows)
    print(
        f"{len(rows)} answers to {len(questions)} questions: {ended:.1%} ended, {answered:.1%} state an answer, "
        f"{tokens / len(rows):.1f} tokens each"
    )
    read = sum(len(prompt_tokens(tokenizer, q, cfg.shots)) for q in questions) * cfg.samples * len(temperatures)
    parameters = sum(p.numel() for p in model.parameters())
    stage.finish(tokens=tokens, flops=2 * parameters * (tokens + read), ended=ended, answered=answered)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    runtime.require(0 <= value <= 100, f"--temperatures: '{text}' is not a temperature (0 or more, comma-separated)")
    return value


if __name__ == "__main__":
    runtime.launch(main, Config)
