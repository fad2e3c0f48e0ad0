"""Counts what goes over the network in a step, by collective, where torch.distributed hands it to its backend."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ZERO, BACKWARD = "deepspeed", "gradients of our own"

# operator of torch.ops.c10d: its name here, and which of its arguments has all elements
_COLLECTIVES = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "reduce_": ("reduce", 0),
    "broadcast_": ("broadcast", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_coalesced_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "gather_": ("gather", 0),
    "scatter_": ("scatter", 1),
    "alltoall_": ("all_to_all", 1),
    "alltoall_base_": ("all_to_all", 1),
    "send": ("send", 0),
}
# times that an element crosses the network, of many ranks in a ring
PASSES = {"all_reduce": 2}


class Sent(NamedTuple):
    """Collectives of one kind, of one part of the program."""

    collective: str
    owner: str  # ZERO, or the module that asked for it
    calls: int
    elements: int  # of the whole tensors
    bytes: int

    @property
    def passed_elements(self) -> int:
        """Elements that each of many ranks sends."""
        return self.elements * PASSES.get(self.collective, 1)

    def sent_bytes(self, ranks: int) -> float:
        """Bytes that a rank sends, where the ranks form a ring."""
        return self.bytes * PASSES.get(self.collective, 1) * (ranks - 1) / ranks


class TrafficCounter(TorchDispatchMode):
    """Counts the collectives of this process while it is entered.

    Raises:
        ValueError: a collective that it does not know.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: Counter[tuple[str, str]] = Counter()
        self._elements: Counter[tuple[str, str]] = Counter()
        self._bytes: Counter[tuple[str, str]] = Counter()

    def sent(self) -> list[Sent]:
        """The largest first."""
        rows = [Sent(*key, calls, self._elements[key], self._bytes[key]) for key, calls in self._calls.items()]
        return sorted(rows, key=lambda row: -row.bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name in ("barrier", "monitored_barrier_", "recv_", "recv_any_source_"):
            return
        if name not in _COLLECTIVES:
            raise ValueError(f"torch.distributed called c10d.{name}, which traffic.py does not count yet")
        collective, whole = _COLLECTIVES[name]
        key = (collective, _owner())
        tensors = list(_tensors(args[whole]))
        self._calls[key] += 1
        self._elements[key] += sum(tensor.numel() for tensor in tensors)
        self._bytes[key] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _owner() -> str:
    """Who asked: ZERO, or a module of ours; for what avs_dist.world does in a backward pass there is no other."""
    frame: FrameType | None = sys._getframe(1)
    ours = ""
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith("deepspeed."):
            return ours or ZERO
        if module.startswith("avs_dist.") and module != __name__:
            ours = BACKWARD
            if module != "avs_dist.world":
                return module
        frame = frame.f_back
    return ours or "torch"


def _tensors(nested: Any) -> Iterator[Tensor]:
    if isinstance(nested, Tensor):
        yield nested
    else:
        for each in nested:
            yield from _tensors(each)
