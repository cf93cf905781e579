"""What every loop needs around its loss: device, threads, precision, seeds, the learning rate's schedule."""

from __future__ import annotations

import os
import random
import typing
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from runtime import ranks

if typing.TYPE_CHECKING:
    import torch

SMALL = 5e6  # parameters: below, a second thread costs more than it brings


def default_device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_threads(model: torch.nn.Module, say: bool = True) -> None:
    """One thread for a small model, all of them for a larger one; where OMP_NUM_THREADS is set, it decides instead.

    A small layer is done in less time than threads need to meet: with 0.16M parameters two of them were five times
    slower than one on a busy machine.
    """
    import torch

    parameters = sum(p.numel() for p in model.parameters())
    if parameters < SMALL and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(1)
    if say:
        threads = torch.get_num_threads()
        print(f"{threads} thread(s) for {parameters / 1e6:.2f}M parameters; OMP_NUM_THREADS=N to choose", flush=True)


def mixed_precision() -> torch.autocast:
    """On a GPU matrix products in bf16; weights, norms, log-probs and values stay fp32. On a CPU all stays fp32."""
    import torch

    device = default_device().type
    # no cache of weights in bf16: each is asked for once in a pass, and with checkpointing they would all be kept
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda", cache_enabled=False)


def inference_dtype() -> torch.dtype | None:
    """What a model that only answers is loaded in: its file's type (None) on a GPU, fp32 on a CPU, where bf16 is slow.

    Measured on one core with SmolLM2-135M, batch 16: fp32 65 to 75 tokens/s, bf16 38 to 40.
    """
    import torch

    return None if default_device().type == "cuda" else torch.float32


def seed_all(seed: int) -> torch.Generator:
    """Seed python, numpy and torch; return a generator for what a script draws itself."""
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def lr_at(step: int, total: int, warmup: int) -> float:
    """Share of the peak learning rate at a step: linear up over `warmup` steps, then linear to 0 at `total`."""
    return min((step + 1) / max(warmup, 1), (total - step) / max(total - warmup, 1))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def micro_batches(rows: Iterable[int], lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """The rows of one optimiser step in micro-batches of at most `tokens` tokens, padding included, longest row first.

    Rows of like length share a micro-batch, so there is little padding. What does not fit into memory fails on the
    first one. A row that is longer than `tokens` comes alone. Example: lengths 3, 1, 2, 4 tokens 6 -> [3], [0, 2], [1].
    """
    rows = sorted(rows, key=lengths.__getitem__, reverse=True)
    while rows:
        fit = max(1, tokens // lengths[rows[0]])
        yield rows[:fit]
        rows = rows[fit:]


def dealt(rows: Iterable[int], lengths: Sequence[int], tokens: int) -> Iterator[tuple[list[int], bool]]:
    """This rank's micro-batches of an optimiser step, and whether each counts: (row indices, True or False).

    The rows are dealt like cards, the longest first, so that all ranks have about as much to do. FSDP needs as many
    passes on each rank: one that has fewer reads another one's shortest row again, which must not count.
    """
    rows = sorted(rows, key=lengths.__getitem__, reverse=True)
    hands = [list(micro_batches(rows[rank :: ranks.SIZE], lengths, tokens)) for rank in range(ranks.SIZE)]
    mine, most = hands[ranks.RANK], max(hands, key=len)
    yield from ((micro, True) for micro in mine)
    yield from ((most[-1][-1:], False) for _ in most[len(mine) :])
