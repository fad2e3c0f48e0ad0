"""The ablation tables of the papers, as data: what `avs-dist ablations` runs, and the published scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

FULL, S4, FROM_S4 = "full", "s4", "from_s4"  # variants without a file of their own


class Row(NamedTuple):
    """One row of a table; `variant` is a file of the paper's folder, or one of those above."""

    label: str
    variant: str
    published: float | None  # mIoU on MS3 with PVT, in percent; None for rows of ours


class Table(NamedTuple):
    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Paper:
    """Tables by number, and the files of configs/ that run them.

    base:     Files that every row starts from, at toy scale.
    overlays: Folder with one file for each variant.
    out:      Default folder of the results.
    roman:    The paper writes its numbers in Roman numerals.
    """

    title: str
    base: tuple[str, ...]
    overlays: str
    out: str
    tables: dict[int, Table]
    roman: bool = False

    def name(self, number: int) -> str:
        """The table as the paper calls it."""
        return f"Table {_ROMAN[number - 1] if self.roman else number}"


_ROMAN = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII")

ECMVAE = Paper(
    title="ECMVAE",
    base=("demo_ecmvae.yaml",),
    overlays="ecmvae",
    out="runs/ablations",
    tables={
        2: Table(
            "VAE and sound",
            (
                Row("without audio", "table2_no_audio", 48.20),
                Row("CVAE", "table2_cvae", 49.26),
                Row("CMVAE", "table2_cmvae", 54.99),
            ),
        ),
        3: Table(
            "factorised codes",
            (
                Row("VAE, one code of 16", "table2_cmvae", 54.99),
                Row("VAE, one code of 48", "table3_vae_48", 55.09),
                Row("VAE, factorised, 3 x 16", "table3_factorised", 56.38),
                Row("AE", "table3_ae", 54.00),
                Row("AE, factorised", "table3_ae_factorised", 54.82),
            ),
        ),
        4: Table(
            "divergence of the shared code",
            (
                Row("KL", "table3_factorised", 56.38),
                Row("PoE", "table4_poe", 57.35),
                Row("MoE", "table4_moe", 57.53),
                Row("JS", FULL, 57.84),
                Row("JS, geometric (ours)", "table4_js_geometric", None),
            ),
        ),
        5: Table(
            "constraints",
            (
                Row("neither", "table5_none", 57.01),
                Row("L_diff", "table5_diff", 57.65),
                Row("L_sic", "table5_sic", 57.51),
                Row("L_diff and L_sic", FULL, 57.84),
            ),
        ),
        6: Table("start", (Row("from scratch", FULL, 57.84), Row("pre-trained on S4", FROM_S4, 60.81))),
    },
)

DIFFUSION = Paper(
    title="contrastive latent diffusion (second version)",
    base=("demo_diffusion.yaml", "diffusion/toy.yaml"),
    overlays="diffusion",
    out="runs/ablations_diffusion",
    roman=True,
    tables={
        3: Table(
            "latent diffusion",
            (
                Row("E-D", "table3_encoder_decoder", 54.28),
                Row("CVAE", "table3_cvae", 55.21),
                Row("LDM, without L_contrastive", "table3_ldm", 57.67),
            ),
        ),
        4: Table(
            "condition of the denoiser, without L_contrastive",
            (
                Row("none", "table4_none", 56.12),
                Row("audio", "table4_audio", 56.59),
                Row("visual", "table4_visual", 57.21),
                Row("audio-visual", "table3_ldm", 57.67),
            ),
        ),
        5: Table(
            "L_contrastive",
            (
                Row("without", "table3_ldm", 57.67),
                Row("first version: trains the condition", "table5_first_version", 58.18),
                Row("second version: trains both encoders", FULL, 59.62),
            ),
        ),
        6: Table(
            "numbers in a code",
            (
                Row("D = 8", "table6_8", 57.28),
                Row("D = 16", "table6_16", 57.98),
                Row("D = 24", FULL, 59.62),
                Row("D = 32", "table6_32", 57.01),
            ),
        ),
        7: Table(
            "transformer decoder (AVSegFormer)",
            (
                Row("without diffusion", "table7_transformer", 58.36),
                Row("with diffusion", "table7_diffusion", 59.94),
            ),
        ),
        8: Table("start", (Row("from scratch", FULL, 59.62), Row("pre-trained on S4", FROM_S4, 61.94))),
    },
)

PAPERS = {"ecmvae": ECMVAE, "diffusion": DIFFUSION}
