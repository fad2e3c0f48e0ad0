"""Steps whose loss or gradient is not finite: skipped by all ranks together, without a trace, counted and bounded.

Gradients are looked at where they arise, on each rank, before DeepSpeed sums or shards them: that is the same for every
ZeRO stage, and tells which rank they come from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from avs_dist import world
from avs_dist.shards.files import write_text
from avs_dist.systems.base import OBSERVED

REPORT_FILE = "nonfinite.json"
MOST_REPORTED = 100
_TOLD = 8  # clips named in a message
_MAX_SQUARES = torch.finfo(torch.float32).max


class Fault(NamedTuple):
    """What one rank saw in a step.

    terms:    losses that are not finite, as text.
    gradient: a gradient is not finite, or so large that its square is not.
    buffers:  names of buffers that the forward pass left not finite, such as batch statistics.
    clips:    names of the clips of the micro-batches where that arose.
    """

    rank: int
    terms: dict[str, str]
    gradient: bool
    buffers: list[str]
    clips: list[str]

    @property
    def is_empty(self) -> bool:
        return not (self.terms or self.gradient or self.buffers)

    def __str__(self) -> str:
        what = [f"{name} {value}" for name, value in self.terms.items()] + ["gradient"] * self.gradient
        what += self.buffers[:_TOLD]
        more = f" and {len(self.clips) - _TOLD} more" if len(self.clips) > _TOLD else ""
        return f"rank {self.rank}: {', '.join(what)}; clips {', '.join(self.clips[:_TOLD])}{more}"


class NonFiniteError(RuntimeError):
    """A loss or gradient of a step was not finite; raised on all ranks alike, once the step is undone on all."""

    def __init__(self, step: int, faults: Sequence[Fault], before: str = "") -> None:
        kinds = {"loss": "terms", "gradient": "gradient", "buffer": "buffers"}
        what = next((kind for kind, name in kinds.items() if any(getattr(f, name) for f in faults)), "gradient")
        super().__init__(
            f"{before}step {step}: {what} is not finite ({'. '.join(map(str, faults))}); lower optim.lr, set "
            "optim.clip_norm, or leave these clips out of the shards"
        )
        self.step, self.faults = step, list(faults)


class StepGuard:
    """Decides for all ranks alike whether a step is made, and undoes it where it is not.

    Undone are the buffers of the system, which the forward pass changes (batch statistics, codebooks, networks with an
    optimiser of their own); weights, moments and step count are not touched in the first place.

    Args:
        optimizer: the torch optimiser at the bottom, whatever DeepSpeed has put around it.
        accumulation: micro-batches of a step.
    """

    def __init__(self, system: nn.Module, optimizer: torch.optim.Optimizer, accumulation: int) -> None:
        self._system, self._accumulation = system, accumulation
        self._kept: list[Tensor] = []
        # a constant may be infinite on purpose
        self._watched = {name for name, buffer in system.named_buffers() if _is_finite(buffer)}
        self._norms: list[Tensor] = []
        self._seen: list[tuple[Sequence[str], dict[str, Tensor], Tensor]] = []
        self._withheld: list[tuple[Tensor, Tensor]] = []
        self.refuses = False
        for parameter in system.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._note_gradient)
        optimizer.register_step_pre_hook(self._withhold)
        optimizer.register_step_post_hook(self._give_back)

    @torch.no_grad()
    def begin(self) -> None:
        """Before the first forward pass of a step."""
        buffers = list(self._system.buffers())
        if [each.shape for each in self._kept] != [each.shape for each in buffers]:
            self._kept = [each.clone() for each in buffers]
        elif buffers:
            torch._foreach_copy_(self._kept, buffers)
        self._seen, self._norms, self.refuses = [], [], False

    def note(self, clips: Sequence[str], losses: Mapping[str, Tensor]) -> None:
        """After the backward pass of a micro-batch."""
        zero = next(iter(losses.values())).new_zeros((), dtype=torch.float32)
        squares = torch.stack(self._norms).square().sum() if self._norms else zero
        self._seen.append((clips, {name: value.detach() for name, value in losses.items()}, squares))
        self._norms = []

    def agree(self, terms: dict[str, Tensor]) -> dict[str, float]:
        """Means of the terms over all ranks; `refuses` then says whether the step must not be made. One collective.

        Sums of squares that fit into float32 here make a global gradient norm that does, so that DeepSpeed, which skips
        steps of an infinite norm in some stages and not in others, never decides otherwise.
        """
        squares = torch.stack([squares for _, _, squares in self._seen]).double().sum()
        numbers = torch.stack([*(value.double() for value in terms.values()), self._largest(squares), squares])
        dist.all_reduce(numbers)
        *sums, largest, total = numbers.tolist()
        means = {name: value / dist.get_world_size() for name, value in zip(terms, sums, strict=True)}
        losses = [value for name, value in means.items() if not name.startswith(OBSERVED)]
        finite = all(map(math.isfinite, [*losses, largest])) and total * self._accumulation <= _MAX_SQUARES
        self.refuses = not finite
        return means

    def _largest(self, like: Tensor) -> Tensor:
        """Largest magnitude in the watched buffers."""
        buffers = [buffer for name, buffer in self._system.named_buffers() if name in self._watched]
        if not buffers:
            return torch.zeros_like(like)
        return torch.stack([norm.to(like) for norm in torch._foreach_norm(buffers, math.inf)]).amax()

    @torch.no_grad()
    def undo(self, step: int) -> NonFiniteError:
        """Put the buffers back and find out where it came from; collective."""
        faults = world.gather_objects(self._fault())
        for buffer, kept in zip(self._system.buffers(), self._kept, strict=True):
            buffer.copy_(kept)
        self.refuses = False
        return NonFiniteError(step, [fault for fault in faults if not fault.is_empty] or faults)

    def _fault(self) -> Fault:
        spoilt = [name for name, each in self._system.named_buffers() if name in self._watched and not _is_finite(each)]
        terms: dict[str, str] = {}
        clips: list[str] = []
        gradient = False
        for keys, losses, squares in self._seen:
            bad = {name: f"{value.item():g}" for name, value in losses.items() if not value.isfinite()}
            large = not squares.double().item() * self._accumulation <= _MAX_SQUARES
            terms |= bad
            gradient |= large
            clips += keys if bad or large or spoilt else ()
        return Fault(world.rank(), terms, gradient, spoilt, clips)

    def _note_gradient(self, gradient: Tensor) -> None:
        self._norms.append(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32))

    def _withhold(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Adam passes over parameters without gradient: it neither moves nor counts."""
        if not self.refuses:
            return
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            self._withheld.append((parameter, parameter.grad))
            parameter.grad = None

    def _give_back(self, *_: Any) -> None:
        for parameter, gradient in self._withheld:
            parameter.grad = gradient
        self._withheld = []


def _is_finite(buffer: Tensor) -> bool:
    return buffer.is_floating_point() and buffer.numel() > 0 and bool(buffer.isfinite().all())


class SkippedSteps:
    """The steps of a run that were skipped: counted, listed in nonfinite.json, and a bound on how many in a row.

    Args:
        allowed: So many may be skipped in a row (train.max_nonfinite).
        folder: Of the run; its earlier skipped steps, before `first_step`, are counted on.
    """

    def __init__(self, allowed: int, folder: Path, first_step: int) -> None:
        self._allowed, self._path, self.in_a_row = allowed, folder / REPORT_FILE, 0
        self.count = 0
        self._listed: list[dict[str, Any]] = []
        if world.is_main() and self._path.is_file():
            before = json.loads(self._path.read_text())
            self._listed = [each for each in before["steps"] if each["step"] < first_step]
            self.count = before["count"] - (len(before["steps"]) - len(self._listed))

    def passed(self) -> None:
        """A step was made."""
        self.in_a_row = 0

    @property
    def are_too_many(self) -> bool:
        return self.in_a_row > self._allowed

    def add(self, error: NonFiniteError) -> None:
        """A step was skipped."""
        self.in_a_row += 1
        self.count += 1
        self._listed.append({"step": error.step, "ranks": [fault._asdict() for fault in error.faults]})
        self._listed = self._listed[-MOST_REPORTED:]

    def check(self, last: NonFiniteError) -> None:
        """Raises NonFiniteError where too many were skipped in a row."""
        if self.are_too_many:
            before = f"{self.in_a_row} in a row, train.max_nonfinite={self._allowed}: " if self._allowed else ""
            raise NonFiniteError(last.step, last.faults, before) from last

    def save_report(self) -> None:
        """Write nonfinite.json."""
        write_text(self._path, json.dumps({"count": self.count, "steps": self._listed}, indent=1) + "\n")
