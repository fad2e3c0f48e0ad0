"""Rank, world size and the collectives we use; every function also works with no process group."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

# a rank that has no batch in time can still tell the others before they give it up
PATIENCE = 1.25
# ranks may come at very different times: those of slow hosts import for minutes
LATEST_START_S = 300.0


def start(timeout_s: float = 0.0) -> torch.device:
    """Join the process group that the launcher describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    Without a launcher a group of one process is made, so that one code path serves all cases. Call `stop` at the end.
    Returns this rank's device: its own GPU, or the CPU.

    Args:
        timeout_s: engine.timeout_s, see `limit_waiting`.
    """
    device = torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # ranks on one host would otherwise each take all cores
        threads = max(1, len(os.sched_getaffinity(0)) // local_world_size())
        torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", str(threads))))
    if not is_distributed():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "MASTER_ADDR" in os.environ and "RANK" in os.environ:  # one alone may be left over
            _meet(backend, timeout_s)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    limit_waiting(timeout_s)
    return device


def _meet(backend: str, timeout_s: float) -> None:
    """Wait for all ranks of the launcher.

    Raises:
        RuntimeError: some have not come in time.
    """
    limit_s = max(timeout_s * PATIENCE, LATEST_START_S) if timeout_s else None
    limit = timedelta(seconds=limit_s) if limit_s else None
    try:
        if store := _loopback_store(limit or dist.constants.default_pg_timeout):
            rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
        else:
            dist.init_process_group(backend, timeout=limit)
    except (RuntimeError, OSError) as error:  # gloo raises plain ones; the port may be taken
        where = f"MASTER_ADDR={os.environ['MASTER_ADDR']} MASTER_PORT={os.environ.get('MASTER_PORT')}"
        raise RuntimeError(
            f"rank {os.environ['RANK']} of {os.environ.get('WORLD_SIZE')} has not met all others at {where} ({error}): "
            "is a host down or a port closed? Look with `avs-dist doctor --hosts HOSTFILE`"
        ) from error


def _loopback_store(limit: timedelta) -> dist.TCPStore | None:
    """Where the ranks of one host meet that were told to by its loopback address; None for all others.

    torch's own would listen on all addresses of the host, for everybody. What they send later stays there too.
    """
    if os.environ["MASTER_ADDR"] not in ("127.0.0.1", "localhost") or "TORCHELASTIC_USE_AGENT_STORE" in os.environ:
        return None
    port, first = int(os.environ["MASTER_PORT"]), os.environ["RANK"] == "0"
    listener = socket.create_server(("127.0.0.1", port)).detach() if first else None
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would listen where the host's name leads to
    size = int(os.environ["WORLD_SIZE"])
    return dist.TCPStore("127.0.0.1", port, size, first, timeout=limit, master_listen_fd=listener)


def limit_waiting(timeout_s: float) -> None:
    """Give up on another rank after PATIENCE times so long, in every process group there is; 0 changes nothing.

    Groups that are made later wait as long as torch's default says (30 minutes, NCCL 10), whatever the first one does:
    call this when all are there.
    """
    if timeout_s and world_size() > 1:
        for group in distributed_c10d._world.pg_map:
            distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s * PATIENCE), group)


def stop() -> None:
    """Leave the process group; without this a rank may abort at interpreter exit."""
    if is_distributed():
        dist.destroy_process_group()


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world_size() -> int:
    """Ranks on this host: torchrun says LOCAL_WORLD_SIZE, the deepspeed launcher LOCAL_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if is_distributed():
        dist.barrier()


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        out = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # every rank's loss depends on every rank's value, so the gradients are summed as well
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum of `value` over all ranks, with gradient; `value` itself on one process."""
    return _AllReduceSum.apply(value) if world_size() > 1 else value


def global_mean(total: Tensor, count: Tensor) -> Tensor:
    """This rank's share of sum(total) / sum(count) over all ranks.

    The engine averages gradients over ranks; the factor world_size makes that average equal the gradient of the
    global mean, whatever the number of counted elements on each rank. The mean of the shares over ranks is the
    global mean. An empty count gives 0.
    """
    global_count = all_reduce_sum(count.detach().to(total.dtype))
    return total * (world_size() / global_count.clamp_min(1.0))


def counted_mean(value_N: Tensor, counted_N: Tensor) -> Tensor:
    """`global_mean` of the values that are counted (bool)."""
    return global_mean((value_N * counted_N).sum(), counted_N.sum().to(value_N.dtype))


def gather_rows(value_MC: Tensor, equal: bool = False) -> tuple[Tensor, int]:
    """Rows of all ranks in rank order, with gradient, and the index of this rank's first row.

    Args:
        equal: all ranks have the same M, so that none asks the others for theirs (which waits for the device).
    """
    if world_size() == 1:
        return value_MC, 0
    sizes = [len(value_MC)] * world_size() if equal else gather_objects(len(value_MC))
    first = sum(sizes[: rank()])
    before = value_MC.new_zeros(first, *value_MC.shape[1:])
    after = value_MC.new_zeros(sum(sizes[rank() + 1 :]), *value_MC.shape[1:])
    return all_reduce_sum(torch.cat([before, value_MC, after])), first


def gather_candidates(value_MC: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of all ranks in rank order, with gradient, and the index of each row of this rank among them [M]; all ranks
    have the same M."""
    all_NC, first = gather_rows(value_MC, equal=True)
    return all_NC, torch.arange(first, first + len(value_MC), device=value_MC.device)


def gather_flags(flag_M: Tensor) -> Tensor:
    """Flags (bool) of all ranks in rank order; all ranks have the same M."""
    return gather_rows(flag_M.float(), equal=True)[0] > 0.5


def any_rank(flag: bool) -> bool:
    """Whether any rank says so; every rank gets the same answer."""
    if world_size() == 1:
        return flag
    device = torch.device("cuda", local_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")
    said = torch.tensor(int(flag), device=device)
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said.item())


def gather_objects(value: Any) -> list[Any]:
    """Plain Python `value` of every rank, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def on_main(do: Callable[[], None]) -> str | None:
    """Let rank 0 do something; every rank hears why it could not, and nobody goes on before it has."""
    failure: str | None = None
    if is_main():
        try:
            do()
        except Exception as error:  # whatever it is, the other ranks must hear of it
            failure = f"rank 0: {type(error).__name__}: {error}"
    return broadcast_object(failure)


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value` on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
