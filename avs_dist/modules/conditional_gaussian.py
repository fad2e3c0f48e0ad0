"""The network of CLUB, which is trained apart from the model it measures."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam

from avs_dist.gaussian import Gaussian
from avs_dist.kernels.runtime import no_autocast
from avs_dist.modules.full_precision import Float32Buffers

NUM_LAYERS = 4


class ConditionalGaussian(Float32Buffers):
    """q(y | x) of CLUB with its own optimiser: mean and log-variance each by four linear layers with ReLU between.

    The weights are a buffer, not parameters: they belong to no optimiser of the model and are not sharded, and the
    main loss, which goes through q to x, gives them no gradient. The state dict holds them and the state of Adam, so
    that a resumed run goes on exactly. The log-variance ends in tanh (public code): a variance is from 1/e to e, and
    narrower conditionals look that wide.

    Args:
        in_features: numbers in x.
        out_features: numbers in y.
        hidden: width between the layers (public code: 128).
        learning_rate: of Adam (public code: 1e-3).
    """

    weights: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor

    def __init__(self, in_features: int, out_features: int, hidden: int = 128, learning_rate: float = 1e-3) -> None:
        super().__init__()
        widths = [in_features, *[hidden] * (NUM_LAYERS - 1), out_features]
        self.shapes = [(width, before) for before, width in zip(widths[:-1], widths[1:], strict=True)]
        self.learning_rate = learning_rate
        # all in one vector: one sum over the ranks and one Adam update in each step
        self.register_buffer("weights", torch.cat([_initial(*shape) for shape in self.shapes * 2]))
        self.register_buffer("exp_avg", torch.zeros_like(self.weights))
        self.register_buffer("exp_avg_sq", torch.zeros_like(self.weights))
        self.register_buffer("step", torch.zeros(()))

    def forward(self, x: Tensor) -> Gaussian:
        """[...,in_features] in any precision -> Gaussian [...,out_features] in float32, under autocast too."""
        with no_autocast(x):
            return self._predict(self.weights, x.to(self.weights.dtype))

    def fit(
        self,
        x_ND: Tensor,
        y_ND: Tensor,
        steps: int,
        counted_N: Tensor | None = None,
        reduce: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> Tensor:
        """Adam steps on the mean of -log q(y | x) over the counted rows of all ranks; for training only.

        Neither x nor y gets a gradient, and the host waits for nothing. K ranks do the steps of one rank with all rows.
        Call it before `forward`: it changes in place what the backward pass of an earlier call needs.

        Args:
            x_ND, y_ND: [N,in_features] and [N,out_features].
            steps: how many; at least 1.
            counted_N: bool, rows that take part; None for all.
            reduce: sums a tensor over all ranks; on one rank the identity.

        Returns:
            Mean log q, a scalar without gradient, as the last step found it (before its update).

        Raises:
            ValueError: steps is less than 1.
        """
        if steps < 1:
            raise ValueError(f"steps is {steps}: must be at least 1")
        x_ND, y_ND = (each.detach().to(self.weights.dtype) for each in (x_ND, y_ND))
        weight_N = x_ND.new_ones(len(x_ND)) if counted_N is None else counted_N.to(x_ND.dtype)
        rows = reduce(weight_N.sum()).clamp_min(1.0)
        for _ in range(steps):
            gradient_and_total = reduce(self._gradient_and_total(x_ND, y_ND, weight_N)) / rows
            self._ascend(gradient_and_total[:-1])
        return gradient_and_total[-1]

    def _predict(self, weights: Tensor, x: Tensor) -> Gaussian:
        sizes = [
            size for out_features, in_features in self.shapes * 2 for size in (out_features * in_features, out_features)
        ]
        pieces = iter(weights.split(sizes))
        outputs = []
        for _ in ("mean", "log_var"):
            out = x
            for layer, shape in enumerate(self.shapes):
                out = F.linear(F.relu(out) if layer else out, next(pieces).view(shape), next(pieces))
            outputs.append(out)
        return Gaussian(outputs[0], outputs[1].tanh())

    def _gradient_and_total(self, x_ND: Tensor, y_ND: Tensor, weight_N: Tensor) -> Tensor:
        """Gradient of the sum of log q over this rank's rows, and the sum itself behind it; [P + 1]."""
        with torch.enable_grad(), no_autocast(x_ND):
            weights = self.weights.detach().requires_grad_()
            total = (self._predict(weights, x_ND).log_prob(y_ND) * weight_N).sum()
            (gradient,) = torch.autograd.grad(total, weights)
        return torch.cat([gradient, total.detach()[None]])

    def _ascend(self, gradient: Tensor) -> None:
        with torch.no_grad():
            adam(
                [self.weights],
                [gradient],
                [self.exp_avg],
                [self.exp_avg_sq],
                [],
                [self.step],
                fused=True,  # the only form in which the host never reads the number of the step
                amsgrad=False,
                beta1=0.9,
                beta2=0.999,
                lr=self.learning_rate,
                weight_decay=0.0,
                eps=1e-8,
                maximize=True,
            )
        # the fused form forgets it, and autograd would not see that an earlier forward has lost its weights
        torch.autograd.graph.increment_version(self.weights)


def _initial(out_features: int, in_features: int) -> Tensor:
    """Weight and bias of a linear layer in one vector, from the distribution of nn.Linear."""
    bound = in_features**-0.5
    return torch.empty(out_features * (in_features + 1)).uniform_(-bound, bound)
