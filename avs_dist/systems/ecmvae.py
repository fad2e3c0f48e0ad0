"""ECMVAE, the explicit conditional multimodal VAE: codes of picture, sound and what they share paint the mask.

Paper: "Multimodal Variational Auto-encoder based Audio-Visual Segmentation"; numbers of sections, equations and tables
are those of the paper. `model.compat: published_code` follows the public code where it departs from the paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from avs_dist.clip import Clip
from avs_dist.config import Config, ModelConfig
from avs_dist.draws import ClipDraws
from avs_dist.gaussian import Gaussian, Mixture
from avs_dist.modules.audio import AUDIO_CHANNELS
from avs_dist.modules.decoder import build_decoder
from avs_dist.modules.latent import Injection
from avs_dist.modules.latent_space import CodeFusion, Distribution, LatentEncoders
from avs_dist.systems.base import LatentCodes, Prediction, System
from avs_dist.systems.ecmvae_objective import Objective, Painted
from avs_dist.systems.matching import check_matching, matching_loss
from avs_dist.systems.trunk import NUM_STAGES, Existing, Trunk, build_necks

PREDICTION = -1  # the step of draws that belong to no step
COARSEST = NUM_STAGES - 1
LOGIT_EPS = 1e-6  # a mean probability of 0 or 1 gets a finite logit


class Seen(NamedTuple):
    """A batch of N existing frames before any code."""

    exist: Existing
    frames_NCHW: Tensor
    maps: list[Tensor]  # of the backbone
    audio_BTD: Tensor | None

    @property
    def audio_ND(self) -> Tensor | None:
        """For the latent encoders, which never train the audio encoder: it is frozen in the paper, and where it is not
        the losses of the codes would silence it."""
        return None if self.audio_BTD is None else self.exist.select(self.audio_BTD).detach()


class Scene(NamedTuple):
    """What a generator makes of the frames before it gets the codes."""

    features: list[Tensor]  # [B,T,C,h,w] after TPAVI; without the coarsest stage where the codes enter before TPAVI
    coarsest_NCHW: Tensor  # where the codes enter
    skips: list[Tensor]


class Generator(nn.Module):
    """p(y | x, codes): necks, injection of the codes at the coarsest stage, decoder; TPAVI belongs to the trunk."""

    def __init__(self, model: ModelConfig, in_channels: list[int]) -> None:
        super().__init__()
        channels = model.neck.channels
        self.after_tpavi = model.latent.inject == "after_tpavi"
        self.necks = build_necks(model, in_channels)
        self.fusion = CodeFusion(model.latent)
        self.injection = Injection(channels, self.fusion.out_channels)
        self.decoder = build_decoder(model.decoder.kind, channels, num_classes=1, compat=model.compat)

    def prepare(self, trunk: Trunk, seen: Seen) -> Scene:
        tokens = [neck(maps_NCHW) for neck, maps_NCHW in zip(self.necks, seen.maps, strict=True)]
        stages = range(NUM_STAGES if self.after_tpavi else COARSEST)
        features = [trunk.interact(stage, tokens[stage], seen.audio_BTD, seen.exist) for stage in stages]
        coarsest_NCHW = seen.exist.select_maps(features[COARSEST]) if self.after_tpavi else tokens[COARSEST]
        skips = self.decoder.skips([seen.exist.select_maps(f) for f in features[:COARSEST]])
        return Scene(features, coarsest_NCHW, skips)

    def paint(
        self, trunk: Trunk, seen: Seen, scene: Scene, fused: list[Tensor], noise_NKHW: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Mask logits [B,T,H,W] for fused codes, and the features of all stages as the losses get to see them."""
        coarsest_NCHW = self.injection(scene.coarsest_NCHW, torch.cat(fused, 1), noise_NKHW)
        features = scene.features
        if not self.after_tpavi:
            features = [*features, trunk.interact(COARSEST, coarsest_NCHW, seen.audio_BTD, seen.exist)]
            coarsest_NCHW = seen.exist.select_maps(features[COARSEST])
        height, width = seen.frames_NCHW.shape[-2:]
        logits_NHW = self.decoder.paint(coarsest_NCHW, scene.skips, (height, width))[:, 0].float()
        return seen.exist.restore(logits_NHW), self.decoder.seen_by_losses(features)


class ECMVAESystem(System):
    """Masks of every second from its frame, the sound, and latent codes; several draws give an uncertainty.

    All draws depend on the seed, the step and the names of the clips alone, not on batch and ranks.

    Raises:
        ValueError: settings that do not fit together, such as factorised codes without sound.
    """

    def __init__(self, config: Config, load_pretrained: bool = True) -> None:
        super().__init__()
        check_matching(config)
        self.config = config
        model, latent = config.model, config.model.latent
        self.trunk = Trunk(model, load_pretrained)
        audio_channels = AUDIO_CHANNELS if self.trunk.audio_encoder is not None else 0
        _check(config, listens=audio_channels > 0)
        variational = latent.kind == "vae"
        self.num_samples = latent.samples if variational else None
        self.prior = LatentEncoders(latent, audio_channels, posterior=False)
        self.posterior = LatentEncoders(latent, audio_channels, posterior=True) if variational else None
        if not variational:  # codes are means; what has no use gets no gradient, and no optimiser waits for one
            for name, parameter in self.prior.named_parameters():
                parameter.requires_grad_(".log_var." not in name)
        in_channels = self.trunk.backbone.channels
        self.generator = Generator(model, in_channels)
        # the public code has a second one for the posterior, the paper one p(y | x, z) for both
        separate = variational and model.compat == "published_code"
        self.posterior_generator = Generator(model, in_channels) if separate else None
        self.objective = Objective(config)

    def loss_terms(self, clip: Clip, step: int) -> dict[str, Tensor]:
        """Eq. 13: "posterior" and "prior" reconstruction, "kl" and "divergence" of the codes, "orthogonality",
        "information" and "avm", each weighted and where it is configured."""
        seen = self._see(clip)
        draws = ClipDraws(self.config.seed, step, clip.key)
        scene = self.generator.prepare(self.trunk, seen)
        prior = self._paint("prior", self.generator, seen, scene, self._codes(seen), draws)
        posterior = None
        if self.posterior is not None:
            generator = self.generator
            if self.posterior_generator is not None:
                generator = self.posterior_generator
                scene = generator.prepare(self.trunk, seen)
            masks_N1HW = seen.exist.select(posterior_masks(clip))[:, None].to(seen.frames_NCHW.dtype)
            posterior = self._paint("posterior", generator, seen, scene, self._codes(seen, masks_N1HW), draws)
        terms = self.objective(clip, seen.exist, prior, posterior, draws)
        if self.config.loss.avm != "none":
            audio = partial(self.trunk.project_audio, seen.audio_BTD)
            matching = matching_loss(self.config, clip, prior.logits_BTHW, prior.features, audio)
            terms["avm"] = self.config.loss.avm_weight * matching
        return terms

    def predict(self, clip: Clip, generator: torch.Generator | None = None) -> Prediction:
        """Mean and variance of the probability over `num_samples` draws from the prior, in eval mode (one draw has no
        variance).

        Args:
            generator: draws the seed of the codes; without it the seed of the config is used, so that the same clip
                gets the same mask again.
        """
        seed = self.config.seed
        if generator is not None:
            seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        draws = ClipDraws(seed, PREDICTION, clip.key)
        with self.evaluating():
            seen = self._see(clip)
            scene, distributions = self.generator.prepare(self.trunk, seen), self._codes(seen)

            def logits_BTHW(purpose: str) -> Tensor:
                return self._paint(purpose, self.generator, seen, scene, distributions, draws).logits_BTHW

            if self.num_samples is None:
                return Prediction(logits_BTHW("prior"))
            mean = torch.zeros_like(clip.masks_BTHW, dtype=torch.float32)
            squares = torch.zeros_like(mean)
            for count in range(1, self.num_samples + 1):  # Welford's update: one mask in memory at a time
                probability = logits_BTHW(f"prior/{count}").sigmoid()
                delta = probability - mean
                mean += delta / count
                squares += delta * (probability - mean)
            variance = squares / self.num_samples if self.num_samples > 1 else None
            return Prediction(mean.logit(LOGIT_EPS), variance)

    def latents(self, clip: Clip) -> LatentCodes:
        """Distributions of the codes, prior and (of a VAE) posterior, in eval mode without gradient."""
        with self.evaluating():
            exist = Existing(clip.valid_BT)
            seen = Seen(exist, exist.select(clip.frames_BTCHW), [], self.trunk.hear(clip, exist))
            prior, posterior = self._codes(seen), {}
            if self.posterior is not None:
                masks_N1HW = exist.select(posterior_masks(clip))[:, None].to(seen.frames_NCHW.dtype)
                posterior = self._codes(seen, masks_N1HW)
            restored = [{k: _restore(d, exist) for k, d in codes.items()} for codes in (prior, posterior)]
            return LatentCodes(*restored)

    def _see(self, clip: Clip) -> Seen:
        exist = Existing(clip.valid_BT)
        frames_NCHW = exist.select(clip.frames_BTCHW)
        return Seen(exist, frames_NCHW, self.trunk.see(clip, exist), self.trunk.hear(clip, exist))

    def _codes(self, seen: Seen, masks_N1HW: Tensor | None = None) -> dict[str, Distribution]:
        if masks_N1HW is None:
            return self.prior(seen.frames_NCHW, seen.audio_ND)
        assert self.posterior is not None
        return self.posterior(seen.frames_NCHW, seen.audio_ND, masks_N1HW)

    def _paint(
        self,
        purpose: str,
        generator: Generator,
        seen: Seen,
        scene: Scene,
        distributions: Mapping[str, Distribution],
        draws: ClipDraws,
    ) -> Painted:
        """Draw the codes and paint their masks."""
        dtype, latent = seen.frames_NCHW.dtype, self.config.model.latent
        codes = {name: self._sample(f"{purpose}/{name}", d, seen.exist, draws) for name, d in distributions.items()}
        fused = generator.fusion({name: code.to(dtype) for name, code in codes.items()})
        noise_NKHW = None
        if self.posterior is not None and latent.spatial_noise > 0:
            size = (generator.fusion.out_channels, *scene.coarsest_NCHW.shape[-2:])
            noise_BTKHW = draws.normal(f"{purpose}/space", seen.exist.shape[1], *size).to(scene.coarsest_NCHW.device)
            noise_NKHW = latent.spatial_noise * seen.exist.select(noise_BTKHW)
        logits_BTHW, features = generator.paint(self.trunk, seen, scene, fused, noise_NKHW)
        return Painted(dict(distributions), codes, fused, logits_BTHW, features)

    def _sample(self, purpose: str, distribution: Distribution, exist: Existing, draws: ClipDraws) -> Tensor:
        """[N,L]; the mean of an autoencoder."""
        if self.posterior is None:
            return distribution.mean
        mean_NL = distribution.mean
        num_frames = exist.shape[1]
        noise_BTL = draws.normal(purpose, num_frames, mean_NL.shape[1])
        choice_N = None
        if isinstance(distribution, Mixture):
            choice_N = exist.select(draws.uniform(f"{purpose}/expert", num_frames).to(mean_NL.device))
        return distribution.sample(exist.select(noise_BTL.to(mean_NL)), choice_N)


def posterior_masks(clip: Clip) -> Tensor:
    """[B,T,H,W]: each frame's own mask; one without takes that of the labelled frame before it, or else the first.

    S4 training labels the first frame only; its mask is repeated for all frames (section 4.1).
    """
    frames_T = torch.arange(clip.labelled_BT.shape[1], device=clip.labelled_BT.device)
    before_BT = torch.where(clip.labelled_BT, frames_T, -1).cummax(1).values
    first_B1 = clip.labelled_BT.int().argmax(1, keepdim=True)
    source_BT = torch.where(before_BT < 0, first_B1, before_BT)
    return (clip.masks_BTHW > 0).gather(1, source_BT[:, :, None, None].expand_as(clip.masks_BTHW))


def _restore(distribution: Distribution, exist: Existing) -> Distribution:
    if isinstance(distribution, Mixture):
        return Mixture(tuple(Gaussian(*map(exist.restore, expert)) for expert in distribution.experts))
    return Gaussian(*map(exist.restore, distribution))


def _check(config: Config, listens: bool) -> None:
    latent, loss = config.model.latent, config.loss.latent
    if not listens and (latent.factorise or latent.joint != "fused"):
        raise ValueError(
            "model.latent: without sound (model.tpavi.stages empty, or model.tpavi.key=visual) there is one code, of "
            "the picture: set model.latent.factorise=false and model.latent.joint=fused"
        )
    if latent.kind == "ae" and latent.joint != "fused":
        raise ValueError(f"model.latent.joint={latent.joint} joins distributions, and model.latent.kind=ae has none")
    if latent.joint == "moe" and (loss.divergence == "js_geometric" or config.model.compat == "published_code"):
        raise ValueError(
            "model.latent.joint=moe: a mixture has neither a geometric mean in closed form nor a place in the public "
            "code: choose loss.latent.divergence js or kl, and model.compat=paper"
        )
