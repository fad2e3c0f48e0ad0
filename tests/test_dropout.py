"""Dropout that belongs to the clip: the same in any batch, and as random as it should be."""

from __future__ import annotations

import pytest
import torch

from avs_dist.draws import ClipDraws
from avs_dist.modules.backbone import Backbone
from avs_dist.modules.dropout import BITS, ClipDropout, ClipDropPath, uniform_bits
from avs_dist.modules.sequence_encoders import TemporalEncoder

KEYS = tuple(f"clip{i}" for i in range(6))


def test_what_is_dropped_of_a_clip_does_not_depend_on_the_others():
    encoder = TemporalEncoder(None, 8, 2, 2, 0.4).double()
    x, valid = torch.randn(6, 5, 8, dtype=torch.float64), torch.arange(5) < torch.tensor([5, 2, 4, 1, 3, 5])[:, None]
    draws = ClipDraws(3, 7, KEYS).numbers("dropout/audio")
    together = encoder(x, valid, draws)
    apart = [encoder(x[rows], valid[rows], draws[rows]) for rows in (slice(0, 1), slice(1, 4), slice(4, 6))]
    torch.testing.assert_close(torch.cat(apart), together, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(encoder(x, valid), together)  # torch's own draws
    for other in (ClipDraws(3, 8, KEYS).numbers("dropout/audio"), ClipDraws(3, 7, KEYS).numbers("dropout/visual")):
        assert not torch.allclose(encoder(x, valid, other), together)


def test_every_place_of_every_layer_draws_for_itself():
    encoder = TemporalEncoder(None, 8, 3, 2, 0.4)
    seen: list[torch.Tensor] = []
    for module in encoder.modules():
        if isinstance(module, ClipDropout):
            module.register_forward_pre_hook(lambda m, args: seen.append(args[1] + m.place))
    encoder(torch.randn(6, 5, 8), torch.ones(6, 5, dtype=torch.bool), ClipDraws(3, 7, KEYS).numbers("dropout"))
    assert len(seen) == 3 * 4
    assert len(torch.cat(seen).unique()) == 3 * 4 * len(KEYS)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_share_that_is_dropped_is_the_rate(rate):
    dropout, ones = ClipDropout(rate), torch.ones(400, 1000)
    out = dropout(ones, ClipDraws(0, 0, tuple(map(str, range(400)))).numbers("dropout"))
    gone = (out == 0).double()
    assert set(out.unique().tolist()) == {0.0, (ones / (1.0 - rate))[0, 0].item()}
    assert gone.mean().item() == pytest.approx(rate, abs=5 * (rate * (1 - rate) / 400_000) ** 0.5)
    for side, count in ((0, 400), (1, 1000)):  # of each column, of each row: as for independent draws
        assert gone.mean(side).std().item() == pytest.approx((rate * (1 - rate) / count) ** 0.5, rel=0.15)
    assert dropout.eval()(ones, torch.zeros(400, dtype=torch.int64)) is ones


def test_bits_are_uniform_and_rows_unrelated():
    bits = uniform_bits(torch.arange(512), 512).double() / 2**BITS  # numbers that differ by one, as those of places do
    assert bits.mean().item() == pytest.approx(0.5, abs=0.003)
    assert bits.var().item() == pytest.approx(1 / 12, rel=0.01)
    centred = bits - 0.5
    related = (centred @ centred.T / 512 * 12).fill_diagonal_(0.0)
    assert related.abs().max().item() < 6 / 512**0.5
    assert (centred[1:, :-1] * centred[:-1, 1:]).mean().item() * 12 == pytest.approx(0.0, abs=0.01)


def test_stochastic_depth_of_a_frame_does_not_depend_on_the_others_and_is_repeated():
    torch.manual_seed(0)
    backbone = Backbone("pvt_v2_b0").double()
    frames, draws = torch.randn(6, 3, 32, 32, dtype=torch.float64), ClipDraws(3, 7, KEYS).numbers("backbone")
    paths = [module for module in backbone.modules() if isinstance(module, ClipDropPath)]
    assert (
        len({path.place for path in paths}) == len(paths) == 14
    )  # two of each of eight blocks; the first drop nothing
    for path in paths:
        path.rate = 0.5
    together = backbone(frames, draws)[-1]
    apart = [backbone(frames[rows], draws[rows])[-1] for rows in (slice(0, 1), slice(1, 6))]
    torch.testing.assert_close(torch.cat(apart), together, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(backbone(frames, draws + 1)[-1], together)
    assert not torch.allclose(backbone(frames)[-1], backbone(frames)[-1])  # without numbers torch draws
    backbone.eval()
    assert torch.equal(backbone(frames, draws)[-1], backbone(frames)[-1])
