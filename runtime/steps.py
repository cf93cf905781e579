"""How rows of text become one optimiser step or one reading: micro-batches, ranks, precision, random numbers.

    metrics = steps.step(policy, adam, rows, lengths, cfg, loss_of)    # loss_of(rows) -> (loss, {name: sum over rows})
    values = steps.read(lengths, cfg.micro_tokens, reader, like)       # reader(rows) -> (k, rows, T) numbers

A script says what the loss of some rows is. How many rows fit into memory at once, and which of them another rank
takes, is decided here. The losses of micro-batches add up to the loss of the step, so a script divides by what the
whole step has.
"""

from __future__ import annotations

import hashlib
import math
import os
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence

from runtime import ranks
from runtime.flags import require

if typing.TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def micro_batches(rows: Iterable[int], lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Rows of like length, at most `tokens` tokens with their padding, the longest first; a longer row comes alone.

    What does not fit into memory fails on the first one. Example: lengths 3, 1, 2, 4 tokens 6 -> [3], [0, 2], [1].
    """
    rows = sorted(rows, key=lengths.__getitem__, reverse=True)
    while rows:
        fit = max(1, tokens // lengths[rows[0]])
        yield rows[:fit]
        rows = rows[fit:]


def shares(rows: Iterable[int], lengths: Sequence[int], tokens: int) -> Iterator[tuple[list[int], bool]]:
    """This rank's micro-batches of `rows`, and whether each counts.

    Rows are dealt like cards, the longest first, so that all ranks have about as much to do. FSDP needs as many passes
    on each rank: one that has fewer reads another one's shortest row again, which must not count.
    """
    rows = sorted(rows, key=lengths.__getitem__, reverse=True)
    hands = [list(micro_batches(rows[rank :: ranks.SIZE], lengths, tokens)) for rank in range(ranks.SIZE)]
    mine, most = hands[ranks.RANK], max(hands, key=len)
    yield from ((micro, True) for micro in mine)
    yield from ((most[-1][-1:], False) for _ in most[len(mine) :])


def step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[int],
    lengths: Sequence[int],
    cfg,
    loss_of: Callable[[list[int]], tuple[Tensor, dict[str, Tensor]]],
) -> dict[str, float]:
    """One optimiser step on all of `rows`: what loss_of reported, summed, and the norm of the gradient.

    Of a name that begins with 'max' the largest is taken. cfg has micro_tokens and max_grad_norm. FloatingPointError
    instead of a step on NaN or infinity.
    """
    import torch

    sums = highs = None
    for micro, counts in shares(rows, lengths, cfg.micro_tokens):
        with mixed_precision():
            loss, report = loss_of(micro)
        (ranks.SIZE * counts * loss).backward()  # over ranks FSDP takes the mean, a step is their sum
        values = counts * torch.stack([value.detach().double() for value in report.values()])
        sums = values if sums is None else sums + values
        highs = values if highs is None else torch.maximum(highs, values)
    norm = ranks.full_tensor(torch.nn.utils.clip_grad_norm_(network.parameters(), cfg.max_grad_norm)).double()
    sums, highs = ranks.all_reduce(sums), ranks.all_reduce(highs, largest=True)
    largest = torch.tensor([name.startswith("max") for name in report], device=sums.device)
    numbers = torch.cat([torch.where(largest, highs, sums), norm[None]]).tolist()  # read once: a GPU waits for it
    metrics = dict(zip([*report, "grad_norm"], numbers, strict=True))
    require_finite(metrics)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics


def read(
    lengths: Sequence[int], micro_tokens: int, reader: Callable, like: Tensor, batches: Sequence[list[int]] = ()
) -> Tensor:
    """reader(rows) -> (k, b, t), without gradients, for all rows: k times the shape of `like`, 0 beyond t.

    Each row is read by one rank and stays 0 on the others, so the sum over ranks is what was read. `batches` are the
    rows of each optimiser step, where those are read in the very micro-batches that `step` will have.
    """
    import torch

    found = None
    dealt = [share for rows in batches or [range(len(lengths))] for share in shares(rows, lengths, micro_tokens)]
    for micro, counts in dealt:
        with torch.no_grad(), mixed_precision():
            values = reader(micro) * counts  # (k, b, t)
        found = torch.zeros(len(values), *like.shape, device=values.device) if found is None else found
        found[:, micro, : values.shape[2]] += values
    return ranks.all_reduce(found)


def require_finite(metrics: dict[str, float]) -> None:
    """FloatingPointError that names the values that are NaN or infinite."""
    if bad := [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]:
        raise FloatingPointError(", ".join(bad))


# ---- device, precision, schedule -----------------------------------------------------------------------------------

SMALL = 5e6  # parameters: below, a second thread costs more than it brings


def default_device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_threads(model: nn.Module) -> None:
    """One thread for a small model, all of them for a larger one; where OMP_NUM_THREADS is set, it decides instead.

    A small layer is done in less time than threads need to meet: with 0.16M parameters two of them were five times
    slower than one on a busy machine.
    """
    import torch

    if sum(p.numel() for p in model.parameters()) < SMALL and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1)


def bf16(cuda: bool | None = None) -> bool:
    """Whether a run computes in bf16: what PRECISION in the environment says, fp32 or bf16; else on a GPU alone.

    bf16: training and scoring multiply matrices in it, a model that only answers stays in its file's type. fp32: all.
    """
    cuda = default_device().type == "cuda" if cuda is None else cuda
    precision = os.environ.get("PRECISION") or ("bf16" if cuda else "fp32")
    require(precision in ("fp32", "bf16"), f"PRECISION={precision}: it is fp32 or bf16")
    return precision == "bf16"


def mixed_precision() -> torch.autocast:
    """In bf16 matrix products alone are: weights, norms, log-probs and values stay fp32."""
    import torch

    # no cache of weights in bf16: each is asked for once in a pass, and with checkpointing they would all be kept
    return torch.autocast(default_device().type, torch.bfloat16, enabled=bf16(), cache_enabled=False)


def inference_dtype() -> torch.dtype | None:
    """What a model that only answers is loaded in: its file's type (None) in bf16, else fp32.

    Measured on one core with SmolLM2-135M: bf16 took 1.7 times as long as fp32 to sample 16 answers at once, and 0.6
    of the time for 64 to 128.
    """
    import torch

    return None if bf16() else torch.float32


def trained_dtype(lora: int) -> torch.dtype | None:
    """What a network that learns is loaded in: fp32. With adapters it is frozen and only answers; they are fp32."""
    import torch

    return inference_dtype() if lora else torch.float32


def lr_at(step: int, total: int, warmup: int) -> float:
    """Share of the peak learning rate at a step: linear up over `warmup` steps, but at most half of them, then linear
    to 0 at `total`."""
    warmup = min(warmup, total // 2)
    return min((step + 1) / max(warmup, 1), (total - step) / max(total - warmup, 1))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


# ---- random numbers ------------------------------------------------------------------------------------------------


def seed_of(*purpose: int | str) -> int:
    """A seed that follows from what is drawn: seed_of(cfg.seed, "sft", epoch). 63 bits of a SHA-256.

    Nothing is drawn from a state that goes on from draw to draw: so a run that was killed draws the same again, batch
    sizes and ranks change nothing, and no two purposes share a stream.
    """
    return int.from_bytes(hashlib.sha256(repr(purpose).encode()).digest()[:8], "big") >> 1


def generator(*purpose: int | str) -> torch.Generator:
    """A generator for what is drawn for one purpose."""
    import torch

    return torch.Generator().manual_seed(seed_of(*purpose))


def rows_of_step(step: int, n: int, size: int, *purpose: int | str) -> list[int]:
    """Which of n rows a training step takes: random batches, every row once in a pass, the last of a pass smaller.

    A batch is a fair sample of all lengths: batches of one length would each be of one kind of answer, and pull the
    model to and fro. Its micro-batches are of even length instead.
    """
    epoch, place = divmod(step, -(-n // size))
    return permutation(n, *purpose, epoch)[place * size : (place + 1) * size]


def permutation(n: int, *purpose: int | str) -> list[int]:
    import torch

    return torch.randperm(n, generator=generator(*purpose)).tolist()
