"""The DDIM sampler: torch form and kernels against the literal formulas, batches split anywhere, bad input."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, assert_as_accurate
from torch import Tensor

from avs_dist.kernels import reference, runtime
from avs_dist.kernels.denoise import MAX_WIDTH, DDIMSteps, DenoiserWeights, PackedDenoiser, ddim_sample, pack

PREDICTIONS = ("eps", "v", "x0")
UNET = (20, 17, 16, 17, 20)  # hidden widths that skip links accept: output 0 meets the input of the last layer


@pytest.fixture(autouse=True)
def _form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVS_KERNELS", "triton")


class Inputs(NamedTuple):
    noise_BD: Tensor
    condition_BE: Tensor
    weights: DenoiserWeights
    steps: DDIMSteps
    step_noise_SBD: Tensor

    def cast(self, dtype: torch.dtype) -> Inputs:
        """All tensors in another type."""
        w = self.weights
        matrices, biases = (tuple(value.to(dtype) for value in values) for values in (w.matrices, w.biases))
        return Inputs(
            self.noise_BD.to(dtype),
            self.condition_BE.to(dtype),
            w._replace(matrices=matrices, biases=biases, step_SH=w.step_SH.to(dtype)),
            DDIMSteps(*(value.to(dtype) for value in self.steps)),
            self.step_noise_SBD.to(dtype),
        )

    def rows(self, start: int, stop: int) -> Inputs:
        """A part of the batch."""
        return self._replace(
            noise_BD=self.noise_BD[start:stop],
            condition_BE=self.condition_BE[start:stop],
            step_noise_SBD=self.step_noise_SBD[:, start:stop],
        )


def make(
    batch: int = 5,
    latent: int = 5,
    condition: int = 3,
    hidden: Sequence[int] = (16, 16),
    steps: int = 2,
    skips: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Inputs on the device; the matrices in `dtype`, the rest in float32."""
    sizes = (latent + condition, *hidden, latent)
    shapes = [(out, inputs) for inputs, out in itertools.pairwise(sizes)]
    alpha_S = torch.linspace(0.03, 0.97, steps, device=DEVICE)
    return Inputs(
        torch.randn(batch, latent, device=DEVICE),
        torch.randn(batch, condition, device=DEVICE),
        DenoiserWeights(
            tuple((torch.randn(shape, device=DEVICE) * (2 / shape[1]) ** 0.5).to(dtype) for shape in shapes),
            tuple(0.1 * torch.randn(shape[0], device=DEVICE) for shape in shapes),
            torch.randn(steps, sizes[1], device=DEVICE),
            skips,
        ),
        DDIMSteps(alpha_S, torch.cat([alpha_S[1:], alpha_S.new_ones(1)])),
        torch.randn(steps, batch, latent, device=DEVICE),
    )


def sample(inputs: Inputs, **settings: Any) -> Tensor:
    given = {"step_noise_SBD": inputs.step_noise_SBD} if settings.get("eta") else {}
    return ddim_sample(*inputs[:4], **given, **settings)


def literal(inputs: Inputs, prediction: str = "eps", eta: float = 0.0, clip: float | None = None) -> Tensor:
    return reference.ddim_sample(*inputs[:4], prediction, eta, inputs.step_noise_SBD if eta else None, clip)


def torch_form(inputs: Inputs, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setenv("AVS_KERNELS", "torch")
        return sample(inputs, **settings)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_torch_form_is_the_literal_formula(prediction: str, eta: float, clip: float | None) -> None:
    inputs = make(hidden=UNET, steps=3, skips=True).cast(torch.float64)
    expected = literal(inputs, prediction, eta, clip)
    torch.testing.assert_close(
        sample(inputs, prediction=prediction, eta=eta, clip=clip), expected, rtol=1e-12, atol=1e-12
    )


SHAPES = [
    pytest.param(1, 5, 3, (16, 16), 1, False, id="one row, one step"),
    pytest.param(65, 4, 3, (20,) * 3, 2, False, id="a row beyond the tile"),
    pytest.param(3, 6, 1, UNET, 2, True, id="skips, unequal widths"),
    pytest.param(3, 6, 5, (33,) * 7, 1, True, id="eight layers"),
    pytest.param(2, 40, 2, (100, 30, 70), 2, False, id="width 128"),
    pytest.param(2, 3, 2, (), 2, False, id="one layer"),
    pytest.param(2, 9, 0, (16,), 2, False, id="no condition"),
    pytest.param(3, 5, 4, (130, 20, 20, 20, 130), 2, True, id="wide, skips"),
    pytest.param(17, 70, 4, (130, 256), 1, False, id="wide, latent over one block"),
    pytest.param(3, 5, 4, (260, 9), 2, False, id="width 512"),
    pytest.param(2, 5, 140, (), 2, False, id="wide, one layer"),
    pytest.param(3, 5, 4, (18,) * 8, 2, True, id="more skips than registers"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "latent", "condition", "hidden", "steps", "skips"), SHAPES)
def test_matches_reference(
    batch: int,
    latent: int,
    condition: int,
    hidden: tuple[int, ...],
    steps: int,
    skips: bool,
    dtype: torch.dtype,
    poisoned: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values: list[list[Tensor]] = [[], [], []]
    while sum(value.numel() for value in values[0]) < 200:  # with fewer, chance decides which error is smaller
        inputs = make(batch, latent, condition, hidden, steps, skips, dtype)
        for prediction, eta, clip in zip(PREDICTIONS, (0.7, 0.0, 0.0), (None, 1.5, None), strict=True):
            settings = {"prediction": prediction, "eta": eta, "clip": clip}
            values[0].append(sample(inputs, **settings))
            values[1].append(literal(inputs.cast(torch.float64), **settings))
            values[2].append(torch_form(inputs, monkeypatch, **settings))
    assert_as_accurate("latents", *(torch.cat(value) for value in values))


def test_closed_forms() -> None:
    # a denoiser whose output is b everywhere: eps = 0 scales z by sqrt(a'/a), v = 0 turns it by the angle between the
    # two levels of noise, x0 = b arrives at b
    inputs = make(hidden=(), steps=4)
    a_S, next_S = inputs.steps
    scales = {
        "eps": (next_S / a_S).sqrt().prod(),
        "v": (a_S.sqrt().acos() - next_S.sqrt().acos()).cos().prod(),
        "x0": torch.zeros(()),
    }
    for prediction, scale in scales.items():
        b = 0.5 if prediction == "x0" else 0.0
        w = inputs.weights
        constant = w._replace(matrices=(0 * w.matrices[0],), biases=(0 * w.biases[0] + b,), step_SH=0 * w.step_SH)
        got = sample(inputs._replace(weights=constant), prediction=prediction)
        torch.testing.assert_close(got, inputs.noise_BD * scale.to(DEVICE) + b)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_variance_does_not_turn_negative(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # 1 - a' - sigma^2 is 1e-9 here, far below the rounding of its terms
    monkeypatch.setenv("AVS_KERNELS", form)
    inputs = make(hidden=(16,), steps=3)
    inputs = inputs._replace(steps=DDIMSteps(*torch.tensor([[1e-9, 0.3, 0.9], [0.3, 0.9, 0.999]], device=DEVICE)))
    got = sample(inputs, eta=1.0, prediction="v")
    expected = literal(inputs.cast(torch.float64), eta=1.0, prediction="v")
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("ordered_dot")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [(24,) * 3, (140,) * 2], ids=["resident", "wide"])
def test_result_of_a_row_does_not_depend_on_its_batch(hidden: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = make(67, hidden=hidden, dtype=dtype)
    whole = sample(inputs, eta=0.5)
    parts = [sample(inputs.rows(start, stop), eta=0.5) for start, stop in itertools.pairwise((0, 1, 18, 67))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("hidden", [(24,) * 3, (140,) * 2], ids=["resident", "wide"])
def test_nan_stays_in_its_row(hidden: tuple[int, ...]) -> None:
    inputs = make(4, hidden=hidden)
    inputs.noise_BD[2, 1] = float("nan")
    got = sample(inputs, clip=1.0)
    assert got[2].isnan().all()
    assert got[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize(("dtype", "batch"), [(torch.float32, 2050), (torch.float16, 8200)])
def test_large_tiles(dtype: torch.dtype, batch: int, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(batch, hidden=(100, 100), steps=1, dtype=dtype)
    exact = torch_form(inputs.cast(torch.float64), monkeypatch)
    assert_as_accurate("large", sample(inputs), exact, torch_form(inputs, monkeypatch))


def test_strides_and_types_of_inputs() -> None:
    plain = make(5, latent=4, condition=3)
    half = plain._replace(condition_BE=plain.condition_BE.half())
    strided = half._replace(
        noise_BD=plain.noise_BD.t().contiguous().t(),
        condition_BE=torch.stack([half.condition_BE, -half.condition_BE], 2)[..., 0],
        step_noise_SBD=plain.step_noise_SBD.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        steps=DDIMSteps(*(torch.stack([value, -value], 1)[:, 0] for value in plain.steps)),
    )
    assert not strided.noise_BD.is_contiguous()
    expected = sample(half._replace(condition_BE=half.condition_BE.float()), eta=0.5)
    assert torch.equal(sample(strided, eta=0.5), expected)
    one_condition = plain._replace(condition_BE=plain.condition_BE[:1].expand(5, -1))
    copied = plain._replace(condition_BE=plain.condition_BE[:1].repeat(5, 1))
    assert torch.equal(sample(one_condition), sample(copied))


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_autocast_changes_nothing(form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVS_KERNELS", form)
    inputs = make(dtype=dtype)
    expected = sample(inputs, eta=0.5)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(sample(inputs, eta=0.5), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [(24,) * 3, (140,) * 2], ids=["resident", "wide"])
def test_strides_beyond_32_bits(hidden: tuple[int, ...]) -> None:
    """The last columns are 2^31 elements away."""
    inputs = make(3, latent=5, condition=3, hidden=hidden)
    memory = torch.empty(2**31 + 64, device=DEVICE)
    noise_BD = memory.as_strided((3, 5), (1, 2**29))
    condition_BE = memory.as_strided((3, 3), (1, 2**30), 16)
    step_noise_SBD = memory.as_strided((2, 3, 5), (8, 1, 2**29), 32)
    noise_BD.copy_(inputs.noise_BD)
    condition_BE.copy_(inputs.condition_BE)
    step_noise_SBD.copy_(inputs.step_noise_SBD)
    far = inputs._replace(noise_BD=noise_BD, condition_BE=condition_BE, step_noise_SBD=step_noise_SBD)
    assert torch.equal(sample(far, eta=0.5), sample(inputs, eta=0.5))


def test_packed_weights_give_the_same_and_an_empty_batch_is_empty(poisoned: None) -> None:
    inputs = make(hidden=(20, 18))
    packed = pack(inputs.weights)
    assert packed.matrices_LHH.shape == (3, 32, 32)
    assert torch.equal(ddim_sample(*inputs[:2], packed, inputs.steps), sample(inputs))
    assert sample(inputs.rows(0, 0)).shape == (0, 5)


def test_everything_is_one_launch() -> None:
    inputs = make(hidden=(20,) * 7, steps=10, skips=True)
    packed = pack(inputs.weights)
    with runtime.recording() as launches:
        ddim_sample(*inputs[:2], packed, inputs.steps)
    assert len(launches) == 1


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_code(form: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVS_KERNELS", form)
    inputs = make(hidden=(16, 16))
    weights: DenoiserWeights | PackedDenoiser = pack(inputs.weights) if packed else inputs.weights

    def twice(noise_BD: Tensor, condition_BE: Tensor) -> Tensor:
        return 2 * ddim_sample(
            noise_BD + 0, condition_BE, weights, inputs.steps, eta=0.5, step_noise_SBD=inputs.step_noise_SBD, clip=1.0
        )

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs[:2]), twice(*inputs[:2]))


def test_needs_no_grad() -> None:
    inputs = make()
    inputs.weights.matrices[1].requires_grad_()
    with pytest.raises(ValueError, match="no gradient"):
        sample(inputs)
    with pytest.raises(ValueError, match="no gradient"):
        pack(inputs.weights)
    with torch.no_grad():
        assert not sample(inputs).requires_grad


def _layer(weights: DenoiserWeights, matrix: Tensor) -> DenoiserWeights:
    return weights._replace(matrices=(*weights.matrices[:1], matrix, *weights.matrices[2:]))


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda i: i._replace(noise_BD=i.noise_BD[:, :4]), {}, r"noise_BD must be \[any, 5\] float32"),
        (lambda i: i._replace(noise_BD=i.noise_BD.half()), {}, r"noise_BD must be .*float32 .*got \[5, 5\] float16"),
        (lambda i: i._replace(condition_BE=i.condition_BE[1:]), {}, r"condition_BE must be \[5, 3\]"),
        (lambda i: i._replace(condition_BE=i.condition_BE.double()), {}, "condition_BE must be .*got .*float64"),
        (lambda i: i._replace(weights=_layer(i.weights, i.weights.matrices[1][:, 1:])), {}, r"matrices\[1\] must be"),
        (lambda i: i._replace(weights=_layer(i.weights, i.weights.matrices[1].half())), {}, r"matrices\[1\] must be"),
        (lambda i: i._replace(weights=i.weights._replace(biases=i.weights.biases[1:])), {}, "as many biases"),
        (lambda i: i._replace(weights=i.weights._replace(matrices=(), biases=())), {}, "as many biases"),
        (lambda i: i._replace(weights=i.weights._replace(biases=i.weights.biases[::-1])), {}, r"biases\[0\] must be"),
        (lambda i: i._replace(weights=i.weights._replace(step_SH=i.weights.step_SH[:, 1:])), {}, "step_SH must be"),
        (lambda i: i._replace(weights=i.weights._replace(step_SH=i.weights.step_SH[:0])), {}, "at least one step"),
        (
            lambda i: i._replace(weights=i.weights._replace(skips=True)),
            {},
            "layer 0 to the input of layer 2: .* 16 and 17",
        ),
        (lambda i: make(hidden=(MAX_WIDTH + 1,)), {}, f"1 to {MAX_WIDTH} inputs"),
        (lambda i: i._replace(steps=i.steps._replace(alpha_S=i.steps.alpha_S[1:])), {}, r"alpha_S must be \[2\]"),
        (
            lambda i: i._replace(step_noise_SBD=i.step_noise_SBD[1:]),
            {"eta": 0.5},
            r"step_noise_SBD must be \[2, 5, 5\]",
        ),
        (lambda i: i, {"prediction": "score"}, "one of eps, v, x0, got 'score'"),
        (lambda i: i, {"eta": 1.5}, "between 0 and 1, got 1.5"),
        (lambda i: i, {"eta": 0.5, "step_noise_SBD": None}, "needs step_noise_SBD"),
        (lambda i: i, {"clip": 0.0}, "clip must be positive"),
        (lambda i: i, {"clip": torch.tensor(1.0)}, "clip must be a Python number, got Tensor"),
        (lambda i: i, {"eta": torch.tensor(0.5)}, "eta must be a Python number, got Tensor"),
        (
            lambda i: i._replace(weights=i.weights._replace(slope=torch.tensor(0.1))),
            {},
            "slope must be a Python number, got Tensor",
        ),
    ],
)
@pytest.mark.parametrize("form", ["torch", "triton"])
def test_rejects_bad_input(
    form: str, change: Any, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AVS_KERNELS", form)
    inputs = change(make(hidden=(16, 17)))
    with pytest.raises(ValueError, match=message):
        ddim_sample(*inputs[:4], **{"step_noise_SBD": inputs.step_noise_SBD, **settings})


WIDTHS = [64, 128, 256, 512]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("skips", [False, True])
def test_real_sizes(width: int, skips: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(20_000, 24, 24, (width,) * 7, 10, skips, dtype)
    for prediction, eta in zip(PREDICTIONS, (0.0, 0.5, 1.0), strict=True):
        settings = {"prediction": prediction, "eta": eta, "clip": 2.0}
        whole = sample(inputs, **settings)
        exact = torch_form(inputs.cast(torch.float64), monkeypatch, **settings)
        assert_as_accurate(prediction, whole, exact, torch_form(inputs, monkeypatch, **settings))
        # every tile size, and rows at other places in their tiles
        cuts = (0, 1, 30, 1000, 4096, 9000, 20_000)
        parts = [sample(inputs.rows(start, stop), **settings) for start, stop in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(parts), whole)
        assert all(torch.equal(sample(inputs, **settings), whole) for _ in range(10))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [128, 256])
def test_can_be_captured(width: int) -> None:
    inputs = make(100, 24, 24, (width,) * 7, 10, dtype=torch.bfloat16)
    packed, expected = pack(inputs.weights), sample(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ddim_sample(*inputs[:2], packed, inputs.steps)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)
