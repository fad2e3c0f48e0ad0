"""Training of a head on one process, in plain torch: seeded, so that the same data give the same head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# epochs after which the public code halves the learning rate
MILESTONES = (10, 20, 30)
CHUNK = 1024  # clips at a time where there is no gradient

# tensors whose rows belong together
Examples = dict[str, Tensor]
# a head and a batch -> a scalar
Loss = Callable[[nn.Module, Examples], Tensor]


@dataclass(frozen=True)
class HeadTraining:
    """Settings of the training of a head; defaults as published.

    Raises:
        ValueError: out of range.
    """

    epochs: int = 30
    lr: float = 4e-4
    batch: int = 80
    seed: int = 0
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: must be at least {least}")
        if not self.lr > 0:
            raise ValueError(f"lr is {self.lr}: must be positive")


def rows(examples: Examples, which: Tensor | slice) -> Examples:
    return {name: value[which] for name, value in examples.items()}


def count(examples: Examples) -> int:
    return len(next(iter(examples.values())))


def fit(build: Callable[[], nn.Module], loss: Loss, examples: Examples, settings: HeadTraining) -> Iterator[nn.Module]:
    """Train a head with Adam; yields it after each epoch, in evaluation mode.

    The state of torch's generators is that of the caller again at every yield.
    """
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        head = build().to(settings.device)
    optimiser = torch.optim.Adam(head.parameters(), lr=settings.lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, MILESTONES, gamma=0.5)
    generator = torch.Generator().manual_seed(settings.seed)
    for epoch in range(settings.epochs):
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed + epoch)  # dropout
            head.train()
            for batch in torch.randperm(count(examples), generator=generator).split(settings.batch):
                optimiser.zero_grad()
                loss(head, to_device(rows(examples, batch), settings.device)).backward()
                optimiser.step()
        schedule.step()
        yield head.eval()


def fit_best(
    build: Callable[[], nn.Module],
    loss: Loss,
    examples: Examples,
    settings: HeadTraining,
    score: Callable[[nn.Module], float],
) -> tuple[nn.Module, int]:
    """The head of the first epoch with the highest score, in evaluation mode, and which epoch that was, from 1 on.

    Args:
        score: of a head on clips that are neither trained on nor tested.
    """
    best: tuple[float, int, dict[str, Tensor]] | None = None
    for epoch, head in enumerate(fit(build, loss, examples, settings), start=1):
        value = score(head)
        if best is None or value > best[0]:
            best = value, epoch, deepcopy(head.state_dict())
    assert best is not None  # there is an epoch
    head.load_state_dict(best[2])
    return head, best[1]


@torch.no_grad()
def outputs(call: Callable[[Examples], Tensor], examples: Examples, device: torch.device | str) -> Tensor:
    """What a head makes of all examples, on the CPU."""
    chunks = [slice(start, start + CHUNK) for start in range(0, count(examples), CHUNK)]
    return torch.cat([call(to_device(rows(examples, chunk), device)).cpu() for chunk in chunks])


def to_device(examples: Examples, device: torch.device | str) -> Examples:
    return {name: value.to(device) for name, value in examples.items()}
