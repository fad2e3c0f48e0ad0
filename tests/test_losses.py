"""Segmentation and audio-visual matching losses against literal loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from avs_dist.losses import alignment
from avs_dist.losses.segmentation import (
    SEGMENTATION,
    binary_cross_entropy,
    cross_entropy,
    dice,
    mixing_loss,
    structure_loss,
)

B, T, C, H, W = 2, 3, 4, 2, 3  # feature maps are H x W, logits twice as large


def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    features = torch.randn(B, T, H, W, C, dtype=torch.float64).permute(0, 1, 4, 2, 3)
    return torch.randn(B, T, 2 * H, 2 * W, dtype=torch.float64) * 3, features, torch.randn(B, T, C, dtype=torch.float64)


def pooled(values: Tensor, y: int, x: int) -> float:
    """Mean of the 2 x 2 cell (y, x)."""
    return values[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean().item()


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def kl(target: list[float], value: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(softmax(target), softmax(value), strict=True))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def weighted(features: Tensor, weight: dict[tuple[int, int], float], divisor: float) -> list[float]:
    """Sum over positions of weight * feature [C,H,W], divided."""
    return [sum(w * features[c, y, x].item() for (y, x), w in weight.items()) / divisor for c in range(C)]


def soft_mean(logits: Tensor, features: Tensor) -> list[float]:
    return weighted(features, {(y, x): sigmoid(pooled(logits, y, x)) for y in range(H) for x in range(W)}, H * W)


def unit(values: list[float]) -> list[float]:
    return [v / math.hypot(*values) for v in values]


def frame_loss(variant: str, logits: Tensor, features: Tensor, audio: list[float], normalise: bool = False) -> float:
    prepare = unit if normalise else list
    cells = [(y, x) for y in range(H) for x in range(W)]
    if variant == "s4_cosine":
        probability = torch.sigmoid(logits)
        mask = {cell: float(pooled(probability, *cell) > 0.5) for cell in cells}
        visual = weighted(features, mask, sum(mask.values()) + 1e-6)
        norm = math.hypot(*visual) * math.hypot(*audio)
        cosine = sum(v * a for v, a in zip(visual, audio, strict=True)) / norm if norm else 0.0
        return -math.log(max(cosine, 0.0) + 1e-6)
    if variant == "avss_kl":
        hard = (logits > 0).double()
        visual = weighted(features, {cell: pooled(hard, *cell) for cell in cells}, H * W)
        return kl(prepare(audio), prepare(visual) if any(visual) else visual)
    audio, visual = prepare(audio), prepare(soft_mean(logits, features))
    if variant == "ms3_kl":
        return kl(audio, visual)
    return math.sqrt(sum((a - v + 1e-6) ** 2 for a, v in zip(audio, visual, strict=True)))


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("variant", alignment.AUDIO_VISUAL)
def test_audio_visual_losses_equal_literal_loops(variant, normalise):
    logits, features, audio = make_inputs()
    logits[1, 1] = -5.0  # an empty mask
    got = alignment.AUDIO_VISUAL[variant](logits, features, audio, normalise=normalise)
    assert got.shape == (B, T)
    assert got.dtype == torch.float32
    for b in range(B):
        for t in range(T):
            want = frame_loss(variant, logits[b, t], features[b, t], audio[b, t].tolist(), normalise)
            assert got[b, t].item() == pytest.approx(want, rel=2e-4, abs=1e-5), (b, t)


@pytest.mark.parametrize("variant", alignment.AUDIO_VISUAL)
def test_only_soft_masks_pass_a_gradient_to_the_logits(variant):
    logits, features, audio = (value.requires_grad_() for value in make_inputs())
    alignment.AUDIO_VISUAL[variant](logits, features, audio).sum().backward()
    soft = variant.startswith("ms3")
    assert (logits.grad is not None and logits.grad.abs().max() > 0) == soft
    assert features.grad.abs().max() > 0
    assert audio.grad.abs().max() > 0


@pytest.mark.parametrize("variant", alignment.AUDIO_VISUAL)
def test_audio_visual_losses_are_not_normalised_unless_asked(variant):
    logits, features, audio = make_inputs()
    loss = alignment.AUDIO_VISUAL[variant]
    plain, louder = loss(logits, features, audio), loss(logits, features, 3 * audio)
    # the cosine has no other form
    assert torch.allclose(plain, louder, atol=1e-5) == (variant == "s4_cosine")
    torch.testing.assert_close(loss(logits, 5 * features, 3 * audio, True), loss(logits, features, audio, True))


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("variant", alignment.AUDIO_VISUAL)
def test_an_empty_mask_gives_finite_gradients(variant, normalise):
    logits, features, audio = (value.requires_grad_() for value in make_inputs())
    alignment.AUDIO_VISUAL[variant](logits - 100.0, features, audio, normalise=normalise).sum().backward()
    assert torch.isfinite(features.grad).all()
    assert features.grad.abs().max() < 100
    assert torch.isfinite(audio.grad).all()


def test_visual_visual_pulls_frames_of_similar_sound_together():
    logits, features, audio = make_inputs()
    visual = alignment.soft_masked_mean(logits, features).flatten(0, 1)
    flat_audio = audio.flatten(0, 1)
    got = alignment.visual_visual(visual, flat_audio, 0, visual, flat_audio)
    means = [soft_mean(logits[b, t], features[b, t]) for b in range(B) for t in range(T)]
    for i in range(B * T):
        distance = [(flat_audio[i] - flat_audio[j]).norm().item() if j != i else math.inf for j in range(B * T)]
        assert got[i].item() == pytest.approx(kl(means[distance.index(min(distance))], means[i]), rel=1e-4, abs=1e-6)
    # the second half of the frames, as another rank sees it
    half = alignment.visual_visual(visual[3:], flat_audio[3:], 3, visual, flat_audio)
    torch.testing.assert_close(half, got[3:])
    assert alignment.visual_visual(visual[:1], flat_audio[:1], 0, visual[:1], flat_audio[:1]).item() == 0


def test_visual_visual_normalised_compares_directions():
    logits, features, audio = make_inputs()
    visual, flat_audio = alignment.soft_masked_mean(logits, features).flatten(0, 1), audio.flatten(0, 1)
    got = alignment.visual_visual(visual, flat_audio, 0, visual, flat_audio, normalise=True)
    units = [torch.tensor(unit(row.tolist())) for row in flat_audio]
    nearest = []
    for i in range(B * T):
        distance = [(units[i] - units[j]).norm().item() if j != i else math.inf for j in range(B * T)]
        nearest.append(distance.index(min(distance)))
        want = kl(unit(visual[nearest[i]].tolist()), unit(visual[i].tolist()))
        assert got[i].item() == pytest.approx(want, rel=1e-4, abs=1e-6)
    plain = torch.cdist(flat_audio, flat_audio) + 100 * torch.eye(B * T)
    assert plain.argmin(1).tolist() != nearest  # these sounds tell the two apart


def test_binary_cross_entropy_is_the_mean_over_counted_frames():
    torch.manual_seed(0)
    logits = torch.randn(B, T, H, W) * 4
    masks = torch.randint(0, 3, (B, T, H, W))  # class indices count as sounding
    counted = torch.tensor([[True, False, True], [False, False, True]])
    total, count = binary_cross_entropy(logits, masks, counted)
    want = []
    for b, t in counted.nonzero().tolist():
        pixels = zip(logits[b, t].flatten().tolist(), masks[b, t].flatten().tolist(), strict=True)
        want.append(sum(-math.log(sigmoid(z if m else -z)) for z, m in pixels) / (H * W))
    assert count.item() == 3
    assert total.item() / count.item() == pytest.approx(sum(want) / 3, rel=1e-5)


def test_binary_cross_entropy_is_computed_in_float32_and_does_not_overflow():
    logits = torch.tensor([[[[1e4, -1e4]]]], dtype=torch.bfloat16, requires_grad=True)
    total, _ = binary_cross_entropy(logits, torch.tensor([[[[0, 1]]]]), torch.ones(1, 1, dtype=torch.bool))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(1e4, rel=0.01)
    total.backward()
    torch.testing.assert_close(logits.grad.float(), torch.tensor([[[[0.5, -0.5]]]]))


def literal_structure(logits: Tensor, mask: Tensor) -> float:
    """The structure loss of one frame [H,W], pixel by pixel."""
    height, width = mask.shape
    on = (mask > 0).double()
    weight_sum = bce = inter = both = 0.0
    for y in range(height):
        for x in range(width):
            window = on[max(0, y - 15) : y + 16, max(0, x - 15) : x + 16]
            m, z = on[y, x].item(), logits[y, x].item()
            w = 1 + 5 * abs(window.sum().item() / 31**2 - m)
            p = sigmoid(z)
            weight_sum += w
            bce -= w * (math.log(p) if m else math.log(1 - p))
            inter += w * p * m
            both += w * (p + m)
    return bce / weight_sum + 1 - (inter + 1) / (both - inter + 1)


@pytest.mark.parametrize(("height", "width"), [(40, 37), (7, 50), (1, 1)])
def test_structure_loss_equals_a_literal_loop_also_on_frames_smaller_than_its_window(height, width):
    logits = torch.randn(2, 2, height, width, dtype=torch.float64) * 3
    masks = torch.zeros(2, 2, height, width, dtype=torch.int64)
    masks[..., height // 3 :, width // 4 : width // 2 + 1] = 2  # class indices count as sounding
    masks[1, 1] = 0  # silence
    counted = torch.tensor([[True, False], [True, True]])
    total, count = structure_loss(logits, masks, counted)
    want = [literal_structure(logits[b, t], masks[b, t]) for b, t in counted.nonzero().tolist()]
    assert count.item() == 3
    assert total.item() == pytest.approx(sum(want), rel=1e-10)
    single, _ = structure_loss(logits.float(), masks, counted)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(sum(want), rel=1e-5)


def test_structure_loss_cares_most_for_pixels_near_edges():
    masks = torch.zeros(1, 1, 64, 64)
    masks[..., 20:44, 20:44] = 1
    logits = (40.0 * masks - 20.0).double().requires_grad_()
    wrong = logits.detach().clone()
    wrong[..., 32, 21], wrong[..., 2, 2] = 0.0, 0.0  # at the edge of the object, and far from it
    wrong.requires_grad_()
    total, _ = structure_loss(wrong, masks, torch.ones(1, 1, dtype=torch.bool))
    total.backward()
    assert wrong.grad[0, 0, 32, 21].abs() > 2.5 * wrong.grad[0, 0, 2, 2].abs()
    perfect, _ = structure_loss(logits, masks, torch.ones(1, 1, dtype=torch.bool))
    assert 0 <= perfect.item() < 1e-6


@pytest.mark.parametrize("name", SEGMENTATION)
def test_segmentation_losses_do_not_overflow_and_allow_no_counted_frame(name):
    logits = torch.tensor([[[[1e4, -1e4]]]], dtype=torch.bfloat16, requires_grad=True)
    total, count = SEGMENTATION[name](logits, torch.tensor([[[[0, 1]]]]), torch.ones(1, 1, dtype=torch.bool))
    assert (total.dtype, count.dtype) == (torch.float32, torch.float32)
    total.backward()
    assert torch.isfinite(logits.grad).all()
    # Dice teaches nothing where a sigmoid is saturated
    assert logits.grad[0, 0, 0, 0] > 0.1 or name == "dice"
    none, count = SEGMENTATION[name](logits, torch.tensor([[[[0, 1]]]]), torch.zeros(1, 1, dtype=torch.bool))
    assert (none.item(), count.item()) == (0, 0)
    none.backward()


def test_structure_loss_has_the_right_gradient():
    logits = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    masks = torch.randint(0, 2, (1, 2, 3, 4))
    assert torch.autograd.gradcheck(lambda z: structure_loss(z, masks, torch.tensor([[True, False]]))[0], [logits])


def literal_dice(logits: Tensor, mask: list[list[float]]) -> float:
    """Dice of one frame [H,W], pixel by pixel."""
    common = predicted = true = 0.0
    for y, row in enumerate(mask):
        for x, m in enumerate(row):
            p = sigmoid(logits[y, x].item())
            common, predicted, true = common + p * m, predicted + p, true + m
    return 1 - (2 * common + 1) / (predicted + true + 1)


def test_dice_equals_a_literal_loop():
    logits = torch.randn(2, 2, 5, 7, dtype=torch.float64) * 3
    masks = torch.randint(0, 3, (2, 2, 5, 7), dtype=torch.uint8)  # class indices count as sounding
    masks[1, 1] = 0  # silence
    counted = torch.tensor([[True, False], [True, True]])
    total, count = SEGMENTATION["dice"](logits, masks, counted)
    want = sum(literal_dice(logits[b, t], (masks[b, t] > 0).tolist()) for b, t in counted.nonzero().tolist())
    assert count.item() == 3
    assert total.item() == pytest.approx(want, rel=1e-12)
    assert dice(logits.float(), masks, counted)[0].item() == pytest.approx(want, rel=1e-5)


def test_dice_of_an_empty_mask_counts_false_pixels():
    """n false pixels cost n / (n + 1), and there is a way down."""
    masks, counted = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, dtype=torch.bool)
    for n in (0, 1, 9):
        logits = torch.full((1, 1, 8, 8), -50.0, dtype=torch.float64)
        logits.view(-1)[:n] = 50.0
        assert dice(logits, masks, counted)[0].item() == pytest.approx(n / (n + 1), abs=1e-12)
    logits = torch.zeros(1, 1, 8, 8, requires_grad=True)
    dice(logits, masks, counted)[0].backward()
    assert (logits.grad > 0).all()


def test_mixing_loss_is_the_dice_of_the_share_of_each_cell_that_sounds():
    mix = torch.randn(1, 3, 2, 3, dtype=torch.float64) * 3
    masks = torch.randint(0, 3, (1, 3, 8, 15), dtype=torch.uint8)
    masks[0, 2] = 0
    counted = torch.tensor([[True, False, True]])
    want = 0.0
    for t in (0, 2):
        on = (masks[0, t] > 0).double()
        cells = [[on[4 * y : 4 * y + 4, 5 * x : 5 * x + 5].mean().item() for x in range(3)] for y in range(2)]
        want += literal_dice(mix[0, t], cells)
    total, count = mixing_loss(mix, masks, counted)
    assert count.item() == 2
    assert total.item() == pytest.approx(want, rel=1e-12)
    sounding = torch.ones(1, 3, 90, 77)  # cells overlap: 90 / 23 rows
    perfect, _ = mixing_loss(torch.full((1, 3, 23, 20), 50.0, dtype=torch.float64), sounding, counted)
    assert perfect.item() == pytest.approx(0.0, abs=1e-12)
    none, count = mixing_loss(mix, masks, torch.zeros(1, 3, dtype=torch.bool))
    assert (none.item(), count.item()) == (0, 0)


def test_cross_entropy_is_the_mean_over_pixels_of_counted_frames():
    classes = 4
    logits = torch.randn(2, 2, classes, H, W, dtype=torch.float64) * 3
    masks = torch.randint(0, classes, (2, 2, H, W), dtype=torch.uint8)
    counted = torch.tensor([[True, False], [True, True]])
    masks[0, 1] = 255  # nobody looks at it
    want = 0.0
    for b, t in counted.nonzero().tolist():
        for y in range(H):
            for x in range(W):
                want -= math.log(softmax(logits[b, t, :, y, x].tolist())[masks[b, t, y, x]]) / (H * W)
    total, count = cross_entropy(logits, masks, counted)
    assert count.item() == 3
    assert total.item() == pytest.approx(want, rel=1e-12)
    half, count = cross_entropy(logits.bfloat16(), masks, counted)
    assert (half.dtype, count.dtype) == (torch.float32, torch.float32)
    none, count = cross_entropy(logits.requires_grad_(), masks, torch.zeros(2, 2, dtype=torch.bool))
    assert (none.item(), count.item()) == (0, 0)
    none.backward()


def test_cross_entropy_does_not_overflow_and_refuses_unknown_classes():
    logits = torch.tensor([1e4, -1e4, 0.0], dtype=torch.bfloat16).view(1, 1, 3, 1, 1).requires_grad_()
    counted = torch.ones(1, 1, dtype=torch.bool)
    total, _ = cross_entropy(logits, torch.tensor([[[[1]]]], dtype=torch.uint8), counted)
    assert total.item() == pytest.approx(2e4, rel=0.01)
    total.backward()
    torch.testing.assert_close(logits.grad.flatten().float(), torch.tensor([1.0, -1.0, 0.0]))
    with pytest.raises(IndexError, match="out of bounds"):
        cross_entropy(logits, torch.tensor([[[[3]]]], dtype=torch.uint8), counted)


def test_losses_of_the_transformer_decoder_and_of_classes_have_the_right_gradients():
    counted = torch.tensor([[True, False]])
    masks = torch.randint(0, 3, (1, 2, 6, 4), dtype=torch.uint8)
    full, small = (torch.randn(1, 2, *size, dtype=torch.float64, requires_grad=True) for size in ((6, 4), (3, 2)))
    classes = torch.randn(1, 2, 3, 6, 4, dtype=torch.float64, requires_grad=True)
    for loss, logits in ((dice, full), (mixing_loss, small), (cross_entropy, classes)):
        assert torch.autograd.gradcheck(lambda z, f=loss: f(z, masks, counted)[0], [logits]), loss.__name__
