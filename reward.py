"""A Bradley-Terry reward model: one number for a whole answer, learned from pairs of which one is the better.

    python reward.py --model runs/try/2_sft --pairs runs/try/4_pseudo_reward/pairs.jsonl \\
        --calibrate runs/try/3_student/samples.jsonl --questions runs/try/0_questions/train.jsonl \\
        --out runs/try/5_reward

The score of an answer is read at its end token. After training, scores are shifted and scaled so that the student's
own samples have mean 0 and standard deviation 1: then `kl_coef` and the other numbers of PPO mean the same in every
run. A share of the *questions* is held out, and the model's quality is measured on their pairs.

Sources: Bradley-Terry loss as in arXiv 2203.02155, eq. 1; normalisation as in arXiv 1909.08593; the pairs are ours.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import quality
import runtime
from data import batches, collate, load_questions, read_jsonl
from eval import score_responses
from hf.tokenizer import Tokenizer
from model import ModelConfig, last_value, load_scalar_model, save_model
from runtime import memory, ranks
from runtime.checkpoint import Checkpoint
from runtime.steps import dealt


@dataclass(frozen=True)
class Config:
    """Train a reward model on pairs of responses."""

    model: str  # language model whose trunk it starts from: the SFT student, or the teacher
    pairs: str  # JSONL with prompt, chosen, rejected, weight
    calibrate: str  # the student's samples, JSONL: their scores get mean 0 and standard deviation 1
    questions: str  # the question set of those samples
    out: str  # folder to write: a Hugging Face sequence-classification model
    epochs: int = 1  # a second pass overfits on real data
    batch_size: int = 64  # pairs per optimiser step
    micro_tokens: int = 4096  # tokens per forward pass, padding included; changes memory, not the result
    gradient_checkpointing: bool = False  # a third more time for much less memory; the result stays
    lr: float = 2e-4  # peak, linear warm-up, then linear to 0
    warmup: int = 10  # optimiser steps
    max_grad_norm: float = 1.0
    held_out: float = 0.1  # share of the questions that only measure
    calibration_samples: int = 1000  # of the student's responses
    seed: int = 0


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, weight: Tensor | None = None) -> Tensor:
    """-log sigmoid(chosen - rejected), the weighted mean over N pairs: scores (N,), weight (N,) -> scalar.

    Example: chosen [2, 0], rejected [1, 0] -> (0.3133 + 0.6931) / 2.
    """
    weight = torch.ones_like(chosen) if weight is None else weight
    return -(F.logsigmoid(chosen - rejected) * weight).sum() / weight.sum()


def held_out_ids(ids: Iterable[str], share: float) -> set[str]:
    """The questions that only measure: a share of the different ids, at least one, the same ones in every run.

    Whole questions, so that no prompt is on both sides; chosen by a hash, so that the order of a file does not matter.
    """
    ordered = sorted(set(ids), key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    return set(ordered[: max(1, round(share * len(ordered)))])


def main(cfg: Config) -> None:
    for name in ("epochs", "batch_size", "micro_tokens", "lr", "max_grad_norm"):
        runtime.require(getattr(cfg, name) > 0, f"--{name} {getattr(cfg, name)}: must be greater than 0")
    runtime.require(cfg.warmup >= 0, f"--warmup {cfg.warmup}: must not be negative")
    runtime.require(cfg.calibration_samples > 1, f"--calibration_samples {cfg.calibration_samples}: at least 2")
    runtime.require(0 < cfg.held_out < 1, f"--held_out {cfg.held_out}: a share between 0 and 1")
    stage = runtime.Stage(
        cfg, ["model", "pairs", "calibrate", "questions"], memory=["micro_tokens", "gradient_checkpointing"]
    )
    if stage.finished:
        return
    rng = runtime.seed_all(cfg.seed)
    device = runtime.default_device()
    tokenizer = Tokenizer(cfg.model)
    train, held_out = [], []  # (prompt ids, chosen ids, rejected ids, weight)
    rows = list(read_jsonl(cfg.pairs, required=["id", "prompt", "chosen", "rejected"]))
    measuring = held_out_ids((row["id"] for row in rows), cfg.held_out)
    for row in rows:
        weight = row.get("weight", 1.0)
        runtime.require(
            type(weight) in (int, float) and 0 < weight < math.inf,
            f"{cfg.pairs}: a pair of '{row['id']}' has the weight {weight!r:.40}, which is no number above 0",
        )
        texts = tokenizer.chat(row["prompt"]), tokenizer.response(row["chosen"]), tokenizer.response(row["rejected"])
        pair = (*texts, float(weight))
        (held_out if row["id"] in measuring else train).append(pair)
    runtime.require(
        bool(train and held_out),
        f"{cfg.pairs}: {len(train)} pairs to train on and {len(held_out)} held out; "
        "both are needed: sample more answers, or change --held_out",
    )
    questions = {question.id: question for question in load_questions(cfg.questions)}
    samples = [
        row
        for row in read_jsonl(cfg.calibrate, required=["id", "response", "finish"])
        if row["id"] in questions and row["finish"] == "stop"
    ]
    runtime.require(len(samples) > 1, f"{cfg.calibrate}: {len(samples)} finished responses, too few to calibrate on")
    lengths = [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected, _ in train]

    config, longest = ModelConfig.from_folder(cfg.model), max(lengths)
    tokens = memory.pass_size(2 * longest, min(cfg.batch_size, len(train)), cfg.micro_tokens)  # two texts a pair
    memory.say(memory.training(config, tokens, cfg.gradient_checkpointing, device.type == "cuda", scalar=True))
    model = ranks.shard(load_scalar_model(cfg.model, torch.float32, device, new_head="normal"))
    context = config.max_position_embeddings
    runtime.require(longest <= context, f"{cfg.pairs}: a text of {longest} tokens, the model's context is {context}")
    model.model.gradient_checkpointing = cfg.gradient_checkpointing
    parameters = sum(p.numel() for p in model.parameters())
    runtime.set_threads(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    steps = cfg.epochs * -(-len(train) // cfg.batch_size)
    print(
        f"{parameters / 1e6:.2f}M parameters, {len(train)} pairs and {len(held_out)} held out, {steps} steps",
        flush=True,
    )

    order = [batch for _ in range(cfg.epochs) for batch in batches(len(lengths), cfg.batch_size, rng)]
    at = {"seen": 0}
    state = Checkpoint(stage, {"model": model, "optimizer": optimizer}, at)
    bar = runtime.Progress("reward", steps, state.step)
    for step in state.steps(steps):
        batch = order[step]
        runtime.set_lr(optimizer, cfg.lr * runtime.lr_at(step, steps, cfg.warmup))
        total = sum(train[i][3] for i in batch)  # weight of the whole step
        loss, right = torch.zeros(2, device=device)
        for rows, counts in dealt(batch, lengths, cfg.micro_tokens // 2):  # a pair is two texts
            micro = [train[j] for j in rows]
            weight = torch.tensor([pair[3] for pair in micro], device=device)  # (N,)
            # chosen and rejected in one forward pass: both see the same padding
            tokens, _, last = collate(
                [p for p, _, _, _ in micro] * 2, [c for _, c, _, _ in micro] + [r for _, _, r, _ in micro]
            )  # (2N, T), (2N,)
            with runtime.mixed_precision():
                scores = last_value(model(tokens.to(device)), last.to(device))  # (2N,)
            chosen, rejected = scores.chunk(2)  # (N,), (N,)
            micro_loss = bradley_terry_loss(chosen, rejected, weight) * (counts * weight.sum() / total)
            (ranks.SIZE * micro_loss).backward()  # over ranks FSDP takes the mean, a step is their sum
            loss += micro_loss.detach()
            right += counts * (chosen > rejected).sum()
        grad_norm = ranks.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums = ranks.total(torch.stack([loss, right]))  # (2,)
        loss, right, grad_norm = torch.stack([*sums, grad_norm]).tolist()  # read once: a GPU waits for it
        at["seen"] += sum(2 * len(train[i][0]) + len(train[i][1]) + len(train[i][2]) for i in batch)
        runtime.require(math.isfinite(loss), f"step {step}: the loss is {loss}: is --lr too high, {cfg.model} broken?")
        stage.log(step, loss=loss, accuracy=right / len(batch), grad_norm=grad_norm)
        bar.update(1, f"loss {loss:.3f} accuracy {right / len(batch):.2f}")
    bar.close()
    model = ranks.gathered(model)

    # shift and scale: the student's samples get mean 0 and standard deviation 1
    samples = [samples[i] for i in torch.randperm(len(samples), generator=rng)[: cfg.calibration_samples].tolist()]
    prompts = [tokenizer.chat(questions[row["id"]].prompt) for row in samples]
    responses = [tokenizer.response(row["response"]) for row in samples]
    scores = score_responses(model, prompts, responses, cfg.micro_tokens)  # (samples,)
    std = scores.std(correction=0).clamp(min=1e-6)  # a constant model must not become infinite
    with torch.no_grad():
        model.score.weight /= std.to(device)
    model.score_mean = (scores.mean() / std).item()

    # quality on the held-out questions
    chosen, rejected = (
        score_responses(model, [pair[0] for pair in held_out], [pair[side] for pair in held_out], cfg.micro_tokens)
        for side in (1, 2)
    )  # (P,), (P,)
    if ranks.RANK:
        return
    judge = {
        "held_out_pairs": len(held_out),
        # confidence is taken at the scale that was trained: calibrating the mean and deviation changes it
        **quality.pair_quality(
            chosen - rejected, [len(c) for _, c, _, _ in held_out], [len(r) for _, _, r, _ in held_out], std.item()
        ),
        "length_correlation": quality.correlation(scores, [len(response) for response in responses]),
        "score_std": std.item(),  # what the scores were divided by
    }
    save_model(model, cfg.out)
    tokenizer.save(cfg.out)
    print(
        f"{len(held_out)} held-out pairs: accuracy {judge['pair_accuracy']:.3f} ('longer wins' has "
        f"{judge['longer_wins']:.3f}), calibration error {judge['ece']:.3f}; correlation of score and length "
        f"{judge['length_correlation']:+.2f}"
    )
    stage.finish(tokens=at["seen"], flops=6 * parameters * at["seen"], **judge)


if __name__ == "__main__":
    runtime.launch(main, Config, every_rank=True)
