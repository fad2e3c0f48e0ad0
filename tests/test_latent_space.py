"""Which encoders give the codes of ECMVAE, what each of them sees and hears, and what the decoder gets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from avs_dist.config import LatentConfig
from avs_dist.gaussian import Gaussian, Mixture
from avs_dist.modules.latent import AudioEncoder, FusedEncoder, VisualEncoder
from avs_dist.modules.latent_space import CodeFusion, Distribution, LatentEncoders

FRAMES, AUDIO, DIM = 3, 6, 4


def encoders(posterior: bool, audio_channels: int = AUDIO, **latent: object) -> LatentEncoders:
    return LatentEncoders(LatentConfig(dim=DIM, **latent), audio_channels, posterior).double().eval()


def inputs(posterior: bool) -> dict[str, Tensor]:
    torch.manual_seed(1)
    given = {
        "picture": torch.randn(FRAMES, 3, 32, 32, dtype=torch.float64),
        "sound": torch.randn(FRAMES, AUDIO, dtype=torch.float64),
    }
    if posterior:
        given["mask"] = torch.randint(0, 2, (FRAMES, 1, 32, 32)).double()
    return given


def codes(of: LatentEncoders, given: dict[str, Tensor]) -> dict[str, Distribution]:
    with torch.no_grad():
        return of(given["picture"], given["sound"], given.get("mask"))


def parameters(distribution: Distribution) -> Tensor:
    """Means and log-variances of all experts [N,2*L*experts]."""
    experts = distribution.experts if isinstance(distribution, Mixture) else (distribution,)
    return torch.cat([part for expert in experts for part in expert], 1)


def seen_by(of: LatentEncoders, posterior: bool) -> dict[str, set[str]]:
    """Which inputs each code depends on."""
    given = inputs(posterior)
    before, seen = codes(of, given), {}
    for name in given:
        after = codes(of, given | {name: 1.0 - given[name]})
        for code in before:
            if not torch.equal(parameters(after[code]), parameters(before[code])):
                seen.setdefault(code, set()).add(name)
    return seen


@pytest.mark.parametrize("posterior", [False, True])
@pytest.mark.parametrize("joint", ["fused", "poe", "moe"])
def test_every_code_sees_and_hears_what_the_paper_says(joint, posterior):
    mask = {"mask"} if posterior else set()
    want = {"s_v": {"picture"} | mask, "s_a": {"sound"} | mask, "c": {"picture", "sound"} | mask}
    assert seen_by(encoders(posterior, joint=joint), posterior) == want
    assert seen_by(encoders(posterior, joint=joint, factorise=False), posterior) == {"z": want["c"]}


@pytest.mark.parametrize("posterior", [False, True])
def test_without_sound_there_is_one_code_of_the_picture(posterior):
    of, given = encoders(posterior, audio_channels=0, factorise=False), inputs(posterior)
    (name, code), *others = of(given["picture"], None, given.get("mask")).items()
    assert (name, others) == ("z", [])
    seen = torch.cat([given[k] for k in ("picture", "mask") if k in given], 1)
    assert torch.equal(parameters(code), parameters(of.visual(seen)))


@pytest.mark.parametrize("posterior", [False, True])
def test_a_product_multiplies_the_densities_of_both_experts_once(posterior):
    of, given = encoders(posterior, joint="poe"), inputs(posterior)
    c = codes(of, given)["c"]
    visual, audio = experts(of, given)
    points = torch.randn(50, FRAMES, DIM, dtype=torch.float64)
    # the density of the product is the product of the densities, but for a factor that is the same at all points
    ratio = density(c, points) - density(visual, points) - density(audio, points)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


@pytest.mark.parametrize("posterior", [False, True])
def test_a_mixture_draws_from_either_expert(posterior):
    of, given = encoders(posterior, joint="moe"), inputs(posterior)
    c = codes(of, given)["c"]
    assert isinstance(c, Mixture)
    noise = torch.randn(FRAMES, DIM, dtype=torch.float64)
    for expert, choice in zip(experts(of, given), (0.2, 0.7), strict=True):
        want = expert.mean + (expert.log_var / 2).exp() * noise
        torch.testing.assert_close(c.sample(noise, torch.full((FRAMES,), choice)), want)


def experts(of: LatentEncoders, given: dict[str, Tensor]) -> tuple[Gaussian, Gaussian]:
    """Of the shared code: the picture's (with the mask), and the sound's (with the mask)."""
    mask, hears = given.get("mask"), of.joint.audio.encoder
    with torch.no_grad():
        if mask is None:
            return of.joint.visual(given["picture"]), hears(given["sound"])
        return of.joint.visual(torch.cat([given["picture"], mask], 1)), hears(mask, given["sound"])


def density(gaussian: Gaussian, points: Tensor) -> Tensor:
    return Normal(gaussian.mean, (gaussian.log_var / 2).exp()).log_prob(points)


def kinds(of: nn.Module) -> dict[str, type]:
    return {
        name: type(m) for name, m in of.named_modules() if isinstance(m, VisualEncoder | AudioEncoder | FusedEncoder)
    }


def test_only_encoders_that_are_used_are_built():
    specific = {"visual": VisualEncoder, "audio.encoder": AudioEncoder}
    joint = {"joint.visual": VisualEncoder, "joint.audio.encoder": AudioEncoder}
    assert kinds(encoders(False)) == specific | {"joint.fused": FusedEncoder}
    assert kinds(encoders(False, joint="moe")) == specific | joint
    assert kinds(encoders(False, factorise=False)) == {"joint.fused": FusedEncoder}
    assert kinds(encoders(False, audio_channels=0, factorise=False)) == {"visual": VisualEncoder}
    assert kinds(encoders(True, factorise=False, joint="poe")) == joint | {"joint.audio.encoder": FusedEncoder}
    assert kinds(encoders(True)) == specific | {"audio.encoder": FusedEncoder, "joint.fused": FusedEncoder}


def test_each_specific_code_meets_the_shared_one():
    fusion = CodeFusion(LatentConfig(dim=DIM)).double()
    s_v, s_a, c = torch.randn(3, FRAMES, DIM, dtype=torch.float64)
    got = fusion({"c": c, "s_a": s_a, "s_v": s_v})
    for sc, layer, own in zip(got, (fusion.visual, fusion.audio), (s_v, s_a), strict=True):
        own_LL, shared_LL = layer.weight[:, :DIM], layer.weight[:, DIM:]
        torch.testing.assert_close(sc, own @ own_LL.T + c @ shared_LL.T + layer.bias)
    assert fusion.out_channels == 2 * DIM


def test_one_code_goes_to_the_decoder_as_it_is():
    fusion = CodeFusion(LatentConfig(dim=DIM, factorise=False))
    z = torch.randn(FRAMES, DIM)
    (got,) = fusion({"z": z})
    assert got is z
    assert fusion.out_channels == DIM
    assert list(fusion.parameters()) == []
