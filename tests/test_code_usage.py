"""The use of codes: counts over updates and ranks, the classes of Fig. 4, and the figure."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sync_guard import no_host_sync
from torch import Tensor

from avs_dist import world
from avs_dist.code_usage import CodeUsage, CodeUse
from avs_dist.code_usage_figure import AUDIO, BOTH, VISUAL, draw

PAIR = ("audio", "visual")
TRIPLE = (*PAIR, "text")


def use(counts: list[list[int]], modalities: tuple[str, ...] = PAIR) -> CodeUse:
    return CodeUse(modalities, torch.tensor(counts), 0, 0)


def random_codes(modalities: tuple[str, ...], steps: int = 5) -> list[dict[str, Tensor]]:
    return [{name: torch.randint(-1, 7, (3, 4)) for name in modalities} for _ in range(steps)]


@pytest.mark.parametrize("modalities", [PAIR, TRIPLE])
def test_counts_and_agreement_match_loops(modalities: tuple[str, ...]) -> None:
    usage, batches = CodeUsage(7, modalities), random_codes(modalities)
    counts, same, compared = [[0] * 7 for _ in modalities], 0, 0
    for codes in batches:
        usage.update(codes)
        for b in range(3):
            for t in range(4):
                chosen = [int(codes[name][b, t]) for name in modalities]
                for m, code in enumerate(chosen):
                    if code >= 0:
                        counts[m][code] += 1
                    for other in chosen[:m]:
                        compared += code >= 0 and other >= 0
                        same += code == other >= 0
    found = usage.compute()
    assert found.counts_ML.dtype == torch.int64
    assert found.counts_ML.tolist() == counts
    assert (found.same, found.compared) == (same, compared)
    assert found.agreement == same / compared
    assert found.scalars()["codes/agreement"] == found.agreement


def test_classes_at_their_borders() -> None:
    """20 % is shared, more than 80 % is not; a code that nobody uses is in no class."""
    found = use([[4, 5, 1, 81, 0, 80, 0], [1, 1, 5, 19, 3, 20, 0]])
    assert {name: of_L.int().tolist() for name, of_L in found.classes.items()} == {
        "mostly audio": [0, 1, 0, 1, 0, 0, 0],
        "mostly visual": [0, 0, 1, 0, 1, 0, 0],
        "shared": [1, 0, 0, 0, 0, 1, 0],
    }
    assert found.used == pytest.approx(6 / 7)
    scalars = found.scalars()
    assert scalars["codes/used"] == pytest.approx(6 / 7)
    for name in ("shared", "mostly_audio", "mostly_visual"):
        assert scalars[f"codes/{name}"] == pytest.approx(2 / 6)
    torch.testing.assert_close(found.shares_ML[1, 3:], torch.tensor([0.19, 1.0, 0.2, 0.0]).double())


def test_three_modalities_may_share_in_part() -> None:
    found = use([[2, 5, 9, 0, 0], [2, 5, 1, 9, 0], [1, 1, 0, 1, 2]], TRIPLE)
    assert {name: of_L.nonzero()[:, 0].tolist() for name, of_L in found.classes.items()} == {
        "mostly audio": [2],
        "mostly visual": [3],
        "mostly text": [4],
        "shared": [0],
        "partly shared": [1],
    }
    assert found.scalars()["codes/partly_shared"] == 0.2


def test_perplexity_counts_equally_used_codes() -> None:
    found = use([[3, 3, 3, 3], [0, 5, 0, 0], [0, 0, 0, 0]], TRIPLE)
    assert found.perplexity == pytest.approx({"audio": 4.0, "visual": 1.0, "text": 0.0})
    uneven = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert use([[1, 3], [1, 1]]).scalars()["perplexity/audio"] == pytest.approx(math.exp(uneven))


def test_ranks_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that saw nothing counts as well."""
    whole, parts = CodeUsage(7, PAIR), [CodeUsage(7, PAIR) for _ in range(3)]
    for place, codes in enumerate(random_codes(PAIR)):
        whole.update(codes)
        parts[place % 2].update(codes)
    shares: list = []
    monkeypatch.setattr(world, "gather_objects", lambda value: shares.append(value) or [value])
    for part in parts[:2]:
        part.compute()
    with pytest.raises(ValueError, match="no tokens were counted"):
        parts[2].compute()
    expected = whole.compute()
    monkeypatch.setattr(world, "gather_objects", lambda value: shares[:3])
    found = parts[2].compute()
    assert torch.equal(found.counts_ML, expected.counts_ML)
    assert (found.same, found.compared) == (expected.same, expected.compared)


def test_a_missing_modality_has_no_tokens() -> None:
    usage = CodeUsage(7, PAIR)
    usage.update({"visual": torch.tensor([[3, -1]])})
    found = usage.compute()
    assert found.counts_ML.tolist() == [[0] * 7, [0, 0, 0, 1, 0, 0, 0]]
    assert math.isnan(found.agreement)
    assert "codes/agreement" not in found.scalars()


def test_counting_does_not_wait_for_the_device() -> None:
    usage = CodeUsage(7, TRIPLE)
    with no_host_sync():
        usage.update(random_codes(TRIPLE, 1)[0])


def test_codes_that_do_not_fit() -> None:
    usage = CodeUsage(7, PAIR)
    with pytest.raises(ValueError, match=r"expected modalities \['audio', 'visual'\], got \['text'\]"):
        usage.update({"text": torch.zeros(1, 1, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"one shape, got \{'audio': \[1, 2\], 'visual': \[2, 1\]\}"):
        usage.update({"audio": torch.zeros(1, 2).long(), "visual": torch.zeros(2, 1).long()})


def painted(picture_HWC: np.ndarray, colour: str) -> np.ndarray:
    """Bool [H,W]: pixels of this colour."""
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return (np.abs(picture_HWC[..., :3] - wanted) < 0.01).all(-1)


def test_the_figure_goes_from_one_modality_to_the_other(tmp_path) -> None:
    """40 codes of sound alone, 50 of both with 25 to 74 % of sound, in any order, and 60 of the picture."""
    audio = [25 + 7 * place % 50 for place in range(50)]
    counts = [[900] + [9] * 39 + [0] * 60 + audio, [0] * 40 + [9] * 60 + [100 - count for count in audio]]
    draw(use(counts), tmp_path / "codes.png")
    picture_HWC = imread(tmp_path / "codes.png")
    height = len(picture_HWC)
    bars_HWC = picture_HWC[6 * height // 10 + 40 :]
    sound_W, sight_W = (painted(bars_HWC, colour).sum(0) for colour in (AUDIO, VISUAL))
    columns = np.flatnonzero(sound_W + sight_W > 100)
    middles = np.linspace(columns.min(), columns.max(), 301)[1::2].astype(int)
    level = sound_W[middles] / sound_W.max(), sight_W[middles] / sight_W.max()
    expected = np.array([1.0] * 40 + [count / 100 for count in range(74, 24, -1)] + [0.0] * 60)
    np.testing.assert_allclose(level, [expected, 1 - expected], atol=0.05)  # the dotted lines hide some pixels
    borders = [columns.min() + share * np.ptp(columns) for share in (0, 40 / 150, 90 / 150, 1)]
    full = [np.flatnonzero(height_W > 0.97 * height_W.max()) for height_W in (sound_W, sight_W)]
    both = np.flatnonzero(painted(picture_HWC[height // 5 : height // 2], BOTH).any(0))
    for found, (left, right) in zip((full[0], both, full[1]), itertools.pairwise(borders), strict=True):
        assert (found.min(), found.max()) == pytest.approx((left, right), abs=15)


def test_the_figure_of_three_modalities_is_drawn(tmp_path) -> None:
    names = (*PAIR, "touch")
    draw(use([[2, 5, 9, 0, 0, 0], [2, 5, 1, 9, 0, 0], [1, 1, 0, 1, 2, 0]], names), tmp_path / "codes.png")
    assert imread(tmp_path / "codes.png").std() > 0.1
