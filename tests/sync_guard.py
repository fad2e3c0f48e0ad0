"""Within `no_host_sync` code may not make the host wait for the device; what would is refused, without a GPU too.

    with no_host_sync():
        loss = module(x); loss.backward()

It sees the operators and the methods that read a value, or make a tensor whose size depends on values, in forward and
backward, and inside the project's own ops. It cannot see a copy from device to host by `.to(...)`: for that there is
`torch.cuda.set_sync_debug_mode("error")` on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# operators whose result is a number on the host, or has a size that depends on values
WAITING = {
    *("_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "repeat_interleave"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "_linalg_check_errors"),
}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_unsafe_index_put", "_index_put_impl_"}
METHODS = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__, Tensor.new_tensor}


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in WAITING and not (name == "repeat_interleave" and kwargs.get("output_size") is not None):
            raise AssertionError(f"{func} makes the host wait for the device")
        if name in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            raise AssertionError(f"{func} with a mask makes the host wait for the device")
        own = OPDEFS.get(f"{func.namespace}::{name}") if func.namespace == "avs_dist" else None
        with self:  # a mode is off while it handles an op; this one looks inside
            if own is not None:
                return own._init_fn(*args, **kwargs)
            if (parts := func.decompose(*args, **kwargs)) is not NotImplemented:
                return parts
        return func(*args, **kwargs)


class _Methods(TorchFunctionMode):
    """What reads the memory of a tensor of the CPU directly and would copy that of a GPU, or copies to the device.

    A copy of numbers in ordinary memory waits until the device has done all that was asked of it before.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in METHODS or (func is torch.tensor and (kwargs or {}).get("device") is not None):
            raise AssertionError(f"{func.__name__} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_host_sync() -> Iterator[None]:
    """Raises AssertionError where the code within would make the host wait for the device."""
    with _Operators(), _Methods():
        yield
