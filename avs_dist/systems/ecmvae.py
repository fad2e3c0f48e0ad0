"""ECMVAE, the explicit conditional multimodal VAE: codes of picture, sound and what they share paint the mask.

Paper: "Multimodal Variational Auto-encoder based Audio-Visual Segmentation"; numbers of sections, equations and tables
are those of the paper. `model.compat: published_code` follows the public code where it departs from the paper.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from avs_dist.clip import Clip
from avs_dist.config import Config, ModelConfig
from avs_dist.draws import ClipDraws
from avs_dist.gaussian import Gaussian, Mixture
from avs_dist.modules.audio import AUDIO_CHANNELS
from avs_dist.modules.latent import Injection
from avs_dist.modules.latent_space import CodeFusion, Distribution, LatentEncoders
from avs_dist.semantic import picture_channels
from avs_dist.systems.averaging import average
from avs_dist.systems.base import LatentCodes, Prediction, System
from avs_dist.systems.ecmvae_objective import Objective, Painted
from avs_dist.systems.generator import Generator, Masks, Scene, Seen, posterior_pictures, see_and_hear
from avs_dist.systems.matching import check_matching, matching_terms
from avs_dist.systems.segmentation import check_segmentation
from avs_dist.systems.trunk import Existing, Trunk


class CodeGenerator(Generator):
    """p(y | x, codes) that first joins the codes to what the decoder gets."""

    def __init__(self, model: ModelConfig, trunk: Trunk) -> None:
        fusion = CodeFusion(model.latent)
        injection = Injection(model.neck.channels, fusion.out_channels)
        super().__init__(model, trunk, injection, after_tpavi=model.latent.inject == "after_tpavi")
        self.fusion = fusion


class ECMVAESystem(System):
    """Masks of every second from its frame, the sound, and latent codes; several draws give an uncertainty.

    All draws depend on the seed, the step and the names of the clips alone, not on batch and ranks.

    Raises:
        ValueError: settings that do not fit together, such as factorised codes without sound.
    """

    def __init__(self, config: Config, load_pretrained: bool = True) -> None:
        super().__init__()
        check_matching(config)
        check_segmentation(config)
        self.config = config
        model, latent = config.model, config.model.latent
        self.trunk = Trunk(model, load_pretrained)
        audio_channels = AUDIO_CHANNELS if self.trunk.audio_encoder is not None else 0
        _check(config, listens=audio_channels > 0)
        variational = latent.kind == "vae"
        self.num_samples = latent.samples if variational else None
        self.prior = LatentEncoders(latent, audio_channels)
        mask_channels = picture_channels(model.num_classes)
        self.posterior = LatentEncoders(latent, audio_channels, mask_channels) if variational else None
        if not variational:  # codes are means; what has no use gets no gradient, and no optimiser waits for one
            for name, parameter in self.prior.named_parameters():
                parameter.requires_grad_(".log_var." not in name)
        self.generator = CodeGenerator(model, self.trunk)
        # the public code has a second one for the posterior, the paper one p(y | x, z) for both
        separate = variational and model.compat == "published_code"
        self.posterior_generator = CodeGenerator(model, self.trunk) if separate else None
        self.objective = Objective(config)

    def loss_terms(self, clip: Clip, step: int) -> dict[str, Tensor]:
        """Eq. 13: "posterior" and "prior" reconstruction, "kl" and "divergence" of the codes, "orthogonality",
        "information" and "avm", each weighted and where it is configured."""
        draws = ClipDraws(self.config.seed, step, clip.key)
        seen = see_and_hear(self.trunk, clip, draws)
        scene = self.generator.prepare(self.trunk, seen)
        prior = self._paint("prior", self.generator, seen, scene, self._prior_codes(seen), draws)
        posterior = None
        if self.posterior is not None:
            generator = self.generator
            if self.posterior_generator is not None:
                generator = self.posterior_generator
                scene = generator.prepare(self.trunk, seen)
            codes = self._posterior_codes(clip, seen)
            posterior = self._paint("posterior", generator, seen, scene, codes, draws)
        terms = self.objective(clip, seen.exist, prior, posterior, draws)
        return terms | matching_terms(self.config, clip, prior.masks, self.trunk, seen)

    def predict(self, clip: Clip, generator: torch.Generator | None = None) -> Prediction:
        """Mean and variance of the probability over `num_samples` draws from the prior, in eval mode (one draw has no
        variance).

        Args:
            generator: draws the seed of the codes; without it the seed of the config is used, so that the same clip
                gets the same mask again.
        """
        draws = ClipDraws.for_prediction(self.config.seed, clip.key, generator)
        with self.evaluating():
            seen = see_and_hear(self.trunk, clip)
            scene, codes = self.generator.prepare(self.trunk, seen), self._prior_codes(seen)

            def paint(number: int) -> Masks:
                purpose = "prior" if self.num_samples is None else f"prior/{number}"
                return self._paint(purpose, self.generator, seen, scene, codes, draws).masks

            return average(paint, self.num_samples or 1, clip.valid_BT)

    def latents(self, clip: Clip) -> LatentCodes:
        """Distributions of the codes, prior and (of a VAE) posterior, in eval mode without gradient."""
        with self.evaluating():
            exist = Existing(clip.valid_BT)
            seen = Seen(exist, exist.select(clip.normalised_BTCHW), [], self.trunk.hear(clip, exist))
            codes = (self._prior_codes(seen), self._posterior_codes(clip, seen) if self.posterior is not None else {})
            return LatentCodes(*({name: _restore(d, exist) for name, d in each.items()} for each in codes))

    def _prior_codes(self, seen: Seen) -> dict[str, Distribution]:
        return self.prior(seen.frames_NCHW, seen.audio_ND)

    def _posterior_codes(self, clip: Clip, seen: Seen) -> dict[str, Distribution]:
        assert self.posterior is not None
        pictures_NCHW = posterior_pictures(clip, seen, self.config.model.num_classes)
        return self.posterior(seen.frames_NCHW, seen.audio_ND, pictures_NCHW)

    def _paint(
        self,
        purpose: str,
        generator: CodeGenerator,
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
        masks = generator.paint(self.trunk, seen, scene, torch.cat(fused, 1), noise_NKHW)
        return Painted(dict(distributions), codes, fused, masks)

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
