"""Low-rank adapters: a frozen network learns by a small correction beside each linear map (LoRA, arXiv 2106.09685).

    y = W x    becomes    y = W x + ALPHA / rank * B A x          W (out, in), A (rank, in), B (out, rank)

W stays as it was loaded, in the type of its file; A and B alone, in fp32, have gradients and Adam's moments. B starts
as zero: at first nothing has changed, and with the adapters off nothing ever has. So a network is also the one that it
started as, which PPO needs twice: without adapters the policy is the reference, and the critic the reward model.

Embeddings, norms and the language model's head stay as they are; a scalar head, a single row, learns as a whole.
Files know no adapters: `state_dict` has the merged weights, W + ALPHA / rank * B A.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import runtime

ALPHA = 32  # divided by the rank, so that one learning rate does for all ranks


class Adapted(nn.Module):
    """A linear map and its adapter: x (..., in) -> (..., out)."""

    def __init__(self, linear: nn.Linear, rank: int, rng: torch.Generator):
        super().__init__()
        self.weight, self.bias, self.on = linear.weight, linear.bias, True
        out, size = linear.weight.shape
        A = torch.randn(rank, size, generator=rng) / size**0.5  # (rank, in): A x is as large as x
        self.A = nn.Parameter(A.to(linear.weight.device))
        self.B = nn.Parameter(torch.zeros(out, rank, device=linear.weight.device))
        self.scale = ALPHA / rank

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)  # (..., out)
        if not self.on:
            return y
        low = self.scale * F.linear(x, self.A.to(x.dtype))  # (..., rank)
        return y + F.linear(low, self.B.to(x.dtype))

    def _save_to_state_dict(self, tensors: dict, prefix: str, keep_vars: bool) -> None:
        """What `state_dict` asks a module for; on the CPU, for on a GPU there may be no room for a second network."""
        weight = self.weight.detach().cpu() + self.scale * (self.B @ self.A).detach().cpu()  # (out, in), fp32
        tensors[f"{prefix}weight"] = weight.to(self.weight.dtype)
        if self.bias is not None:
            tensors[f"{prefix}bias"] = self.bias.detach()


class AdaptedHead(nn.Module):
    """A scalar head and what it has learned: `weight` (1, D) is their sum, or with the adapters off the head alone."""

    def __init__(self, head: nn.Linear):
        super().__init__()
        self.start = nn.Parameter(head.weight.float(), requires_grad=False)  # (1, D)
        self.change = nn.Parameter(torch.zeros_like(self.start))
        self.dtype, self.on = head.weight.dtype, True  # of the file

    @property
    def weight(self) -> Tensor:
        return self.start + self.change if self.on else self.start

    def _save_to_state_dict(self, tensors: dict, prefix: str, keep_vars: bool) -> None:
        tensors[f"{prefix}weight"] = (self.start + self.change).detach().to(self.dtype)


def adapt(network: nn.Module, rank: int, *purpose: int | str) -> nn.Module:
    """Freeze a Llama or a ScalarModel and give it adapters, drawn for a purpose. Rank 0: as it was, and all learns."""
    if rank == 0:
        return network
    network.requires_grad_(False)
    for layer, block in enumerate(network.model.layers):
        for part in (block.self_attn, block.mlp):
            for name, linear in list(part.named_children()):
                setattr(part, name, Adapted(linear, rank, runtime.steps.generator(*purpose, layer, name)))
    if hasattr(network, "score"):
        network.score = AdaptedHead(network.score)
    return network


@contextlib.contextmanager
def adapters_off(network: nn.Module) -> Iterator[None]:
    """The network as it started, for a while."""
    adapted = [module for module in network.modules() if isinstance(module, (Adapted, AdaptedHead))]
    for module in adapted:
        module.on = False
    try:
        yield
    finally:
        for module in adapted:
            module.on = True


def as_it_started(network: nn.Module) -> Callable | None:
    """The network with its adapters off, as a function of the same arguments; nothing is copied. None without any."""

    def original(*args, **named):
        with adapters_off(network):
            return network(*args, **named)

    return original if any(isinstance(module, Adapted) for module in network.modules()) else None
