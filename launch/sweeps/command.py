"""Try many settings of one training: a search space, a budget, and a scheduler that lets good trials go on.

    avs-dist sweep --config configs/demo.yaml --sweep configs/sweeps/asha_lr.yaml
    avs-dist sweep --config configs/demo.yaml --sweep configs/sweeps/asha_lr.yaml --resume       after an interruption
    avs-dist sweep ... --sweep.samples 64 --sweep.resources.gpus 1 --address auto                on a cluster of Ray

--sweep names a YAML file; each of its values can be overridden by its dotted name. `space` says what is tried of which
config key; all keys and values are checked before the first trial:

    space:
      optim.lr: loguniform(1e-5, 1e-3)           uniform, loguniform (numbers), int, logint (whole numbers): low, high
      optim.name: choice(adam, adamw)            grid(adam, adamw) tries each of them, in all combinations
      optim.weight_decay: {value: loguniform(1e-4, 1e-1), when: {optim.name: adamw}}

A trial is an ordinary training with a folder of its own, <out>/trials/0000 and so on; it goes on from its checkpoints
after a fault, and after the sweep itself was interrupted or killed (--resume). While the sweep runs, <out>/sweep.html
shows it (and `tensorboard --logdir <out>/trials`); best.yaml is the config of the best trial, for `avs-dist train`.
"""

from __future__ import annotations

from avs_dist.config import Config
from avs_dist.launch.parser import Parser
from avs_dist.launch.sweeps.settings import SweepConfig


def build_parser() -> Parser:
    parser = Parser(prog="avs-dist sweep", description=__doc__)
    parser.add_argument("--config", action="config", help="YAML file of the training; may be given several times")
    parser.add_class_arguments(SweepConfig, "sweep")
    add = parser.add_argument
    add("--out", type=str | None, default=None, help="everything goes here (default: runs/sweeps/NAME-OF-SWEEP-FILE)")
    add("--resume", action="store_true", help="go on with the sweep in --out")
    add("--address", type=str | None, default=None, help="of a running Ray cluster (default: a Ray of its own, here)")
    parser.add_class_arguments(Config)
    return parser
