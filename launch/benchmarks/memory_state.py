"""What a live engine holds, in bytes, and what ZeRO says that it should hold.

A storage is counted once, for the first kind that refers to it. The garbage collector finds all others that came up
since the engine was built, so that nothing is overlooked.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from avs_dist import optimizer_state, world
from avs_dist.engine import REDUCE_BUCKET

KINDS = ("parameters", "gradients", "masters", "moments", "frozen", "buffers", "buckets", "other")
Sizes = dict[int, int]  # bytes of storages, by address
_BUCKETS = (2 * REDUCE_BUCKET, 4 * REDUCE_BUCKET)


class Held(NamedTuple):
    """Bytes on one rank, of `KINDS`, before the step.

    "frozen" are parameters that do not learn; "buckets" are what gradients are collected in for a reduction.
    """

    by_kind: dict[str, int]
    most_gradients: int  # at any time of the backward pass, as the next
    most_parameters: int

    def state(self, zero_stage: int) -> int:
        """What ZeRO is about: parameters, gradients, masters and moments.

        ZeRO 1 keeps all gradients up to the end of the backward pass, and its own share then.
        """
        gradients = self.most_gradients if zero_stage < 2 else self.by_kind["gradients"]
        return gradients + sum(self.by_kind[kind] for kind in ("parameters", "masters", "moments"))


class Shares(NamedTuple):
    """Bytes of a weight: on every rank, and divided among the ranks."""

    whole: int
    divided: int

    def bytes(self, parameters: int, ranks: int) -> float:
        return parameters * (self.whole + self.divided / ranks)

    def __str__(self) -> str:
        parts = [f"{self.whole}P" if self.whole else "", f"{self.divided}P/W" if self.divided else ""]
        return " + ".join(filter(None, parts))


def zero_formula(stage: int, precision: Literal["fp32", "bf16"]) -> Shares:
    """What ZeRO with Adam holds, by the arithmetic of the ZeRO paper and with our settings.

    In fp32 there is no copy of the weights without ZeRO, and one in DeepSpeed's ZeRO. In bf16 gradients are summed in
    fp32 from ZeRO 1 on (the paper counts 2 bytes: 4P + 12P/W, 2P + 14P/W, 16P/W); ZeRO 1 keeps those in bf16 as well.
    """
    parameter = 4 if precision == "fp32" else 2
    gradient = parameter if precision == "fp32" or stage == 0 else 6 if stage == 1 else 4
    moments_and_master = 8 if precision == "fp32" and stage == 0 else 12
    held = [parameter, gradient, moments_and_master]
    undivided = {0: 3, 1: 2, 2: 1, 3: 0}[stage]
    return Shares(sum(held[:undivided]), sum(held[undivided:]))


def paper_formula(stage: int) -> Shares:
    """The same for mixed precision as the paper has it."""
    return {0: Shares(16, 0), 1: Shares(4, 12), 2: Shares(2, 14), 3: Shares(0, 16)}[stage]


class Watch:
    """Follows the gradients of an engine, and says what it holds.

    Args:
        engine: a DeepSpeedEngine.
        before: `storages` when neither it nor its system was there.
    """

    def __init__(self, engine: Any, before: Sizes) -> None:
        self._module, self._optimizer, self._before = engine.module, engine.optimizer, before
        partitions = optimizer_state.partitions(engine.module, engine.optimizer, world.rank())
        self._masters = [each.master for each in partitions]
        self._state = engine.basic_optimizer.state
        self._learning = [p for p in engine.module.parameters() if p.requires_grad]
        self._most_gradients, self._most_parameters = 0, 0
        self._hooks = [p.register_post_accumulate_grad_hook(self._accumulated) for p in self._learning]

    def stop(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def held(self) -> Held:
        """Now."""
        by_kind: dict[str, int] = {}
        seen: Sizes = {}
        for kind, tensors in self._kinds():
            new = {address: size for address, size in _sizes(tensors).items() if address not in seen}
            seen |= new
            by_kind[kind] = sum(new.values())
        left = {address: size for address, size in storages().items() if address not in seen | self._before}
        by_kind["other"] = sum(left.values())
        return Held(
            by_kind,
            max(self._most_gradients, by_kind["gradients"]),
            max(self._most_parameters, by_kind["parameters"]),
        )

    def _accumulated(self, _: Tensor) -> None:
        gradients = [size for size in _sizes(self._gradients()).values() if size not in _BUCKETS]
        self._most_gradients = max(self._most_gradients, sum(gradients))
        self._most_parameters = max(self._most_parameters, sum(_sizes(_weights(self._learning)).values()))

    def _kinds(self) -> Iterator[tuple[str, Iterable[Any]]]:
        frozen = [p for p in self._module.parameters() if not p.requires_grad]
        yield "buckets", self._buckets()
        for kind, parameters in (("parameters", self._learning), ("frozen", frozen)):
            yield kind, _weights(parameters)
        yield "gradients", self._gradients()
        yield "masters", self._masters
        yield "moments", self._state.values()
        yield "buffers", self._module.buffers()

    def _gradients(self) -> list[Any]:
        """In the places where the optimisers of DeepSpeed keep them."""
        names = ("averaged_gradients", "all_grad_tensors", "fp32_groups_gradients_flat", "grad_partitions_flat_buffer")
        kept = [getattr(self._optimizer, name, None) for name in names]
        own = [each for p in self._learning for each in (p.grad, getattr(p, "grad_accum", None))]
        return [own, kept, [master.grad for master in self._masters if master.is_leaf]]

    def _buckets(self) -> list[Tensor]:
        """A gradient may be a part of a bucket that nothing else refers to any more."""
        buffers = [bucket.buffer for bucket in getattr(self._optimizer, "ipg_buckets", {}).values()]
        gradients = [each for each in _tensors(self._gradients()) if each.untyped_storage().nbytes() in _BUCKETS]
        return [*_tensors(buffers), *gradients]


def _weights(parameters: list[nn.Parameter]) -> list[Any]:
    """The parameters, and of ZeRO 3 the parts of them that stay."""
    return [each for p in parameters for each in (p.data, getattr(p, "ds_tensor", None))]


def storages() -> Sizes:
    """Of every tensor that Python knows."""
    gc.collect()
    # of the exact classes: an isinstance would ask lazy objects of other libraries what they are
    return _sizes(each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter))


def _sizes(nested: Any) -> Sizes:
    storages = [each.untyped_storage() for each in _tensors(nested)]
    return {each.data_ptr(): each.nbytes() for each in storages if each.nbytes()}


def _tensors(nested: Any) -> Iterator[Tensor]:
    """All in containers of containers."""
    if isinstance(nested, Tensor):
        if nested.layout == torch.strided and not nested.is_meta:
            yield nested
    elif isinstance(nested, Mapping):
        yield from _tensors(nested.values())
    elif isinstance(nested, Iterable) and not isinstance(nested, str):
        for each in nested:
            yield from _tensors(each)
