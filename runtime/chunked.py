"""Log-probabilities of chosen tokens without ever holding the logits of all positions."""

import torch
from torch import Tensor

LOGITS_AT_ONCE = 2**24  # 64 MB in fp32: more are worked out chunk by chunk


class ChunkedLogprobs(torch.autograd.Function):
    """Log-probabilities of targets (N,) under softmax(hidden @ weight.T / temperature), and the entropies: (N,) each.

    hidden (N, D), weight (V, D). Autograd would keep the logits of every chunk until the backward pass. This keeps none
    and works them out again there, unless one chunk holds them all. The gradient of a log-probability in the logits is
    one_hot(target) - softmax. The entropies have no gradient. Matrix products are in the type of `hidden`, all else is
    in fp32 or wider.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        ctx.temperature, ctx.rows = temperature, max(1, LOGITS_AT_ONCE // len(weight))
        logprobs, entropies, kept = [], [], None
        for h, target in zip(hidden.split(ctx.rows), targets.split(ctx.rows)):  # (n, D), (n,)
            log_p = ChunkedLogprobs.log_softmax(h, weight, temperature)  # (n, V)
            logprobs.append(log_p.gather(-1, target[:, None])[:, 0])  # (n,)
            p = log_p.exp()  # (n, V)
            entropies.append(-log_p.mul_(p).sum(-1))  # (n,)
            kept = p if len(hidden) <= ctx.rows else None
            del log_p, p  # before the next chunk's are made
        ctx.save_for_backward(hidden, weight, targets, kept)
        logprobs, entropies = torch.cat(logprobs), torch.cat(entropies)  # (N,) each
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx, d_logprobs: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden, weight, targets, kept = ctx.saved_tensors
        d_hidden, d_weight = [], None
        for h, target, d in zip(*(x.split(ctx.rows) for x in (hidden, targets, d_logprobs / ctx.temperature))):
            p = ChunkedLogprobs.log_softmax(h, weight, ctx.temperature).exp_() if kept is None else kept  # (n, V)
            d_logits = p * -d[:, None]  # (n, V)
            d_logits = d_logits.scatter_add_(1, target[:, None], d[:, None]).to(h.dtype)
            d_hidden.append(d_logits @ weight.to(h.dtype))  # (n, D)
            if ctx.needs_input_grad[1]:  # a frozen head learns nothing
                part = d_logits.T @ h  # (V, D)
                d_weight = part.to(weight.dtype) if d_weight is None else d_weight.add_(part)
                del part
            del p, d_logits
        return torch.cat(d_hidden), d_weight, None, None

    @staticmethod
    def log_softmax(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
        logits = hidden @ weight.to(hidden.dtype).T  # (n, V)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.div_(temperature).log_softmax(-1)
