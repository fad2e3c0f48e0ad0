"""Contrastive latent diffusion: a code of the mask is denoised from picture and sound, and helps to paint the mask.

Papers: "Contrastive Conditional Latent Diffusion for Audio-visual Segmentation" (first version) and "... with
Contrastive Learning" (second version); numbers of sections, equations and tables are those of the second version.
There is no public code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from avs_dist.clip import Clip
from avs_dist.config import Config, DiffusionConfig
from avs_dist.draws import ClipDraws
from avs_dist.losses.latent import standardised
from avs_dist.modules.audio import AUDIO_CHANNELS
from avs_dist.modules.denoiser import DDIMSampler, Denoiser
from avs_dist.modules.diffusion_latent import ConditionEncoder, LatentExpansion, MaskEncoder
from avs_dist.modules.noise_schedule import linear_betas
from avs_dist.semantic import picture_channels
from avs_dist.systems.averaging import average
from avs_dist.systems.base import Prediction, System
from avs_dist.systems.code_rows import CodeRows
from avs_dist.systems.contrast import contrast
from avs_dist.systems.generator import Generator, Masks, Seen, posterior_pictures, see_and_hear
from avs_dist.systems.matching import check_matching, matching_terms, with_mask
from avs_dist.systems.segmentation import check_segmentation, segmentation_terms
from avs_dist.systems.trunk import Trunk
from avs_dist.world import all_reduce_sum, counted_mean


class Denoised(NamedTuple):
    """One step of denoising in training."""

    code_RD: Tensor  # the estimate that the decoder gets
    output_RD: Tensor
    target_RD: Tensor


class DiffusionSystem(System):
    """Masks of every second from its frame, the sound, and a latent code that is sampled by diffusion.

    All draws depend on the seed, the step and the names of the clips alone, not on batch and ranks.

    Raises:
        ValueError: settings that do not fit together, such as a condition on sound where nothing listens.
    """

    def __init__(self, config: Config, load_pretrained: bool = True) -> None:
        super().__init__()
        check_matching(config)
        check_segmentation(config)
        self.config = config
        model, diffusion = config.model, config.model.diffusion
        self.trunk = Trunk(model, load_pretrained)
        _check(config, listens=self.trunk.audio_encoder is not None)
        self.num_samples = diffusion.samples
        self.mask_encoder = MaskEncoder(picture_channels(model.num_classes), diffusion.dim, diffusion.hidden)
        self.condition_encoder = ConditionEncoder(diffusion.condition, AUDIO_CHANNELS, diffusion.dim, diffusion.hidden)
        self.denoiser = Denoiser(diffusion.dim, self.condition_encoder.out_features, diffusion.widths, diffusion.skips)
        self.generator = Generator(model, self.trunk, LatentExpansion(model.neck.channels, diffusion.dim))
        self.sampler = build_sampler(diffusion)

    def loss_terms(self, clip: Clip, step: int) -> dict[str, Tensor]:
        """Eq. 12: the segmentation loss under its name, "denoising", "contrastive", and "avm" and "mix" where they
        are configured."""
        draws = ClipDraws(self.config.seed, step, clip.key)
        seen = see_and_hear(self.trunk, clip, draws)
        weights = self.config.loss.diffusion
        rows = CodeRows(self.config.model.diffusion.per, seen.exist, with_mask(clip))
        scene = self.generator.prepare(self.trunk, seen)
        condition_RE = self._condition(seen, rows)
        code_RD = self._true_code(clip, seen, rows)
        denoised = self._denoise_once(code_RD, condition_RE, rows, draws)
        painted_RD = self._mix_in_samples(denoised.code_RD, condition_RE, rows, draws)
        masks = self.generator.paint(self.trunk, seen, scene, rows.spread(painted_RD))
        terms = segmentation_terms(self.config, clip, masks)
        # eq. 8 is a squared norm; taken as a mean over its D numbers, as is usual, so that D does not weight it
        loss_R = (denoised.output_RD - denoised.target_RD).square().mean(1)
        counted_R = rows.counted_R
        terms["denoising"] = weights.denoising * counted_mean(loss_R, counted_R)
        self.observe("code_std", _deviation(code_RD[counted_R]))
        if weights.contrastive > 0:
            found = contrast(weights, code_RD[counted_R], condition_RE[counted_R], rows.clip_R[counted_R])
            terms["contrastive"] = weights.contrastive * found.loss
            self.observe("score_positive", found.positive)
            self.observe("score_negative", found.negative)
        return terms | matching_terms(self.config, clip, masks, self.trunk, seen)

    def predict(self, clip: Clip, generator: torch.Generator | None = None) -> Prediction:
        """Mean and variance of the probability over `num_samples` sampled codes, in eval mode (one has no variance).

        Args:
            generator: draws the seed of the noise; without it the seed of the config is used, so that the same clip
                gets the same mask again.
        """
        draws = ClipDraws.for_prediction(self.config.seed, clip.key, generator)
        assert self.num_samples is not None
        with self.evaluating():
            seen = see_and_hear(self.trunk, clip)
            rows = CodeRows(self.config.model.diffusion.per, seen.exist, clip.valid_BT)
            scene, condition_RE = self.generator.prepare(self.trunk, seen), self._condition(seen, rows)
            purposes = [f"noise/{number}" for number in range(1, self.num_samples + 1)]
            codes = self._sample(condition_RE, rows, draws, purposes)  # of all draws in one go

            def paint(number: int) -> Masks:
                return self.generator.paint(self.trunk, seen, scene, rows.spread(codes[number - 1]))

            return average(paint, self.num_samples, clip.valid_BT)

    def _condition(self, seen: Seen, rows: CodeRows) -> Tensor:
        """c = E_psi(picture, sound) [R,E]."""
        return rows.reduce(self.condition_encoder(seen.frames_NCHW, seen.audio_ND))

    def _true_code(self, clip: Clip, seen: Seen, rows: CodeRows) -> Tensor:
        """z_0 = E_phi(mask) [R,D]; rubbish at rows without a mask."""
        pictures_NCHW = posterior_pictures(clip, seen, self.config.model.num_classes)
        code_RD = rows.reduce(self.mask_encoder(pictures_NCHW))
        if self.config.model.diffusion.normalise:
            return standardised(code_RD, all_reduce_sum, rows.counted_R)
        return code_RD

    def _denoise_once(self, code_RD: Tensor, condition_RE: Tensor, rows: CodeRows, draws: ClipDraws) -> Denoised:
        """Noise of a random level, and the code estimated from one look at it (section III-A)."""
        schedule, prediction = self.sampler.noise_schedule, self.config.model.diffusion.prediction
        level_R = (rows.draw(draws.uniform, "level") * len(schedule.alphas_cumprod)).long()
        noise_RD = rows.draw(draws.normal, "noise", code_RD.shape[1]).to(code_RD.dtype)
        noisy_RD = schedule.add_noise(code_RD, noise_RD, level_R)
        output_RD = self.denoiser(noisy_RD, condition_RE, level_R)
        estimate_RD = schedule.estimate_x0(noisy_RD, output_RD, level_R, prediction)
        if self.sampler.clip is not None:
            estimate_RD = estimate_RD.clamp(-self.sampler.clip, self.sampler.clip)
        return Denoised(estimate_RD, output_RD, schedule.target(code_RD, noise_RD, level_R, prediction))

    def _mix_in_samples(self, code_RD: Tensor, condition_RE: Tensor, rows: CodeRows, draws: ClipDraws) -> Tensor:
        """Some clips get the code that a prediction would give them, so that the decoder learns to live with it."""
        share = self.config.model.diffusion.sampled_share
        if share == 0:
            return code_RD
        with torch.no_grad():
            sampled_RD = self._sample(condition_RE.detach(), rows, draws, ["sampled"])[0]
        chosen_R = rows.draw_of_clip(draws.uniform, "sampled/share") < share
        return torch.where(chosen_R[:, None], sampled_RD, code_RD)

    def _sample(
        self, condition_RE: Tensor, rows: CodeRows, draws: ClipDraws, purposes: list[str]
    ) -> tuple[Tensor, ...]:
        """Codes [R,D] from p(z_0 | c), one for each purpose (eq. 7, by DDIM)."""
        dim, steps, dtype = self.config.model.diffusion.dim, len(self.sampler.timesteps), condition_RE.dtype
        noise_BD = torch.cat([rows.draw(draws.normal, purpose, dim) for purpose in purposes]).to(dtype)
        step_noise_SBD = None
        if self.sampler.eta > 0:
            each = [rows.draw(draws.normal, f"{purpose}/steps", steps, dim) for purpose in purposes]
            step_noise_SBD = torch.cat(each).transpose(0, 1).to(dtype)
        condition_BE = condition_RE.repeat(len(purposes), 1)
        codes_BD = self.sampler.sample(self.denoiser, condition_BE, noise_BD=noise_BD, step_noise_SBD=step_noise_SBD)
        return codes_BD.chunk(len(purposes))


def build_sampler(config: DiffusionConfig) -> DDIMSampler:
    """The sampler of model.diffusion."""
    beta_start, beta_end = linear_betas(config.train_steps)
    return DDIMSampler(
        config.train_steps,
        config.steps,
        config.schedule,
        prediction=config.prediction,
        spacing=config.spacing,
        eta=config.eta,
        clip=config.clip,
        beta_start=beta_start,
        beta_end=beta_end,
    )


def set_num_steps(system: System, num_steps: int) -> None:
    """How many denoising steps a prediction of `system` makes.

    Raises:
        ValueError: the system does not denoise, or has fewer noise levels than that.
    """
    if not isinstance(system, DiffusionSystem):
        raise ValueError(f"steps {num_steps}: {type(system).__name__} does not denoise")
    system.sampler = build_sampler(replace(system.config.model.diffusion, steps=num_steps))


def _deviation(code_MD: Tensor) -> Tensor:
    """Standard deviation of the codes of all ranks, a mean over dimensions: it shows drift of their scale."""
    code_MD = code_MD.detach()
    count = all_reduce_sum(code_MD.new_full((), float(len(code_MD)))).clamp_min(1.0)
    sums_2D = all_reduce_sum(torch.stack([code_MD.sum(0), code_MD.square().sum(0)])) / count
    return (sums_2D[1] - sums_2D[0].square()).clamp_min(0).sqrt().mean()


def _check(config: Config, listens: bool) -> None:
    condition = config.model.diffusion.condition
    if not listens and condition in ("audio", "audio_visual"):
        raise ValueError(
            f"model.diffusion.condition={condition}: without sound (model.tpavi.stages empty, or "
            "model.tpavi.key=visual) it can be visual or none"
        )
    if condition == "none" and config.loss.diffusion.contrastive > 0:
        raise ValueError("model.diffusion.condition=none leaves nothing to contrast: set loss.diffusion.contrastive=0")
    if config.model.compat == "published_code":
        raise ValueError("model.compat=published_code: latent diffusion has no public code to follow")
