"""All ops that `avs-dist bench` knows."""

from __future__ import annotations

from avs_dist.launch.benchmarks import codebook, ddim, fscore, quantiser, tpavi
from avs_dist.launch.benchmarks.problem import Op

OPS: dict[str, Op] = {op.name: op for op in (tpavi.OP, ddim.OP, codebook.OP, quantiser.OP, fscore.OP)}
