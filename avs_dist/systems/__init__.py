"""Published systems, one file each, behind the System protocol."""

from __future__ import annotations

from avs_dist.config import Config
from avs_dist.systems.base import System


def build_system(config: Config, load_pretrained: bool = True) -> System:
    """The system that `config.model.system` names, with its losses, in training mode.

    Args:
        load_pretrained: read the weights files that the config names; False where a checkpoint is loaded afterwards,
            so that predicting needs no other file than the checkpoint.

    Raises:
        ValueError, FileNotFoundError: settings that do not fit together, or weights files that are missing.
    """
    # imported here, so that importing the protocol stays light
    if config.model.system == "ecmvae":
        from avs_dist.systems.ecmvae import ECMVAESystem

        return ECMVAESystem(config, load_pretrained)
    if config.model.system == "diffusion":
        from avs_dist.systems.diffusion import DiffusionSystem

        return DiffusionSystem(config, load_pretrained)
    if config.model.system == "unicode":
        from avs_dist.systems.unicode import UnicodeSystem

        return UnicodeSystem(config, load_pretrained)
    if config.model.system == "query":
        from avs_dist.systems.query import QuerySystem

        return QuerySystem(config, load_pretrained)
    from avs_dist.systems.tpavi import TPAVISystem

    return TPAVISystem(config, load_pretrained)
