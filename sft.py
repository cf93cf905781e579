"""Supervised fine-tuning: make the answers that a teacher gave more likely, token by token.

    python sft.py --model weights/tiny-student-base --data runs/try/1_vote/sft.jsonl --out runs/try/2_sft

The data is a JSONL of {"prompt", "response"}. Only the response is trained, its end token included: a model that is
never taught to stop never does. This is the warm-up stage of arXiv 2502.19557; the same script pretrains the bundled
models (weights/make.py).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import lora
import runtime
from data import Tokenizer, collate, read_jsonl
from model import load_model, masked_logprobs
from runtime import ranks, steps
from runtime.flags import AtOnce, Count, Input, Natural, NotNegative, Positive, Saving


@dataclass(frozen=True)
class Config:
    """Fine-tune a model on prompts and responses."""

    model: Input  # Hugging Face folder to start from
    data: Input  # JSONL with prompt and response
    out: str  # Hugging Face folder to write
    epochs: Count = 2  # passes over the data
    batch_size: Count = 64  # sequences per optimiser step
    lr: Positive = 2e-4  # peak, linear warm-up, then linear to 0
    warmup: Natural = 20  # optimiser steps
    weight_decay: NotNegative = 0.0  # the warm-up is short: nothing to regularise
    max_grad_norm: Positive = 1.0  # against the odd steep batch
    max_tokens: Count = 1024  # longer examples are left out, and counted
    lora: Natural = 0  # rank of the adapters that learn instead of all weights (lora.py); they want ten times the lr
    seed: int = 0  # of the order of the examples
    # what changes the memory that is needed and not the result
    micro_tokens: AtOnce = 4096  # tokens per forward pass, padding included
    gradient_checkpointing: Saving = False  # a third more time for much less memory


def sft_loss(logprobs: Tensor, mask: Tensor, total: int) -> Tensor:
    """Cross-entropy of the response tokens: logprobs, mask (B, T-1) -> scalar, the sum over True cells / total.

    `total` is the number of response tokens in the whole optimiser step: its gradient is accumulated over micro-batches
    (parts that fit into memory), and so their losses add up to exactly that of the full batch. A masked cell may hold
    anything, NaN too, and changes neither the loss nor its gradient.
    Example: logprobs [-1, -2, -9], mask [T, T, F], total 2 -> 1.5.
    """
    return -torch.where(mask, logprobs, 0.0).sum() / total


@runtime.stage
def main(cfg: Config, stage: runtime.Stage) -> None:
    tokenizer, device = Tokenizer(cfg.model), runtime.default_device()
    rows = list(read_jsonl(cfg.data, required=["prompt", "response"]))
    examples = [(tokenizer.chat(row["prompt"]), tokenizer.response(row["response"])) for row in rows]
    examples = [(prompt, response) for prompt, response in examples if len(prompt) + len(response) <= cfg.max_tokens]
    n, dropped = len(examples), len(rows) - len(examples)
    runtime.require(n > 0, f"{cfg.data}: none of its {dropped} examples fits into --max_tokens {cfg.max_tokens}")
    lengths = [len(prompt) + len(response) for prompt, response in examples]

    dtype = runtime.trained_dtype(cfg.lora)
    model = ranks.shard(lora.adapt(load_model(cfg.model, dtype, device), cfg.lora, cfg.seed, "sft adapters"))
    context = model.config.max_position_embeddings
    runtime.require(
        max(lengths) <= context,
        f"{cfg.data}: an example of {max(lengths)} tokens exceeds the model's context of {context}: lower --max_tokens",
    )
    model.model.gradient_checkpointing = cfg.gradient_checkpointing
    runtime.set_threads(model)
    adam = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=cfg.weight_decay, fused=True)
    total_steps = cfg.epochs * math.ceil(n / cfg.batch_size)
    print(f"{n} examples ({dropped} too long), {total_steps} steps", flush=True)

    for step in stage.steps(total_steps, "loss {loss:.3f}", model=model, adam=adam):  # resumes
        lr = cfg.lr * runtime.lr_at(step, total_steps, cfg.warmup)
        runtime.set_lr(adam, lr)
        batch = steps.rows_of_step(step, n, cfg.batch_size, cfg.seed, "sft")
        total = sum(len(examples[i][1]) for i in batch)  # response tokens of the whole step

        # some rows of the batch -> their part of the loss; `total` is bound now, before the next step has another
        def loss_of(rows: list[int], total: int = total) -> tuple[Tensor, dict[str, Tensor]]:
            prompts, responses = zip(*(examples[i] for i in rows))
            tokens, mask, _ = collate(prompts, responses, device)  # (b, T), (b, T-1)
            logprobs, _ = masked_logprobs(model, tokens, mask)  # (b, T-1)
            loss = sft_loss(logprobs, mask, total)
            return loss, {"loss": loss}

        metrics = steps.step(model, adam, batch, lengths, cfg, loss_of)  # backward, clip, one step of the optimiser
        stage.log(step, metrics | {"lr": lr, "tokens": sum(lengths[i] for i in batch)})

    log = stage.logged()
    tokens, parameters = sum(row["tokens"] for row in log), sum(p.numel() for p in model.parameters())
    print(f"final loss {log[-1]['loss']:.3f} after {total_steps} steps")
    results = {"loss": log[-1]["loss"], "examples": n, "too_long": dropped}
    stage.save(model, tokenizer, tokens=tokens, flops=(4 if cfg.lora else 6) * parameters * tokens, **results)


if __name__ == "__main__":
    runtime.launch(main, Config, every_rank=True)
