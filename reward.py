"""A Bradley-Terry reward model: one number for a whole answer, learned from pairs of which one is the better.

    python reward.py --model runs/try/2_sft --pairs runs/try/4_pseudo_reward/pairs.jsonl \\
        --calibrate runs/try/3_student/samples.jsonl --questions runs/try/0_questions/train.jsonl \\
        --out runs/try/5_reward

The score of an answer is read at its end token. After training, scores are shifted and scaled so that the student's
own samples have mean 0 and standard deviation 1: then `kl_coef` and the other numbers of PPO mean the same in every
run. Some of the *questions* are held out, and the model's quality is measured on their pairs.

Sources: Bradley-Terry loss as in arXiv 2203.02155, eq. 1; normalisation as in arXiv 1909.08593; the pairs are ours.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import lora
import quality
import runtime
from answers import extract_answer, is_correct
from data import Question, Tokenizer, collate, load_questions, read_jsonl
from model import ScalarModel, last_token, load_scalar_model
from runtime import ranks, steps
from runtime.flags import AtOnce, Count, Input, Natural, Positive, Questions, Saving, Share

UNFINISHED_SCORE = -2.0  # of an answer without an end: well below the mean of 0


@dataclass(frozen=True)
class Config:
    """Train a reward model on pairs of responses."""

    model: Input  # language model whose trunk it starts from: the SFT student, or the teacher
    pairs: Input  # JSONL with prompt, chosen, rejected, weight
    calibrate: Input  # the student's samples, JSONL: their scores get mean 0 and standard deviation 1
    questions: Questions  # the question set of those samples
    out: str  # folder to write: a Hugging Face sequence-classification model
    epochs: Count = 1  # a second pass overfits on real data
    batch_size: Count = 64  # pairs per optimiser step
    lr: Positive = 2e-4  # peak, linear warm-up, then linear to 0
    warmup: Natural = 10  # optimiser steps
    max_grad_norm: Positive = 1.0
    held_out: Share = 0.1  # fraction of the questions that only measure, at least one question
    calibration_samples: Count = 1000  # of the student's responses
    lora: Natural = 0  # rank of the adapters that learn instead of all weights (lora.py); they want ten times the lr
    seed: int = 0  # of the new head, and of the order of the pairs
    # what changes the memory that is needed and not the result
    micro_tokens: AtOnce = 4096  # tokens per forward pass, padding included
    gradient_checkpointing: Saving = False  # a third more time for much less memory


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, weight: Tensor | None = None) -> Tensor:
    """-log sigmoid(chosen - rejected), the weighted mean over N pairs: scores (N,), weight (N,) -> scalar.

    Example: chosen [2, 0], rejected [1, 0] -> (0.3133 + 0.6931) / 2.
    """
    weight = torch.ones_like(chosen) if weight is None else weight
    return -(F.logsigmoid(chosen - rejected) * weight).sum() / weight.sum()


# ---- data ----------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """Token ids, and how much the pair counts: a question's pairs have a weight of 1 together."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    weight: float


def held_out_ids(ids: Iterable[str], fraction: float) -> set[str]:
    """The questions that only measure: a fraction of the different ids, at least one, the same ones in every run.

    Whole questions, so that no prompt is on both sides; chosen by a hash, so that the order of a file does not matter.
    """
    ordered = sorted(set(ids), key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    return set(ordered[: max(1, round(fraction * len(ordered)))])


def load_pairs(cfg: Config, tokenizer: Tokenizer) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and pairs of the questions that only measure."""
    rows = list(read_jsonl(cfg.pairs, required=["id", "prompt", "chosen", "rejected"]))
    measuring = held_out_ids((row["id"] for row in rows), cfg.held_out)
    train, held_out = [], []
    for row in rows:
        weight = row.get("weight", 1.0)
        good = type(weight) in (int, float) and 0 < weight < math.inf
        runtime.require(good, f"{cfg.pairs}: a pair of '{row['id']}' has the weight {weight!r:.40}, no number above 0")
        texts = tokenizer.chat(row["prompt"]), tokenizer.response(row["chosen"]), tokenizer.response(row["rejected"])
        (held_out if row["id"] in measuring else train).append(Pair(*texts, float(weight)))
    runtime.require(
        bool(train and held_out),
        f"{cfg.pairs}: {len(train)} pairs to train on and {len(held_out)} held out; both are needed: sample more "
        "answers, or change --held_out",
    )
    return train, held_out


def load_samples_to_calibrate(cfg: Config, tokenizer: Tokenizer) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and responses, as token ids, of a random choice of the student's finished samples."""
    questions = {question.id: question for question in load_questions(cfg.questions)}
    samples = [
        row
        for row in read_jsonl(cfg.calibrate, required=["id", "response", "finish"])
        if row["id"] in questions and row["finish"] == "stop"
    ]
    runtime.require(len(samples) > 1, f"{cfg.calibrate}: {len(samples)} finished responses, too few to calibrate on")
    order = steps.permutation(len(samples), cfg.seed, "calibrate")[: cfg.calibration_samples]
    samples = [samples[i] for i in order]
    prompts = [tokenizer.chat(questions[row["id"]].prompt) for row in samples]
    return prompts, [tokenizer.response(row["response"]) for row in samples]


# ---- scores --------------------------------------------------------------------------------------------------------


def score_responses(
    model: ScalarModel | Callable, prompts: Sequence[list[int]], responses: Sequence[list[int]], micro_tokens: int
) -> Tensor:
    """The reward model's score of each response, read at its last token: (N,), on the CPU. Call on every rank."""
    device = runtime.default_device()

    def reader(rows: list[int]) -> Tensor:
        tokens, _, ends = collate([prompts[i] for i in rows], [responses[i] for i in rows], device)  # (b, T), _, (b,)
        return model(tokens, keep=last_token(ends, tokens.shape[1]))[None, :, None]  # (1, b, 1)

    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses)]
    like = torch.zeros(len(lengths), 1)  # (N, 1)
    return steps.read(lengths, micro_tokens, reader, like)[0, :, 0].cpu()  # (N,)


def replace_unfinished(scores: Tensor, finishes: Sequence[str], unfinished_score: float) -> Tensor:
    """Scores (N,) as they count, in PPO and in best-of-n: an answer that was cut off gets `unfinished_score`.

    The reward model learned from answers that end, so what it says of others means nothing.
    Example: scores [3, 1], 'length' and 'stop', -2 -> [-2, 1].
    """
    ended = torch.tensor([finish == "stop" for finish in finishes])  # (N,)
    return torch.where(ended, scores, unfinished_score)


def calibrate(model: ScalarModel, scores: Tensor) -> float:
    """Shift and scale the head so that its scores (N,) get mean 0 and deviation 1; returns their old deviation."""
    std = scores.std(correction=0).clamp(min=1e-6)  # a constant model must not become infinite
    with torch.no_grad():
        for weight in model.score.parameters():  # the head, and what an adapter adds to it
            weight /= std.to(weight.device)
    model.score_mean = (scores.mean() / std).item()
    return std.item()


def make_score(
    cfg, questions: list[Question], reward_model: ScalarModel | Callable | None
) -> tuple[Callable, list[Question]]:
    """The reward that PPO maximises: score(questions, prompts, responses, texts) -> (B,), and the questions it is for.

    Another reward is another function of this form: lists of questions, token ids and texts in, a number each out.
    `reward_model` is the network of --reward_model where it is loaded already; else it is loaded here.
    """
    given = [name for name in ("reward_model", "votes", "reward", "gold") if getattr(cfg, name)]
    asked_for = f"give one of --reward_model, --votes, --reward and --gold, not {given or 'none'}"
    runtime.require(len(given) == 1, asked_for)
    if cfg.reward:
        function = runtime.flags.function(cfg.reward, "--reward")

        def by_function(questions, prompts, responses, texts) -> Tensor:
            scores = torch.as_tensor(function(questions, prompts, responses, texts), dtype=torch.float32)
            one_each = scores.shape == (len(texts),)
            runtime.require(one_each, f"--reward {cfg.reward}: shape {tuple(scores.shape)} for {len(texts)} answers")
            return scores  # (B,)

        return by_function, questions
    if cfg.reward_model:
        dtype, device = runtime.trained_dtype(cfg.lora), runtime.default_device()
        if reward_model is None:
            reward_model = ranks.shard(load_scalar_model(cfg.reward_model, dtype, device).requires_grad_(False))

        def by_reward_model(questions, prompts, responses, texts) -> Tensor:
            return score_responses(reward_model, prompts, responses, cfg.micro_tokens)  # (B,)

        return by_reward_model, questions
    truth = {q.id: q.answer for q in questions if q.answer is not None} if cfg.gold else {}
    for row in read_jsonl(cfg.votes, required=["id", "vote"]) if cfg.votes else ():
        same = truth.setdefault(row["id"], row["vote"]) == row["vote"]
        runtime.require(same, f"{cfg.votes}: two votes for '{row['id']}'")
    questions = [question for question in questions if question.id in truth]
    runtime.require(bool(questions), f"{cfg.votes or '--gold'}: no answer to any question of {cfg.questions}")

    def by_answer(questions, prompts, responses, texts) -> Tensor:
        answers = [extract_answer(text, q.kind, cfg.lenient) for q, text in zip(questions, texts)]
        right = [is_correct(answer, truth[q.id], q.kind) for q, answer in zip(questions, answers)]
        return torch.tensor(right) * 2.0 - 1.0  # (B,)

    return by_answer, questions


# ---- the script ----------------------------------------------------------------------------------------------------


@runtime.stage
def main(cfg: Config, stage: runtime.Stage) -> None:
    tokenizer, device = Tokenizer(cfg.model), runtime.default_device()
    runtime.require(cfg.calibration_samples > 1, f"--calibration_samples {cfg.calibration_samples}: at least 2")
    train, held_out = load_pairs(cfg, tokenizer)
    samples = load_samples_to_calibrate(cfg, tokenizer)
    lengths = [2 * (len(p.prompt) + max(len(p.chosen), len(p.rejected))) for p in train]  # a pair is two texts

    head = runtime.seed_of(cfg.seed, "head")
    model = load_scalar_model(cfg.model, runtime.trained_dtype(cfg.lora), device, new_head="normal", seed=head)
    model = ranks.shard(lora.adapt(model, cfg.lora, cfg.seed, "reward adapters"))
    longest, context = max(lengths) // 2, model.config.max_position_embeddings
    runtime.require(longest <= context, f"{cfg.pairs}: a text of {longest} tokens, the model's context is {context}")
    model.model.gradient_checkpointing = cfg.gradient_checkpointing
    runtime.set_threads(model)
    adam = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    total_steps = cfg.epochs * math.ceil(len(train) / cfg.batch_size)
    print(f"{len(train)} pairs and {len(held_out)} held out, {total_steps} steps", flush=True)

    for step in stage.steps(total_steps, "loss {loss:.3f} accuracy {accuracy:.2f}", model=model, adam=adam):
        runtime.set_lr(adam, cfg.lr * runtime.lr_at(step, total_steps, cfg.warmup))
        batch = steps.rows_of_step(step, len(train), cfg.batch_size, cfg.seed, "reward")
        total = sum(train[i].weight for i in batch)  # weight of the whole step

        def loss_of(rows: list[int], total: float = total) -> tuple[Tensor, dict[str, Tensor]]:
            pairs = [train[i] for i in rows]
            weight = torch.tensor([pair.weight for pair in pairs], device=device)  # (n,)
            # chosen and rejected in one forward pass: both see the same padding
            responses = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
            tokens, _, ends = collate([pair.prompt for pair in pairs] * 2, responses, device)  # (2n, T), _, (2n,)
            chosen, rejected = model(tokens, keep=last_token(ends, tokens.shape[1])).chunk(2)  # (n,), (n,)
            # scaled so that the micro-batches of a step add up to its weighted mean
            loss = bradley_terry_loss(chosen, rejected, weight) * (weight.sum() / total)
            return loss, {"loss": loss, "right": (chosen > rejected).sum()}

        metrics = steps.step(model, adam, batch, lengths, cfg, loss_of)
        metrics["accuracy"] = metrics.pop("right") / len(batch)
        metrics["tokens"] = sum(2 * len(train[i].prompt) + len(train[i].chosen) + len(train[i].rejected) for i in batch)
        stage.log(step, metrics)

    model = ranks.full_model(model)
    scores = score_responses(model, *samples, cfg.micro_tokens)  # (samples,)
    std = calibrate(model, scores)
    results = measure(cfg, model, held_out, std)
    results["length_correlation"] = quality.correlation(scores, [len(response) for response in samples[1]])
    tokens, parameters = sum(row["tokens"] for row in stage.logged()), sum(p.numel() for p in model.parameters())
    stage.save(model, tokenizer, tokens=tokens, flops=(4 if cfg.lora else 6) * parameters * tokens, **results)


def measure(cfg: Config, model: ScalarModel, held_out: list[Pair], std: float) -> dict:
    """How good the calibrated model is, on pairs of questions that it was not trained on (quality.py)."""
    prompts, chosen, rejected, _ = zip(*held_out)
    margins = score_responses(model, prompts, chosen, cfg.micro_tokens)  # (P,)
    margins -= score_responses(model, prompts, rejected, cfg.micro_tokens)
    # confidence is taken at the scale that was trained: calibrating has changed it
    found = quality.pair_quality(margins, list(map(len, chosen)), list(map(len, rejected)), std)
    print(
        f"{len(held_out)} held-out pairs: accuracy {found['pair_accuracy']:.2f} ('longer wins' "
        f"{found['longer_wins']:.2f}), calibration error {found['ece']:.2f}"
    )
    return {"held_out_pairs": len(held_out), "score_std": std} | found


if __name__ == "__main__":
    runtime.launch(main, Config, every_rank=True)
