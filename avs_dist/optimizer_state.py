"""What an optimiser under DeepSpeed remembers, stored so that any number of ranks and any ZeRO stage can go on with it.

Each rank stores the pieces that it holds, and each piece says of which parameter it is and where it begins in it. A
rank that loads takes what it needs out of the pieces of all, so ranks and stage may be others than at the save. (The
checkpoints of DeepSpeed are pickles, are bound to ranks and stage, and the conversion of these is not for stage 0.)

No import of DeepSpeed, but knowledge of how each of its optimisers lays its tensors out; see `partitions`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

MASTER, STEP = "master", "step"  # kinds of stored tensors; the others are those of the optimiser (exp_avg ...)


class Piece(NamedTuple):
    """Elements [start, start + numel) of a flattened parameter, at [offset, offset + numel) of the flat tensor."""

    name: str
    start: int
    offset: int
    numel: int


class Partition(NamedTuple):
    """A float32 tensor that this rank's optimiser updates, and what of which parameters it holds."""

    master: Tensor
    pieces: list[Piece]


def partitions(module: nn.Module, optimizer: Any, rank: int) -> list[Partition]:
    """All that the optimiser of this rank updates, whatever the ZeRO stage and precision.

    Args:
        optimizer: `DeepSpeedEngine.optimizer`.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # ZeRO 3: an equal, padded part of each parameter
        return _of_parameters(optimizer, names, rank)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):  # ZeRO 1 and 2: a range of all of them, laid end to end
        return _of_groups(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, names)
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # the same, with bf16 weights and float32 gradients
        return _of_groups(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, names)
    if hasattr(optimizer, "fp32_groups"):  # no ZeRO, bf16: a float32 copy of each
        pairs = zip(sum(optimizer.fp16_groups, []), sum(optimizer.fp32_groups, []), strict=True)
        return [_whole(names[id(parameter)], master) for parameter, master in pairs]
    # no ZeRO, float32: the parameters themselves
    return [_whole(names[id(p)], p) for group in optimizer.param_groups for p in group["params"]]


def _whole(name: str, master: Tensor) -> Partition:
    return Partition(master, [Piece(name, 0, 0, master.numel())])


def _of_groups(groups: list[list[Any]], masters: list[Tensor], names: dict[int, str]) -> list[Partition]:
    found = []
    for parameters, master in zip(groups, masters, strict=True):
        there = [(parameter, parameter._hp_mapping) for parameter in parameters if parameter._hp_mapping is not None]
        pieces = [
            Piece(names[id(p)], m.lp_fragment_address.start, m.hp_fragment_address.start, m.hp_fragment_address.numel)
            for p, m in there
        ]
        found.append(Partition(master, pieces))
    return found


def _of_parameters(optimizer: Any, names: dict[int, str], rank: int) -> list[Partition]:
    found = [Partition(master, []) for master in optimizer.fp32_partitioned_groups_flat]
    for parameter in (p for group in optimizer.fp16_groups for p in group):
        group, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = rank * padded
        numel = min(padded, parameter.ds_numel - start)
        if numel > 0:
            found[group].pieces.append(Piece(names[id(parameter)], start, offset, numel))
    return found


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def snapshot(held: list[Partition], optimizer: Any, masters: bool) -> dict[str, Tensor]:
    """Copies, on the CPU, of all that this rank's optimiser remembers, by kind, parameter and first element.

    Args:
        masters: also the float32 weights, where the network's own are rounded.
    """
    out: dict[str, Tensor] = {}
    for master, pieces in held:
        state = _torch_optimizer(optimizer).state.get(master, {})
        kinds = {kind: value for kind, value in state.items() if kind != STEP and value.numel() == master.numel()}
        if masters:
            kinds[MASTER] = master.detach()
        for name, start, offset, numel in pieces:
            for kind, flat in kinds.items():
                part = flat.detach().view(-1)[offset : offset + numel]
                out[f"{kind}:{name}:{start}"] = part.to("cpu", torch.float32, copy=True)
            if state:
                out[f"{STEP}:{name}:{start}"] = torch.as_tensor(float(state[STEP]), dtype=torch.float64)
    return out


def restore(held: list[Partition], optimizer: Any, stored: StoredState, masters: bool) -> None:
    """Put the state of the save in the place of what this rank's optimiser remembers.

    Raises:
        ValueError: something of a parameter is not there.
    """
    torch_optimizer = _torch_optimizer(optimizer)
    for master, pieces in held:
        if masters:
            for piece in pieces:
                stored.fill(master, MASTER, piece)
        step = max((stored.step(piece.name) for piece in pieces), default=0.0)
        if step == 0:  # never updated; what an optimiser makes of that is its own affair
            continue
        state: dict[str, Tensor] = {STEP: torch.tensor(step, dtype=torch.float32)}
        for kind in stored.kinds:
            state[kind] = torch.zeros_like(master, memory_format=torch.contiguous_format)
            for piece in pieces:
                # a parameter that was never updated has nothing to remember, though its neighbours have
                if stored.step(piece.name) > 0:
                    stored.fill(state[kind], kind, piece)
        torch_optimizer.state[master] = state


class _Stored(NamedTuple):
    start: int
    numel: int
    file: Any
    key: str


class StoredState:
    """The pieces of all ranks of a checkpoint.

    Args:
        files: those that the ranks have written.

    Raises:
        ValueError: they are other files.
    """

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._pieces: dict[tuple[str, str], list[_Stored]] = {}
        self._steps: dict[str, float] = {}
        for path in files:
            try:
                file = safe_open(path, framework="pt")  # maps the file: only what is asked for is read
            except SafetensorError as error:
                raise ValueError(f"{path} is not a safetensors file: {error}") from error
            for key in file.keys():  # noqa: SIM118 (not a dict)
                kind, rest = key.split(":", 1)
                name, start = rest.rsplit(":", 1)
                if kind == STEP:
                    self._steps[name] = max(self._steps.get(name, 0.0), float(file.get_tensor(key)))
                    continue
                numel = file.get_slice(key).get_shape()[0]
                self._pieces.setdefault((kind, name), []).append(_Stored(int(start), numel, file, key))

    @property
    def kinds(self) -> list[str]:
        """What the optimiser remembers of each weight."""
        return sorted({kind for kind, _ in self._pieces} - {MASTER})

    def step(self, name: str) -> float:
        """Updates that a parameter has had."""
        return self._steps.get(name, 0.0)

    def fill(self, flat: Tensor, kind: str, piece: Piece) -> None:
        """Copy elements of a parameter into a flat tensor, at the piece's place there.

        Raises:
            ValueError: not all of them are stored.
        """
        target, filled = flat.detach().view(-1)[piece.offset : piece.offset + piece.numel], 0
        for first, last, values in self._overlapping(kind, piece):
            target[first - piece.start : last - piece.start].copy_(values)
            filled += last - first
        if filled != piece.numel:
            raise ValueError(
                f"{self._files[0].parent} holds {filled} of {piece.numel} values ({kind}) of {piece.name}: it is of "
                "another model or optimiser; start from its weights with train.init_from"
            )

    def _overlapping(self, kind: str, piece: Piece) -> Iterator[tuple[int, int, Tensor]]:
        for start, numel, file, key in self._pieces.get((kind, piece.name), ()):
            first, last = max(start, piece.start), min(start + numel, piece.start + piece.numel)
            if first < last:
                yield first, last, file.get_slice(key)[first - start : last - start]
