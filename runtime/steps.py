"""What every loop needs around its loss: device, threads, precision, seeds, the learning rate's schedule."""

from __future__ import annotations

import os
import random
import typing

import numpy as np

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
