"""What goes into one step of the codebook's moving average: teachers, sums of a sequential step, order of the clones.

Functions of tensors without gradient (Uni-Code, section 4.3); none of them waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from avs_dist.kernels.codebook import Observed, codebook_sums

Teacher = Literal["cross_attention", "time_aligned", "none"]
TEACHERS: tuple[Teacher, ...] = ("cross_attention", "time_aligned", "none")


def teachers(z_MBTD: Tensor, usable_MBT: Tensor, kind: Teacher) -> Tensor:
    """r of eq. 7: the mean over the other modalities of what each says at a token; NaN where none has a usable token.

    Args:
        kind: "cross_attention": a modality says softmax(z_m z_o^T / sqrt(D)) z_o, over its usable tokens of the clip;
            "time_aligned": its token of the same t.
    """
    clean_MBTD = torch.where(usable_MBT[..., None], z_MBTD, 0.0)
    said_MBTD, count_MBT1 = torch.zeros_like(clean_MBTD), torch.zeros_like(clean_MBTD[..., :1])
    for shift in range(1, len(z_MBTD)):
        other_MBTD, there_MBT = clean_MBTD.roll(-shift, 0), usable_MBT.roll(-shift, 0)
        if kind == "cross_attention":
            score_MBTT = clean_MBTD @ other_MBTD.transpose(2, 3) * z_MBTD.shape[3] ** -0.5
            attention_MBTT = score_MBTT.masked_fill(~there_MBT[:, :, None], -torch.inf).softmax(3)
            there_MBT = there_MBT.any(2, keepdim=True)
            # the softmax over nothing is NaN
            other_MBTD = torch.where(there_MBT[..., None], attention_MBTT @ other_MBTD, 0.0)
        said_MBTD += other_MBTD
        count_MBT1 += there_MBT[..., None]
    return said_MBTD.div_(count_MBT1)


def sequential_sums(observed: Sequence[Observed], num_codes: int, decay: float) -> Tensor:
    """The buffer with which one step of decay^M does what M steps do, one modality after the other.

    N after all of them is g^M N + (1 - g) sum_m g^(M-1-m) n_m, and o likewise, because a code is divided out of o and N
    but not fed back: with the weights w_m = g^(M-1-m) / sum_k g^k that is one step with w_m n_m. As the sums are linear
    in the tokens, ranks still add one buffer [M*L + L*D].
    """
    powers = [decay ** (len(observed) - 1 - m) for m in range(len(observed))]
    counts, sums = [], []
    for one, power in zip(observed, powers, strict=True):
        flat = codebook_sums([one], num_codes).mul_(power / sum(powers))
        counts.append(flat[:num_codes])
        sums.append(flat[num_codes:])
    return torch.cat([*counts, torch.stack(sums).sum(0)])


def reset_order(num_codes: int, seed: int, updates: Tensor) -> Tensor:
    """A permutation of the codes, int64 [L], fixed by the seed and the number of updates on the device.

    The keys are different, as each step of the mixing is one-to-one modulo 2^32: so the order is one on all devices. A
    generator of the host would need the number of updates there.
    """
    key = _mixed(updates + _mixed(torch.full_like(updates, seed)))
    return _mixed(torch.arange(num_codes, device=updates.device) + key).argsort()


def _mixed(value: Tensor) -> Tensor:
    """Integers modulo 2^32, well mixed; no product leaves int64."""
    value = value & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x2C1B3C6D)):
        value = (value ^ (value >> shift)) * factor & 0xFFFFFFFF
    return value ^ (value >> 16)
