"""Settings of the network, as frozen dataclasses; part of `avs_dist.config`, which shows them all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


def at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{key}={value}: must be at least {least}")


def share(key: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{key}={value}: must be from 0 to 1")


@dataclass(frozen=True)
class BackboneConfig:
    """Visual backbone, any timm model that supports features_only.

    Args:
        name: timm model name; the papers use pvt_v2_b5 and resnet50.
        weights: "none", "hub" (ImageNet weights through timm), or a local .safetensors/.pth file.
    """

    name: str = "pvt_v2_b5"
    weights: str = "none"


@dataclass(frozen=True)
class AudioConfig:
    """Audio encoder: one vector of 128 numbers for each second.

    Args:
        kind: "vggish" (frozen, needs weights) or "logmel_cnn" (small, trained from scratch).
        weights: Local VGGish weights file (.safetensors or .pth state dict).
    """

    kind: Literal["vggish", "logmel_cnn"] = "vggish"
    weights: str | None = None


@dataclass(frozen=True)
class NeckConfig:
    """Channel reduction after each backbone stage.

    Args:
        kind: "dilated" (TPAVI paper: sum of four dilated 3x3 convolutions), "one_layer" (ECMVAE paper: one 3x3
            convolution) or "three_layer" (public ECMVAE code: 1x1, 3x3, 3x3, each with batch normalisation).
        channels: Output channels of every stage (TPAVI paper: 256, ECMVAE: 128).
    """

    kind: Literal["dilated", "one_layer", "three_layer"] = "dilated"
    channels: int = 256


@dataclass(frozen=True)
class DecoderConfig:
    """From the four stages to mask logits.

    Args:
        kind: "bilinear" (TPAVI paper), "nearest" (public ECMVAE code: batch normalisation, nearest enlargement) or
            "transformer" (AVSegFormer: queries that hear the sound attend to the picture).
        queries: Queries of the transformer (AVSegFormer: 300).
        layers: Layers of its encoder, and of its decoder (AVSegFormer: 6).
        heads: Attention heads of each of them (AVSegFormer: 8).
    """

    kind: Literal["bilinear", "nearest", "transformer"] = "bilinear"
    queries: int = 300
    layers: int = 6
    heads: int = 8

    def __post_init__(self) -> None:
        for name in ("queries", "layers", "heads"):
            at_least(f"model.decoder.{name}", getattr(self, name), 1)


@dataclass(frozen=True)
class TPAVIConfig:
    """Temporal pixel-wise audio-visual interaction.

    Args:
        stages: Backbone stages that carry a TPAVI block (0 is the finest); empty = no audio, but for what the
            transformer decoder hears.
        time_aligned: Learn a T x T mixing of the scores, so that a pixel knows its own second (ours).
        key: Attend to audio (paper: va), to visual tokens (vv), or the mean of both.
        implementation: "auto" (the fastest there is: Triton on a GPU, torch elsewhere), or one of the same result:
            "triton", "rank_t" (the same form in torch), "literal" (the published N x N formula).
        l2_normalise: Normalise tokens and audio over the channels first, as ECMVAE does.
        align_audio: Project the audio to the channels of the tokens (published); false needs 128 channels.
    """

    stages: tuple[int, ...] = (0, 1, 2, 3)
    time_aligned: bool = False
    key: Literal["audio", "visual", "both"] = "audio"
    implementation: Literal["auto", "triton", "rank_t", "literal"] = "auto"
    l2_normalise: bool = False
    align_audio: bool = True


@dataclass(frozen=True)
class LatentConfig:
    """Latent codes of ECMVAE, for every frame.

    Args:
        kind: "vae" (paper), or "ae": the codes are features, with neither posterior nor sampling (Table 3).
        factorise: Codes of the picture, the sound and what they share (s_v, s_a, c); false: one code (Table 3).
        dim: Numbers in each code, L (paper: 16).
        joint: How the shared code hears both modalities: "fused" features (paper), or a Gaussian of each joined by
            their product ("poe") or mixture ("moe") (Table 4).
        inject: Where the codes enter the coarsest stage: "after_tpavi" (paper) or "before_tpavi" (public code).
        spatial_noise: Standard deviation of the noise added to the codes at each position ("sampling" in Fig. 1; the
            paper gives no number, the public code has none).
        samples: Draws from the prior that a prediction averages.
    """

    kind: Literal["vae", "ae"] = "vae"
    factorise: bool = True
    dim: int = 16
    joint: Literal["fused", "poe", "moe"] = "fused"
    inject: Literal["after_tpavi", "before_tpavi"] = "after_tpavi"
    spatial_noise: float = 0.1
    samples: int = 8

    def __post_init__(self) -> None:
        for name in ("dim", "samples"):
            at_least(f"model.latent.{name}", getattr(self, name), 1)
        at_least("model.latent.spatial_noise", self.spatial_noise, 0)


@dataclass(frozen=True)
class DiffusionConfig:
    """Latent diffusion (contrastive latent diffusion AVS); the names in brackets are those of the paper.

    Args:
        dim: Numbers in a latent code, D (paper: 24).
        per: A code for each "frame", or one for the whole "clip" (the paper does not say).
        condition: What the denoiser is told (Table IV).
        hidden: Width between the two fully connected layers of each encoder.
        widths: Outputs of all layers of the denoiser but the last; the paper has eight layers, no widths.
        skips: Links from the encoder half of the denoiser to its decoder half.
        prediction: What the denoiser predicts: the noise ("eps", paper), the velocity ("v") or the code ("x0").
        schedule: Of the noise: "cosine" (paper) or "linear".
        train_steps: Noise levels, K (paper: 20; 50 in its Fig. 5).
        steps: DDIM steps of a prediction (paper: 10).
        spacing: Which of the K levels the steps visit: "leading" (as in the DDIM paper) begins below the noisiest,
            the farther the fewer steps; "trailing" begins with pure noise, where an error of "eps" is multiplied by
            some hundred: take it with "v" or "x0".
        eta: Noise added in sampling: 0 = DDIM, 1 = DDPM.
        clip: Bound of the estimated code, or none.
        normalise: Zero mean and unit variance of the codes over the global batch (with accumulation: micro-batch),
            against drift of their scale (ours).
        sampled_share: Share of the training clips whose masks are painted from a code sampled as in a prediction,
            without the true mask (ours; paper: 0).
        samples: Draws that a prediction averages; with one there is no uncertainty.
    """

    dim: int = 24
    per: Literal["frame", "clip"] = "frame"
    condition: Literal["audio_visual", "audio", "visual", "none"] = "audio_visual"
    hidden: int = 256
    widths: tuple[int, ...] = (512, 512, 512, 512, 512, 512, 512)
    skips: bool = False
    prediction: Literal["eps", "v", "x0"] = "eps"
    schedule: Literal["cosine", "linear"] = "cosine"
    train_steps: int = 20
    steps: int = 10
    spacing: Literal["leading", "trailing"] = "leading"
    eta: float = 0.0
    clip: float | None = None
    normalise: bool = False
    sampled_share: float = 0.0
    samples: int = 1

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "train_steps", "steps", "samples"):
            at_least(f"model.diffusion.{name}", getattr(self, name), 1)
        for name in ("eta", "sampled_share"):
            share(f"model.diffusion.{name}", getattr(self, name))


@dataclass(frozen=True)
class CodebookConfig:
    """Codebook that the modalities share (Uni-Code, section 4.3); it learns by a moving average, not by gradient.

    Args:
        num_codes: L (paper: 400).
        decay: Of the moving average (gamma).
        update: All modalities at once ("joint", eq. 7), or one after the other ("sequential", public code).
        teacher: What a token is averaged with in the update: what "cross_attention" finds in the other modalities
            (paper), their tokens of the same second ("time_aligned", public code), or "none" (without MM-EMA).
        cross_commitment: Weight of the other modalities' codes in the commitment loss, relative to the own (eq. 8).
        reset_after: Batches after which an unused code is re-initialised (N_re); 0 = never.
        reset_rule: A code is in use while every modality chooses it ("all", paper), or while any does ("any", public
            code).
    """

    num_codes: int = 400
    decay: float = 0.99
    update: Literal["joint", "sequential"] = "joint"
    teacher: Literal["cross_attention", "time_aligned", "none"] = "cross_attention"
    cross_commitment: float = 0.5
    reset_after: int = 300
    reset_rule: Literal["all", "any"] = "all"

    def __post_init__(self) -> None:
        at_least("model.unicode.codebook.num_codes", self.num_codes, 2)
        if not 0.0 < self.decay <= 1.0:
            raise ValueError(f"model.unicode.codebook.decay={self.decay}: must be above 0 and at most 1")
        for name in ("cross_commitment", "reset_after"):
            at_least(f"model.unicode.codebook.{name}", getattr(self, name), 0)


Modality = Literal["audio", "visual", "text"]


@dataclass(frozen=True)
class UnicodeConfig:
    """Uni-Code: encoders of each modality and the codebook that they share.

    Args:
        modalities: Which are trained together: any two of audio, visual and text, or all three.
        inputs: "features" of each second from shards of features (published), or "media": frames and log-mel, through
            model.backbone and model.audio, of which a coarse copy is reconstructed, and the words of the prompt.
        visual_shape: Height, width and channels of the features of a picture; of media the size of the map alone.
        audio_channels: Numbers in the features of a second of sound.
        text_channels: Numbers in the vector of a word.
        dim: Numbers of a semantic vector and of a code, D.
        layers: Transformer layers of a semantic encoder (public code: 2).
        heads: Attention heads of each.
        dropout: Of the transformer layers (public code: 0.1).
        specific: Numbers of what is specific to sound or text (public code: 256).
        visual_specific: Channels of what is specific to the picture (public code: 2048).
        shared_encoder: One transformer for all modalities (MST).
        context_layers: Layers of the LSTM of Cross-CPC (paper: 1, public code: 2).
        predict_steps: Steps that Cross-CPC looks ahead (K).
    """

    modalities: tuple[Modality, ...] = ("audio", "visual")
    inputs: Literal["features", "media"] = "features"
    visual_shape: tuple[int, int, int] = (7, 7, 512)
    audio_channels: int = 128
    text_channels: int = 768
    dim: int = 256
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1
    specific: int = 256
    visual_specific: int = 2048
    shared_encoder: bool = False
    context_layers: int = 1
    predict_steps: int = 1
    codebook: CodebookConfig = field(default_factory=CodebookConfig)

    def __post_init__(self) -> None:
        for name in ("dim", "layers", "heads", "specific", "visual_specific", "context_layers", "predict_steps"):
            at_least(f"model.unicode.{name}", getattr(self, name), 1)
        share("model.unicode.dropout", self.dropout)
        if len(set(self.modalities)) != len(self.modalities) or len(self.modalities) < 2:
            raise ValueError(f"model.unicode.modalities={list(self.modalities)}: name two or three, each once")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Features of one step of each modality."""
        known: dict[str, tuple[int, ...]] = {
            "audio": (self.audio_channels,),
            "visual": self.visual_shape,
            "text": (self.text_channels,),
        }
        return {modality: known[modality] for modality in self.modalities}


@dataclass(frozen=True)
class QueryConfig:
    """Segmentation of what a query means, its codes taken from a frozen Uni-Code (section 5.1, AVS-S4).

    Args:
        checkpoint: Checkpoint or run of Uni-Code; model.unicode, model.backbone and model.audio must be as they were
            there where they matter. Needed for training alone.
        modality: What asks in training: "audio" or "text"; evaluation may ask in the other.
    """

    checkpoint: str | None = None
    modality: Literal["audio", "text"] = "audio"


@dataclass(frozen=True)
class ModelConfig:
    """The network.

    Args:
        system: Which published system to build.
        compat: "paper", or "published_code" to reproduce where the public code departs from it.
        num_classes: 1 = sounding or silent (S4, MS3); AVSS: 71 classes, the first is the background.
    """

    system: Literal["tpavi", "ecmvae", "diffusion", "unicode", "query"] = "tpavi"
    compat: Literal["paper", "published_code"] = "paper"
    num_classes: int = 1
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    neck: NeckConfig = field(default_factory=NeckConfig)
    tpavi: TPAVIConfig = field(default_factory=TPAVIConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    unicode: UnicodeConfig = field(default_factory=UnicodeConfig)
    query: QueryConfig = field(default_factory=QueryConfig)

    def __post_init__(self) -> None:
        at_least("model.num_classes", self.num_classes, 1)
