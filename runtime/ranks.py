"""Several processes at one stage, one per GPU: torchrun starts them, FSDP2 cuts the models into shards between them.

    python runtime/ranks.py 8 sft.py --model ... --data ... --out ...

is `torchrun --standalone --nproc_per_node 8 sft.py ...` with the exit code of the rank that failed and without
torchrun's own report. All ranks run the whole script with the same seed, so each knows what every other one works on.
One process alone, the usual case, is rank 0 of 1: then nothing here does anything or imports torch.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import io
import logging
import os
import signal
import sys
import traceback
import typing
from collections.abc import Iterator

if typing.TYPE_CHECKING:
    import torch

RANK, SIZE = 0, 1  # who this is and how many there are, once they have met; rank 0 alone prints and writes


def started_as() -> tuple[int, int]:
    """Which rank of how many torchrun made this process, before it has met the others; 0 of 1 without torchrun."""
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if "LOCAL_RANK" in os.environ else (0, 1)


@contextlib.contextmanager
def only_rank0_prints() -> Iterator[None]:
    """The other ranks are silent. An error is told all the same, once, by the first rank that meets one."""
    with contextlib.ExitStack() as stack:
        if started_as()[0]:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            yield
        except Exception:
            if started_as()[1] == 1:
                raise
            last_words(traceback.format_exc().rstrip())
            sys.exit(1)


def last_words(text: str) -> None:
    """Print why this process ends to stderr, unless another rank has done so: what ends one soon ends all."""
    if _first_error():
        print(text, file=sys.__stderr__ if started_as()[0] else sys.stderr, flush=True)


def _first_error() -> bool:
    """Whether no other rank has met an error yet. Later ones are mostly those that wait for a dead one in vain."""
    if started_as()[1] == 1:
        return True
    from torch.distributed import TCPStore

    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])  # torchrun's own store, which outlives a rank
    try:
        store = TCPStore(*place, is_master=False, timeout=datetime.timedelta(seconds=10))
        return store.add("ranks that met an error", 1) == 1
    except RuntimeError:
        return True


def join() -> None:
    """Meet the other ranks, if torchrun has started any: each takes the GPU of its number. Call on every rank."""
    global RANK, SIZE
    if started_as()[1] == 1:
        return
    import torch

    cuda, gpu = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if cuda:
        if gpu >= cuda:
            raise ValueError(f"rank {gpu} has no GPU: start at most {cuda}, one for each GPU")
        torch.cuda.set_device(gpu)
    # they wait for each other as long as it takes to answer a batch; one that has died is torchrun's affair
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(days=1))
    RANK, SIZE = torch.distributed.get_rank(), torch.distributed.get_world_size()


def leave(code: int = 0) -> None:
    """End this process, if it is one of several: at once, for gloo's threads now and then abort one that ends."""
    if SIZE > 1:
        sys.__stdout__.flush()
        sys.__stderr__.flush()
        os._exit(code)


# ---- collectives: call them on every rank, in the same order ----------------------------------------------------


def all_reduce(x: torch.Tensor, largest: bool = False) -> torch.Tensor:
    """The sum of all ranks' x, or cell by cell the largest; a new tensor."""
    if SIZE == 1:
        return x
    import torch.distributed as dist

    x = x.clone()
    dist.all_reduce(x, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return x


def gather(value: typing.Any) -> list:
    """All ranks' values, in the order of the ranks, on every rank."""
    if SIZE == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * SIZE
    dist.all_gather_object(values, value)
    return values


def broadcast(value: typing.Any = None) -> typing.Any:
    """Rank 0's value. Nobody goes on before rank 0 is here."""
    return gather(value)[0]


# ---- models --------------------------------------------------------------------------------------------------------


def shard(model: torch.nn.Module) -> torch.nn.Module:
    """Leave each rank its part of every parameter; a block's are gathered when it computes, and dropped again.

    FSDP2 (arXiv 2304.11277, PyTorch's fully_shard) does it, in place: parameters become DTensors, and so do gradients
    and what an optimiser that is made afterwards holds. It gathers when a module is called, so use no parameter outside
    of model(...). FSDP2 divides the sum of the ranks' gradients by their number: multiply the loss by SIZE.
    """
    if SIZE > 1:
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # its modules without their numbers, to make a full copy from: fully_shard changes their classes
        blank = {id(p): torch.nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
        model.make_blank = functools.partial(copy.deepcopy, copy.deepcopy(model, blank))
        mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (SIZE,))
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return model


def full_tensor(x: torch.Tensor) -> torch.Tensor:
    """A sharded tensor as a plain one; a plain one as it is. Call on every rank."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shard_like(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A plain tensor, sharded as `like` is; as it is where that is a plain one too. Call on every rank."""
    if not hasattr(like, "full_tensor"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)


def full_model(model: torch.nn.Module) -> torch.nn.Module:
    """A plain copy of a sharded model, to sample with or to save; a plain model as it is. Call on every rank."""
    if not hasattr(model, "make_blank"):
        return model
    full, tensors = model.make_blank(), {name: full_tensor(p).detach() for name, p in model.named_parameters()}
    full.load_state_dict(tensors, assign=True, strict=False)  # tied weights come once
    if hasattr(full, "tie"):
        full.tie()
    return full


def main(argv: list[str]) -> None:
    """torchrun on this machine: argv is the number of ranks, the script and its flags."""
    if len(argv) < 2 or not argv[0].isdigit():
        print("usage: python runtime/ranks.py NUMBER SCRIPT FLAGS...", file=sys.stderr)
        sys.exit(2)
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.CRITICAL)  # what torchrun has to say is said below, in one line
    try:
        run.main(["--standalone", "--nproc_per_node", argv[0], "--max_restarts", "0", *argv[1:]])
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}  # below 0: a signal
        if 2 in codes.values():
            sys.exit(2)
        killed = {rank: -code for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM}
        for rank, number in killed.items():
            name = signal.Signals(number).name
            why = " (is the memory full? torchrun too kills who waits on, 30 s after a failure)" * (name == "SIGKILL")
            print(f"error: rank {rank} was ended by {name}{why}", file=sys.stderr)
        sys.exit(128 + min(killed.values()) if killed else min(code % 256 for code in codes.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
