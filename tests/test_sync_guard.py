"""The guard of the other tests sees what makes a host wait, wherever it happens, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sync_guard import no_host_sync
from torch import Tensor


class ReadsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * float(grad.sum())


@torch.library.custom_op("avs_dist::test_waits", mutates_args=())
def reads_inside(x: Tensor) -> Tensor:
    return x * x.sum().item()


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask": lambda x: x[x > 0],
    "mask of bytes": lambda x: x[(x > 0).byte()],
    "put by mask": lambda x: x.__setitem__(x > 0, x[0]),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "unique of rows": lambda x: x[:, None].unique(dim=0),
    "runs": lambda x: x.unique_consecutive(),
    "bincount": lambda x: x.abs().long().bincount(),
    "repeat": lambda x: x.repeat_interleave(x.abs().long()),
    "equal": lambda x: torch.equal(x, x),
    "inverse": lambda x: torch.linalg.inv(torch.outer(x, x) + torch.eye(len(x))),
    "tensor on a device": lambda x: torch.tensor(2.0, device=x.device),
    "new_tensor": lambda x: x.new_tensor([2.0]),
    "inside an op": reads_inside,
    "inside an op, with gradient": lambda x: reads_inside(x.requires_grad_()),
    "in backward": lambda x: ReadsInBackward.apply(x.requires_grad_()).sum().backward(),
}


@pytest.mark.parametrize("name", WAITS)
@pytest.mark.filterwarnings("ignore:.*uint8")
def test_what_waits_is_refused(name: str) -> None:
    x_N = torch.randn(5)
    WAITS[name](x_N.clone())
    with pytest.raises(AssertionError, match="makes the host wait"), no_host_sync():
        WAITS[name](x_N.clone())


def test_what_does_not_wait_passes() -> None:
    x_N = torch.randn(5).requires_grad_()
    with no_host_sync():
        kept_N = torch.where(x_N > 0, x_N, 0.0)[torch.arange(3)]
        repeated_M = kept_N.repeat_interleave(torch.ones(3).long(), output_size=3)
        (repeated_M.sum() / x_N.shape[0]).backward()
    assert x_N.grad is not None
