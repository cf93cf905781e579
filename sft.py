"""Supervised fine-tuning: make the answers that a teacher gave more likely, token by token.

    python sft.py --model weights/tiny-student-base --data runs/try/1_vote/sft.jsonl --out runs/try/2_sft

The data is a JSONL of {"prompt", "response"}. Only the response is trained, its end token included: a model that is
never taught to stop never does. This is the warm-up stage of arXiv 2502.19557; the same script pretrains the bundled
models (weights/make.py).
"""

import json
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

import runtime
from data import batches, collate, read_jsonl
from hf.tokenizer import Tokenizer
from model import ModelConfig, load_model, masked_logprobs, save_model
from runtime import memory, ranks
from runtime.checkpoint import Checkpoint
from runtime.steps import dealt


@dataclass(frozen=True)
class Config:
    """Fine-tune a model on prompts and responses."""

    model: str  # Hugging Face folder to start from
    data: str  # JSONL with prompt and response
    out: str  # Hugging Face folder to write
    limit: int = 0  # only the first examples; 0: all
    epochs: int = 2  # passes over the data
    match_flops: str = ""  # instead: as many whole passes as cost what that finished stage cost, such as 6_ppo
    batch_size: int = 64  # sequences per optimiser step
    micro_tokens: int = 4096  # tokens per forward pass, padding included; changes memory, not the result
    gradient_checkpointing: bool = False  # a third more time for much less memory; the result stays
    compile: bool = False  # torch.compile for the blocks: a minute at first, then a sixth faster; for long runs
    lr: float = 2e-4  # peak, linear warm-up, then linear to 0
    warmup: int = 20  # optimiser steps
    weight_decay: float = 0.0  # the warm-up is short: nothing to regularise
    max_grad_norm: float = 1.0  # against the odd steep batch
    max_tokens: int = 1024  # longer examples are left out, and counted
    seed: int = 0


def sft_loss(logprobs: Tensor, mask: Tensor, total: int) -> Tensor:
    """Cross-entropy of the response tokens: logprobs, mask (B, T-1) -> scalar, the sum over True cells / total.

    `total` is the number of response tokens in the whole optimiser step, so that micro-batches add up to exactly the
    loss of the full batch. Example: logprobs [-1, -2, -9], mask [T, T, F], total 2 -> 1.5.
    """
    return -torch.where(mask, logprobs, 0.0).sum() / total


def main(cfg: Config) -> None:
    for name in ("epochs", "batch_size", "micro_tokens", "lr", "max_grad_norm", "max_tokens"):
        runtime.require(getattr(cfg, name) > 0, f"--{name} {getattr(cfg, name)}: must be greater than 0")
    for name in ("limit", "warmup", "weight_decay"):
        runtime.require(getattr(cfg, name) >= 0, f"--{name} {getattr(cfg, name)}: must not be negative")
    stage = runtime.Stage(cfg, ["model", "data", "match_flops"], memory=["micro_tokens", "gradient_checkpointing"])
    if stage.finished:
        return
    rng = runtime.seed_all(cfg.seed)
    device = runtime.default_device()
    tokenizer = Tokenizer(cfg.model)
    prompts, responses = [], []
    for row in islice(read_jsonl(cfg.data, required=["prompt", "response"]), cfg.limit or None):
        prompts.append(tokenizer.chat(row["prompt"]))
        responses.append(tokenizer.response(row["response"]))
    fits = [i for i in range(len(prompts)) if len(prompts[i]) + len(responses[i]) <= cfg.max_tokens]
    runtime.require(
        bool(fits), f"{cfg.data}: none of its {len(prompts)} examples fits into --max_tokens {cfg.max_tokens}"
    )
    dropped = len(prompts) - len(fits)
    prompts, responses = [prompts[i] for i in fits], [responses[i] for i in fits]
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses)]

    config, longest = ModelConfig.from_folder(cfg.model), max(lengths)
    tokens = memory.pass_size(longest, min(cfg.batch_size, len(lengths)), cfg.micro_tokens)
    memory.say(memory.training(config, tokens, cfg.gradient_checkpointing, device.type == "cuda"))
    model = ranks.shard(load_model(cfg.model, torch.float32, device))
    context = config.max_position_embeddings
    runtime.require(
        longest <= context,
        f"{cfg.data}: an example of {longest} tokens exceeds the model's context of {context}: lower --max_tokens",
    )
    model.model.gradient_checkpointing = cfg.gradient_checkpointing
    for block in model.model.layers[:-1] if cfg.compile else ():  # the last one's shapes follow from the data
        block.compile(dynamic=True)
    parameters = sum(p.numel() for p in model.parameters())
    runtime.set_threads(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True
    )
    epochs = cfg.epochs
    if cfg.match_flops:
        budget = json.loads((Path(cfg.match_flops) / "done.json").read_text(encoding="utf-8"))["flops"]
        epochs = max(1, round(budget / (6 * parameters * sum(lengths))))
    steps = epochs * -(-len(prompts) // cfg.batch_size)
    print(
        f"{parameters / 1e6:.2f}M parameters, {len(prompts)} examples ({dropped} too long), {steps} steps", flush=True
    )

    order = [batch for _ in range(epochs) for batch in batches(len(lengths), cfg.batch_size, rng)]
    at = {"seen": 0, "loss": 0.0}
    state = Checkpoint(stage, {"model": model, "optimizer": optimizer}, at)
    bar = runtime.Progress("sft", steps, state.step)
    for step in state.steps(steps):
        batch = order[step]
        runtime.set_lr(optimizer, cfg.lr * runtime.lr_at(step, steps, cfg.warmup))
        total = sum(len(responses[i]) for i in batch)  # response tokens of the whole step
        loss = torch.zeros((), device=device)
        for micro, counts in dealt(batch, lengths, cfg.micro_tokens):
            tokens, mask, _ = collate([prompts[j] for j in micro], [responses[j] for j in micro])  # (B, T), (B, T-1)
            tokens, mask = tokens.to(device), mask.to(device) & counts
            with runtime.mixed_precision():
                logprobs, _ = masked_logprobs(model, tokens, mask)  # (B, T-1)
            micro_loss = sft_loss(logprobs, mask, total)
            (ranks.SIZE * micro_loss).backward()  # over ranks FSDP takes the mean, a step is their sum
            loss += micro_loss.detach()
        grad_norm = ranks.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        at["seen"] += sum(lengths[i] for i in batch)
        # read once: a GPU waits for every number read
        loss, grad_norm = torch.stack([ranks.total(loss), grad_norm]).tolist()
        runtime.require(math.isfinite(loss), f"step {step}: the loss is {loss}: is --lr too high, {cfg.model} broken?")
        at["loss"] = loss
        stage.log(step, loss=loss, lr=optimizer.param_groups[0]["lr"], grad_norm=grad_norm)
        bar.update(1, f"loss {loss:.3f}")
    bar.close()
    model = ranks.gathered(model)
    if ranks.RANK:
        return
    save_model(model, cfg.out)
    tokenizer.save(cfg.out)
    print(f"final loss {at['loss']:.3f} after {steps} steps")
    flops = 6 * parameters * at["seen"]
    stage.finish(tokens=at["seen"], flops=flops, loss=at["loss"], examples=len(prompts), too_long=dropped)


if __name__ == "__main__":
    runtime.launch(main, Config, every_rank=True)
