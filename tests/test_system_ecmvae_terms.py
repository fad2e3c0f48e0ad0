"""Every term of ECMVAE's objective, written out anew in float64 from what its encoders, necks and heads give."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_system_ecmvae import PUBLISHED, build, ecmvae_config, exact
from test_system_tpavi import make_clip
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from avs_dist.clip import Clip
from avs_dist.config import Config, LatentConfig, LatentLossConfig, TPAVIConfig
from avs_dist.draws import ClipDraws
from avs_dist.gaussian import Gaussian
from avs_dist.losses import ecmvae_code
from avs_dist.losses.segmentation import structure_loss
from avs_dist.modules.latent_space import LatentEncoders
from avs_dist.modules.tpavi import TPAVI
from avs_dist.systems.ecmvae import ECMVAESystem, Generator

STEP, SAMPLES, DIM = 5, 2, 4
Experts = list[Normal]  # one of a Gaussian, two of a mixture


def partly_labelled_clip() -> Clip:
    """Clips with the first mask only, with masks and a second that does not exist, and without any mask."""
    clip = exact(make_clip(batch=3))
    clip.labelled_BT[:] = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]])
    clip.valid_BT[1, 2] = False
    clip.masks_BTHW[~clip.labelled_BT] = 0
    return clip


class Literal:
    """Codes and masks of all frames [B*T]; those that do not exist are computed as well, and not counted."""

    def __init__(self, system: ECMVAESystem, clip: Clip) -> None:
        self.system, self.clip, self.latent = system, clip, system.config.model.latent
        self.frames, self.pictures = clip.valid_BT.shape, clip.frames_BTCHW.flatten(0, 1)
        self.draws = ClipDraws(system.config.seed, STEP, clip.key)
        self.maps = system.trunk.backbone(self.pictures)
        self.sound = None
        if system.trunk.audio_encoder is not None:
            self.sound = system.trunk.audio_encoder(clip.mel_BTFM.flatten(0, 1))
        masks = (clip.masks_BTHW > 0).double()
        masks[0, 1:] = masks[0, 0]
        self.of = {"prior": self.encode(system.prior, None)}
        generators = {"prior": system.generator}
        if system.posterior is not None:
            self.of["posterior"] = self.encode(system.posterior, masks.flatten(0, 1)[:, None])
            generators["posterior"] = system.posterior_generator or system.generator
        self.codes: dict[str, dict[str, Tensor]] = {}
        self.fused: dict[str, list[Tensor]] = {}
        self.logits: dict[str, Tensor] = {}
        self.features: dict[str, list[Tensor]] = {}
        for path, generator in generators.items():
            self.codes[path] = {name: self.sample(path, name) for name in self.of[path]}
            self.fused[path] = list(self.codes[path].values())
            if self.latent.factorise:
                s_v, s_a, c = (self.codes[path][name] for name in ("s_v", "s_a", "c"))
                both = ((generator.fusion.visual, s_v), (generator.fusion.audio, s_a))
                self.fused[path] = [layer(torch.cat([own, c], 1)) for layer, own in both]
            self.paint(path, generator)

    def encode(self, encoders: LatentEncoders, masks: Tensor | None) -> dict[str, Experts]:
        seen = self.pictures if masks is None else torch.cat([self.pictures, masks], 1)
        if self.sound is None:
            return {"z": [normal(encoders.visual(seen))]}

        def hear(encoder: torch.nn.Module) -> Normal:
            return normal(encoder(self.sound) if masks is None else encoder(masks, self.sound))

        if self.latent.joint == "fused":
            joint = [normal(encoders.joint.fused(seen, self.sound))]
        else:
            joint = [normal(encoders.joint.visual(seen)), hear(encoders.joint.audio.encoder)]
        if self.latent.joint == "poe":
            visual, audio = joint
            precision = visual.variance**-1 + audio.variance**-1
            mean = (visual.mean / visual.variance + audio.mean / audio.variance) / precision
            joint = [Normal(mean, precision**-0.5)]
        if not self.latent.factorise:
            return {"z": joint}
        return {"s_v": [normal(encoders.visual(seen))], "s_a": [hear(encoders.audio.encoder)], "c": joint}

    def sample(self, path: str, name: str) -> Tensor:
        experts = self.of[path][name]
        if self.latent.kind == "ae":
            return experts[0].mean
        noise = self.draws.normal(f"{path}/{name}", self.frames[1], DIM).double().flatten(0, 1)
        choice = self.draws.uniform(f"{path}/{name}/expert", self.frames[1]).flatten(0, 1)
        return sampled(experts, noise, choice)

    def paint(self, path: str, generator: Generator) -> None:
        tokens = [neck(maps) for neck, maps in zip(generator.necks, self.maps, strict=True)]
        code = torch.cat(self.fused[path], 1)[:, :, None, None].expand(-1, -1, *tokens[3].shape[2:])
        if self.latent.kind == "vae" and self.latent.spatial_noise > 0:
            space = self.draws.normal(f"{path}/space", self.frames[1], *code.shape[1:]).double()
            code = code + self.latent.spatial_noise * space.flatten(0, 1)

        def inject(x: Tensor) -> Tensor:
            return generator.injection.mix(torch.cat([x, code], 1))

        if self.latent.inject == "before_tpavi":
            features = [self.interact(stage, x) for stage, x in enumerate([*tokens[:3], inject(tokens[3])])]
            painted = features
        else:
            features = [self.interact(stage, x) for stage, x in enumerate(tokens)]
            painted = [*features[:3], inject(features[3])]
        logits = generator.decoder(painted, tuple(self.pictures.shape[-2:])).logits_NKHW[:, 0]
        self.logits[path], self.features[path] = logits.unflatten(0, self.frames), features

    def interact(self, stage: int, x: Tensor) -> Tensor:
        if self.sound is None:
            return x
        sound_BTD = self.sound.unflatten(0, self.frames)
        block = self.system.trunk.blocks[str(stage)]
        return block(x.unflatten(0, self.frames), sound_BTD, self.clip.valid_BT).flatten(0, 1)

    def terms(self) -> dict[str, Tensor]:
        loss, weights = self.system.config.loss, self.system.config.loss.latent
        published = self.system.config.model.compat == "published_code"
        exist = self.clip.valid_BT.flatten()
        alpha_1 = {"prior": 1.0 - weights.posterior_share, "posterior": weights.posterior_share}
        alpha_2 = {"prior": 1.0 - weights.information_posterior_share, "posterior": weights.information_posterior_share}
        if published:
            alpha_2 = {"prior": 1.0, "posterior": 1.0}
        if self.latent.kind == "ae":
            alpha_1 = alpha_2 = {"prior": 1.0}
        want = {path: share * self.reconstruction(path, published) for path, share in alpha_1.items()}
        if "posterior" in alpha_1:
            counted = exist & torch.tensor([True] * 6 + [False] * 3)  # nothing is known of the posterior of the last
            each = {"divergence": self.divergence(weights, published)}
            if self.latent.factorise:
                each["kl"] = sum(self.kl(name, published) for name in ("s_v", "s_a"))
            want |= {k: weights.posterior_share * weights.beta * v[counted].mean() for k, v in each.items()}
        if self.latent.factorise:
            for name, weight in (("orthogonality", weights.orthogonality), ("information", weights.information)):
                of_path = getattr(self, name)
                want[name] = weight * sum(share * of_path(path, exist, published) for path, share in alpha_2.items())
        if loss.avm != "none":
            want["avm"] = loss.avm_weight * self.matching(published)
        return want

    def reconstruction(self, path: str, published: bool) -> Tensor:
        """Three frames exist and have masks."""
        counted, masks = self.clip.labelled_BT & self.clip.valid_BT, self.clip.masks_BTHW
        if self.system.config.loss.segmentation == "bce":
            return F.binary_cross_entropy_with_logits(self.logits[path][counted], (masks > 0)[counted].double())
        compare = ecmvae_code.structure_loss if published else structure_loss
        total, _ = compare(self.logits[path], masks, counted)
        return total / 3

    def kl(self, name: str, published: bool) -> Tensor:
        """KL(posterior || prior), of mixtures a mean over their experts in pairs."""
        pairs = list(zip(self.of["posterior"][name], self.of["prior"][name], strict=True))
        if published:  # exp(log-variance) as standard deviation
            pairs = [(Normal(q.mean, q.variance), Normal(p.mean, p.variance)) for q, p in pairs]
        return sum(kl_divergence(q, p).sum(1) for q, p in pairs) / len(pairs)

    def divergence(self, weights: LatentLossConfig, published: bool) -> Tensor:
        name = "c" if self.latent.factorise else "z"
        if weights.divergence == "kl":
            return self.kl(name, published)
        q, p = self.of["posterior"][name], self.of["prior"][name]
        if weights.divergence == "js_geometric":
            precision = (q[0].variance ** -1 + p[0].variance ** -1) / 2
            mean = (q[0].mean / q[0].variance + p[0].mean / p[0].variance) / 2 / precision
            middle = Normal(mean, precision**-0.5)
            return (kl_divergence(q[0], middle) + kl_divergence(p[0], middle)).sum(1) / 2
        count = 1 if published else SAMPLES
        noise = [
            self.draws.normal(f"divergence/{of}", self.frames[1], count, DIM).double().flatten(0, 1) for of in "qp"
        ]
        if published:
            at = [Gaussian(each[0].mean, each[0].variance.log()) for each in (q, p)]
            return ecmvae_code.js_divergence(*at, *(x[:, 0] for x in noise))
        choice = [self.draws.uniform(f"divergence/{of}/expert", self.frames[1], count).flatten(0, 1) for of in "qp"]
        total = 0.0
        for i in range(count):
            for experts, x, u in zip((q, p), noise, choice, strict=True):
                value = sampled(experts, x[:, i], u[:, i])
                log_q, log_p = log_density(q, value), log_density(p, value)
                log_m = torch.logaddexp(log_q, log_p) - math.log(2.0)
                # E_m[(q/m) log(q/m) + (p/m) log(p/m)] / 2, half of the samples of m from each
                total += (log_q - log_m).exp() * (log_q - log_m) + (log_p - log_m).exp() * (log_p - log_m)
        return total / (4 * count)

    def orthogonality(self, path: str, exist: Tensor, published: bool) -> Tensor:
        codes = [self.scaled(self.codes[path][name], exist) for name in ("c", "s_v", "s_a")]
        if self.system.config.loss.latent.standardise:  # squared correlations over the eight frames that exist
            pairs = itertools.combinations([code[exist] for code in codes], 2)
            return sum(torch.einsum("nk,nl->kl", a, b).div(8).square().sum() for a, b in pairs)
        c, s_v, s_a = (code.unflatten(0, self.frames) for code in codes)
        if published:
            return ecmvae_code.difference(c, [s_v, s_a], self.clip.valid_BT, lambda x: x)
        total = 0.0
        for i, valid in enumerate(self.clip.valid_BT):
            for a, b in ((c, s_a), (c, s_v), (s_a, s_v)):
                total += torch.linalg.norm(a[i, valid].T @ b[i, valid]) ** 2
        return total / 3

    def information(self, path: str, exist: Tensor, published: bool) -> Tensor:
        visual, audio = (self.scaled(code, exist) for code in self.fused[path])
        head = self.system.objective.head
        if published:
            predicted, target = head(visual, audio)
            return -ecmvae_code.log_likelihood(target, predicted)[exist].mean()
        return -normal(head(visual)).log_prob(audio).sum(1)[exist].mean()

    def scaled(self, code: Tensor, exist: Tensor) -> Tensor:
        if not self.system.config.loss.latent.standardise:
            return code
        return (code - code[exist].mean(0)) / (code[exist].var(0, correction=0) + 1e-6).sqrt()

    def matching(self, published: bool) -> Tensor:
        """ms3_kl of the masks from prior codes; the public code sums over the frames."""
        total = 0.0
        for stage in self.system.config.loss.avm_stages:
            features, block = self.features["prior"][stage], self.system.trunk.blocks[str(stage)]
            assert isinstance(block, TPAVI)
            audio = block.align(self.sound)
            if published and self.system.config.model.decoder.kind == "bilinear":
                features = F.relu(features)
            share = F.adaptive_avg_pool2d(self.logits["prior"].flatten(0, 1)[:, None], features.shape[-2:]).sigmoid()
            visual = (share * features).mean((2, 3))
            each = (audio.softmax(1) * (audio.log_softmax(1) - visual.log_softmax(1))).sum(1)[
                self.clip.valid_BT.flatten()
            ]
            total += each.sum() if published else each.mean()
        return total / len(self.system.config.loss.avm_stages)


def normal(gaussian: Gaussian) -> Normal:
    return Normal(gaussian.mean, (0.5 * gaussian.log_var).exp())


def sampled(experts: Experts, noise: Tensor, choice: Tensor) -> Tensor:
    values = [expert.mean + expert.stddev * noise for expert in experts]
    return torch.where(choice[:, None] < 0.5, values[0], values[-1])


def log_density(experts: Experts, value: Tensor) -> Tensor:
    return torch.stack([e.log_prob(value).sum(-1) for e in experts]).exp().mean(0).log()


def weighted(
    divergence: str = "js", avm: bool = False, segmentation: str = "structure", standardise: bool = False, **model
) -> Config:
    """Weights that are all different and none of them the default; `latent` holds settings of the codes."""
    latent = LatentConfig(dim=DIM, samples=1, **model.pop("latent", {}))
    loss = LatentLossConfig(divergence, SAMPLES, 0.2, 0.3, 0.002, 0.03, 0.6, standardise)
    config = ecmvae_config(latent, loss, **model)
    chosen = replace(config.loss, segmentation=segmentation)
    if avm:
        chosen = replace(chosen, avm="ms3_kl", avm_weight=0.7, avm_stages=(1, 3))
    return replace(config, loss=chosen)


PUBLIC = {"compat": "published_code"}
ONE = {"factorise": False}
BEFORE = {"inject": "before_tpavi"}
ROWS = {
    "js": weighted(),
    "js, standardised": weighted(standardise=True),
    "js, avm": weighted(avm=True),
    "js, avm, before": weighted(avm=True, latent=BEFORE),
    "js, poe": weighted(latent={"joint": "poe"}),
    "js, moe": weighted(latent={"joint": "moe"}),
    "js, one code": weighted(latent=ONE),
    "js, one code, moe, avm": weighted(latent=ONE | {"joint": "moe"}, avm=True),
    "js, picture alone": weighted(latent=ONE, tpavi=TPAVIConfig(stages=())),
    "geometric": weighted("js_geometric"),
    "geometric, one code, poe": weighted("js_geometric", latent=ONE | {"joint": "poe"}),
    "kl": weighted("kl"),
    "kl, poe": weighted("kl", latent={"joint": "poe"}),
    "kl, moe": weighted("kl", latent={"joint": "moe"}),
    "kl, one code": weighted("kl", latent=ONE),
    "kl, picture alone, bce": weighted("kl", latent=ONE, tpavi=TPAVIConfig(stages=()), segmentation="bce"),
    "autoencoder": weighted(latent={"kind": "ae"}),
    "public": weighted(**PUBLIC),
    "public, standardised": weighted(standardise=True, **PUBLIC),
    "public, avm, before": weighted(avm=True, latent=BEFORE, **PUBLIC),
    "public, kl, poe, bce": weighted("kl", latent={"joint": "poe"}, segmentation="bce", **PUBLIC),
    "public, geometric, one code, avm": weighted("js_geometric", avm=True, latent=ONE, **PUBLIC),
    "public, all of it": replace(PUBLISHED, loss=weighted(avm=True).loss),
}


@pytest.mark.parametrize("row", ROWS)
def test_terms_are_those_of_the_paper(row):
    """Eq. 3 to 13, and what the public code makes of them."""
    system, clip = wide_awake(ROWS[row]), partly_labelled_clip()
    with torch.no_grad():
        got, want = system.loss_terms(clip, STEP), Literal(system, clip).terms()
    assert set(got) == set(want)
    for name, value in want.items():
        # logits are float32, and so are features where they meet the sound; all else is float64
        rtol = 1e-5 if name in ("prior", "posterior", "avm") else 1e-9
        torch.testing.assert_close(
            got[name].double(), value.double(), rtol=rtol, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def wide_awake(config: Config) -> ECMVAESystem:
    """In eval mode and float64, where a clip's losses are those of the formulas; with codes and sounds that matter."""
    system = build(config).double()
    for block in system.trunk.blocks.values():
        torch.nn.init.normal_(block.bn_weight)
    for name, parameter in system.named_parameters():
        if "log_var" in name or "injection" in name:
            parameter.data.mul_(3.0)
    return system.eval()


def test_the_codes_do_not_train_the_audio_encoder():
    system = wide_awake(weighted())
    parameters = list(system.trunk.audio_encoder.parameters())
    terms = system.loss_terms(partly_labelled_clip(), STEP)
    codes = sum(terms[name] for name in ("kl", "divergence", "orthogonality", "information"))
    assert set(torch.autograd.grad(codes, parameters, retain_graph=True, allow_unused=True)) == {None}
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(terms["prior"], parameters))
