"""Activation checkpointing: what lies inside a block of a backbone is computed again in the backward pass, not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_again: ContextVar[bool] = ContextVar("recomputing", default=False)


def recomputing() -> bool:
    """Whether this is the second run of a forward pass, whose batch the running statistics have seen already."""
    return _again.get()


def recompute_blocks(model: nn.Module) -> list[nn.Module]:
    """Let every block of `model` keep its input alone; returns the blocks.

    Blocks are the children of the outermost nn.Sequential and nn.ModuleList all of whose children have children: the
    residual units of timm's backbones. Outputs and gradients stay the same: random draws are repeated, and every rank
    repeats the collectives of its blocks in the same order.
    """
    blocks = list(_blocks(model))
    for block in blocks:
        # of this one object, so that its name and its parameters' names stay
        block.forward = partial(_forward, block.forward)
    return blocks


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        units = list(child.children())
        listed = isinstance(child, (nn.Sequential, nn.ModuleList)) and bool(units)
        if listed and all(any(True for _ in unit.children()) for unit in units):
            yield from units
        else:
            yield from _blocks(child)


def _forward(forward: Callable[..., Any], *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=_contexts)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _second_run()


@contextmanager
def _second_run() -> Iterator[None]:
    token = _again.set(True)
    try:
        yield
    finally:
        _again.reset(token)
