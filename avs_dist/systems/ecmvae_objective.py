"""The objective of ECMVAE (eq. 5-13): which losses, on what, with which weights; the losses are in avs_dist/losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from avs_dist.clip import Clip
from avs_dist.config import Config
from avs_dist.draws import ClipDraws
from avs_dist.gaussian import Gaussian, Mixture
from avs_dist.losses import ecmvae_code, latent
from avs_dist.losses.information import barber_agakov
from avs_dist.modules.latent import InformationHead, PublishedInformationHead
from avs_dist.modules.latent_space import Distribution
from avs_dist.precision import at_least_float32
from avs_dist.systems.generator import Masks
from avs_dist.systems.matching import with_mask
from avs_dist.systems.segmentation import segmentation_terms
from avs_dist.systems.trunk import Existing
from avs_dist.world import all_reduce_sum, counted_mean, global_mean

SPECIFIC = ("s_v", "s_a")


class Painted(NamedTuple):
    """One path, prior or posterior: its codes and its masks."""

    distributions: dict[str, Distribution]  # of N frames
    codes: dict[str, Tensor]  # samples [N,L]
    fused: list[Tensor]  # [sc_v, sc_a] or [z]
    masks: Masks


class Objective(nn.Module):
    """All terms but the AVM loss, weighted. It owns the heads of the information bound.

    With one code (`factorise: false`) there is neither orthogonality nor information; an autoencoder has only prior
    codes, so what is shared between posterior and prior goes to them.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.published = config.model.compat == "published_code"
        self.weights = config.loss.latent
        self.head: InformationHead | PublishedInformationHead | None = None
        if config.model.latent.factorise and self.weights.information > 0:
            dim = config.model.latent.dim
            self.head = PublishedInformationHead(dim) if self.published else InformationHead(dim)

    def forward(
        self, clip: Clip, exist: Existing, prior: Painted, posterior: Painted | None, draws: ClipDraws
    ) -> dict[str, Tensor]:
        share = self.weights.posterior_share if posterior is not None else 0.0
        terms = {"prior": (1.0 - share) * self._reconstruction(clip, prior)}
        if posterior is not None:
            terms["posterior"] = share * self._reconstruction(clip, posterior)
            terms |= {
                name: share * self.weights.beta * counted_mean(loss_N, exist.select(with_mask(clip)))
                for name, loss_N in self._divergences(prior, posterior, exist, draws).items()
            }
        if "c" in prior.codes:
            paths = self._shared_paths(prior, posterior)
            if self.weights.orthogonality > 0:
                parts = [share * self._orthogonality(path, clip, exist) for share, path in paths]
                terms["orthogonality"] = self.weights.orthogonality * torch.stack(parts).sum()
            if self.head is not None:
                every_N = exist.select(clip.valid_BT)
                parts = [share * counted_mean(-self._information(path), every_N) for share, path in paths]
                terms["information"] = self.weights.information * torch.stack(parts).sum()
        return terms

    def _shared_paths(self, prior: Painted, posterior: Painted | None) -> list[tuple[float, Painted]]:
        """Eq. 12: posterior and prior codes with their shares alpha_2; the public code sums them."""
        if posterior is None:
            return [(1.0, prior)]
        if self.published:
            return [(1.0, posterior), (1.0, prior)]
        share = self.weights.information_posterior_share
        return [(share, posterior), (1.0 - share, prior)]

    def _reconstruction(self, clip: Clip, path: Painted) -> Tensor:
        """Eq. 7, with sc_v and sc_a painting one mask together (section 3.5)."""
        return torch.stack(list(segmentation_terms(self.config, clip, path.masks).values())).sum()

    def _divergences(self, prior: Painted, posterior: Painted, exist: Existing, draws: ClipDraws) -> dict[str, Tensor]:
        """Eq. 6: KL of the specific codes, and the divergence of the shared (or only) code; each [N]."""
        kl = ecmvae_code.gaussian_kl if self.published else latent.gaussian_kl
        found = {}
        q, p = posterior.distributions, prior.distributions
        if "c" in p:
            found["kl"] = torch.stack([kl(_gaussian(q[name]), _gaussian(p[name])) for name in SPECIFIC]).sum(0)
        shared = "c" if "c" in p else "z"
        found["divergence"] = self._shared_divergence(q[shared], p[shared], kl, exist, draws)
        return found

    def _shared_divergence(
        self,
        q: Distribution,
        p: Distribution,
        kl: Callable[[Gaussian, Gaussian], Tensor],
        exist: Existing,
        draws: ClipDraws,
    ) -> Tensor:
        kind = self.weights.divergence
        if kind == "kl":
            if isinstance(q, Mixture) and isinstance(p, Mixture):
                return latent.weighted_kl(q, p)
            return kl(_gaussian(q), _gaussian(p))
        if kind == "js_geometric":
            return latent.geometric_js(_gaussian(q), _gaussian(p))
        count = 1 if self.published else self.weights.draws
        noise_q, noise_p = (self._noise(f"divergence/{name}", count, q, exist, draws) for name in ("q", "p"))
        if self.published:
            return ecmvae_code.js_divergence(_gaussian(q), _gaussian(p), noise_q[0], noise_p[0])
        if isinstance(q, Mixture):
            choices = (self._choice(f"divergence/{name}", count, q, exist, draws) for name in ("q", "p"))
            return latent.js_divergence(q, p, noise_q, noise_p, *choices)
        return latent.js_divergence(q, p, noise_q, noise_p)

    def _noise(self, purpose: str, count: int, like: Distribution, exist: Existing, draws: ClipDraws) -> Tensor:
        """Standard normal [S,N,L]."""
        noise_BTSL = draws.normal(purpose, exist.shape[1], count, like.mean.shape[1]).to(like.mean)
        return exist.select(noise_BTSL).transpose(0, 1)

    def _choice(self, purpose: str, count: int, like: Distribution, exist: Existing, draws: ClipDraws) -> Tensor:
        """Uniform [S,N]."""
        choice_BTS = draws.uniform(f"{purpose}/expert", exist.shape[1], count).to(like.mean)
        return exist.select(choice_BTS).transpose(0, 1)

    def _orthogonality(self, path: Painted, clip: Clip, exist: Existing) -> Tensor:
        """Eq. 9, a mean over clips; or the correlations of standardised codes."""
        codes = [self._scaled(path.codes[name]) for name in ("c", *SPECIFIC)]
        if self.weights.standardise:
            return latent.correlation(codes, all_reduce_sum)
        shared_BTL, *specific = map(exist.restore, codes)
        if self.published:
            return ecmvae_code.difference(shared_BTL, specific, clip.valid_BT, all_reduce_sum)
        loss_B = latent.orthogonality([shared_BTL, *specific], clip.valid_BT)
        return global_mean(loss_B.sum(), loss_B.new_full((), float(len(loss_B))))

    def _information(self, path: Painted) -> Tensor:
        """Eq. 11 with H(SC^a) taken as a constant (0), as the paper does: log q(sc_a | sc_v) of each frame."""
        visual_NL, audio_NL = map(self._scaled, path.fused)
        if isinstance(self.head, PublishedInformationHead):
            predicted, target_NL = self.head(visual_NL, audio_NL)
            return ecmvae_code.log_likelihood(target_NL, predicted)
        assert self.head is not None
        predicted = self.head(visual_NL)
        return barber_agakov(audio_NL.to(predicted.mean.dtype), predicted)

    def _scaled(self, code_NL: Tensor) -> Tensor:
        """The code as it is (paper), or standardised. Information does not change with an invertible map of the codes;
        what stands for it, with a constant entropy, does."""
        if not self.weights.standardise:
            return code_NL
        precise_NL = at_least_float32(code_NL)
        return latent.standardised(precise_NL, all_reduce_sum)


def _gaussian(distribution: Distribution) -> Gaussian:
    assert isinstance(distribution, Gaussian)
    return distribution
