"""The DeepSpeed engine behind one small class: the only file that imports accelerate or deepspeed.

The same path serves `python` on a CPU, `torchrun` and the `deepspeed` launcher: there is always a process group (of one
process if need be) and always a DeepSpeedEngine. The DeepSpeed dict is derived from the config, never a second file.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from avs_dist import optimizer_state, world
from avs_dist.clip import Clip
from avs_dist.config import Config, EngineConfig
from avs_dist.nonfinite import StepGuard
from avs_dist.optim import build_optimizer, lr_factor
from avs_dist.sequences import Sequences
from avs_dist.shards import plan
from avs_dist.systems.base import Encoded, LatentCodes, Prediction, System

# elements of a gradient bucket; DeepSpeed's own 5e8 reserve 2 GB in fp32, more than the weights of these models
REDUCE_BUCKET = 25_000_000


def micro_batch_size(config: Config) -> int:
    """Clips that one rank handles at a time.

    Raises:
        ValueError: train.global_batch does not divide over ranks and accumulation.
    """
    try:
        return plan.micro_batch_size(config.train.global_batch, config.engine.grad_accumulation, world.world_size())
    except ValueError as error:
        raise ValueError(f"train.global_batch, engine.grad_accumulation: {error}") from error


def deepspeed_config(config: Config) -> dict[str, Any]:
    """The DeepSpeed settings of a run, derived from its config."""
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch_size(config),
        "gradient_accumulation_steps": config.engine.grad_accumulation,
        "gradient_clipping": config.optim.clip_norm,
        **_precision(config.engine),
        "zero_optimization": _zero(config.engine),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def _precision(engine: EngineConfig) -> dict[str, Any]:
    """In bf16 gradients are reduced in fp32, and their micro-batches summed in fp32, which ZeRO 0 does not offer."""
    if engine.precision == "fp32":
        return {}
    sums = {"data_types": {"grad_accum_dtype": "fp32"}} if engine.zero_stage > 0 else {}
    return {"bf16": {"enabled": True}, "communication_data_type": "fp32", **sums}


def _zero(engine: EngineConfig) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": engine.zero_stage, "reduce_bucket_size": REDUCE_BUCKET}
    if engine.offload == "optimizer":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return zero


def stop() -> None:
    """Leave the process group; what DeepSpeed keeps of it is dropped too, so that another run may follow."""
    if "deepspeed" in sys.modules:
        import deepspeed

        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()
    world.stop()


class Engine:
    """A system and its optimiser under DeepSpeed."""

    def __init__(self, system: System, config: Config, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        if config.engine.activation_checkpointing:
            _recompute_activations(system, config.engine.zero_stage)
        self._engine = _wrap(system, config)
        _check_engine(self._engine, config)
        world.limit_waiting(config.engine.timeout_s)
        self._guard = StepGuard(self.system, self._engine.basic_optimizer, config.engine.grad_accumulation)

    @property
    def system(self) -> System:
        return self._engine.module

    def describe(self) -> str:
        """One line of facts taken from the live objects."""
        modules = self.system.modules()
        implementations = sorted({str(m.implementation) for m in modules if hasattr(m, "implementation")})
        return (
            f"engine={type(self._engine).__name__} zero_stage={self._engine.zero_optimization_stage()} "
            f"world_size={dist.get_world_size()} device={next(self.system.parameters()).device.type} "
            f"precision={'bf16' if self._engine.bfloat16_enabled() else 'fp32'} kernels={'+'.join(implementations)}"
        )

    def train_step(self, micro_batches: list[Clip] | list[Sequences], step: int) -> dict[str, float]:
        """One optimiser step over the rank's micro-batches; returns the loss terms, and what the system observed,
        averaged over all ranks.

        Raises:
            NonFiniteError: a loss or gradient of any rank is not finite; raised on every rank, and all is as before.
        """
        # every random draw of a step depends on (seed, step, rank) alone, so that a resumed run repeats it exactly
        torch.manual_seed((self.config.seed * 1_000_003 + step) * 4_096 + world.rank())
        self._engine.train()
        self._set_learning_rate(step)
        self._guard.begin()
        totals: dict[str, Tensor] = {}
        means: dict[str, float] = {}
        for batch in micro_batches:
            terms = self._engine("loss_terms", batch.to(self.device, self.dtype), step)
            loss = torch.stack(list(terms.values())).sum()
            for name, value in {"loss": loss, **terms, **self.system.take_observed()}.items():
                share = value.detach().double() / len(micro_batches)
                totals[name] = totals[name] + share if name in totals else share
            self._engine.backward(loss)
            self._guard.note(batch.key, terms)
            if batch is micro_batches[-1]:
                means = self._guard.agree(totals)
            self._engine.step()
        if self._guard.refuses:
            raise self._guard.undo(step)
        return means

    @torch.no_grad()
    def predict(self, clip: Clip) -> Prediction:
        self._engine.eval()
        return self._engine("predict", clip.to(self.device, self.dtype), None)

    @torch.no_grad()
    def latents(self, clip: Clip) -> LatentCodes | None:
        self._engine.eval()
        return self._engine("latents", clip.to(self.device, self.dtype))

    @torch.no_grad()
    def encode(self, batch: Sequences) -> dict[str, Encoded]:
        self._engine.eval()
        return self._engine("encode", batch.to(self.device, self.dtype))

    def learning_rate(self, step: int) -> float:
        return self.config.optim.lr * lr_factor(step, self.config.train.max_steps, self.config.optim)

    def _set_learning_rate(self, step: int) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Copies, on the CPU, of what the optimiser of this rank remembers; see `optimizer_state.snapshot`."""
        optimizer = self._engine.optimizer
        if self.config.engine.zero_stage == 0 and not world.is_main():  # all ranks remember the same
            return {}
        held = optimizer_state.partitions(self.system, optimizer, world.rank())
        return optimizer_state.snapshot(held, optimizer, masters=self.dtype != torch.float32)

    def load_optimizer_state(self, files: list[Path]) -> None:
        """Read what the optimisers of all ranks of a run remembered, whatever their number and ZeRO stage.

        The weights must be those of the checkpoint already (`checkpoint.load_weights`, before the engine is made).

        Raises:
            ValueError: it is of another model or optimiser.
        """
        optimizer = self._engine.optimizer
        held = optimizer_state.partitions(self.system, optimizer, world.rank())
        stored = optimizer_state.StoredState(files)
        optimizer_state.restore(held, optimizer, stored, masters=self.dtype != torch.float32)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Copies of all weights and buffers of the system, unsharded, on the CPU in float32; collective, in order."""
        import deepspeed

        for name, value in self.system.state_dict(keep_vars=True).items():
            with deepspeed.zero.GatheredParameters([value], enabled=hasattr(value, "ds_id")):
                dtype = torch.float32 if value.is_floating_point() else value.dtype
                tensor = value.detach().to("cpu", dtype, copy=True)
            yield name, tensor


def _wrap(system: System, config: Config) -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin

    deepspeed.utils.logger.setLevel(logging.WARNING)
    # an inference-only shared-memory collective that DeepSpeed would compile with g++ at every first start on a CPU
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for parameter in system.parameters():
        # DeepSpeed broadcasts raw memory; .contiguous() would leave the odd strides of channels-last 1x1 kernels
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    AcceleratorState._reset_state(reset_partial_state=True)  # a second engine in one process starts afresh
    _launcher_environment()
    # accelerate drops DeepSpeed when asked for the CPU by name, and sees a world of one when asked for nothing; the
    # process group is already there, and PartialState(cpu=True) before the Accelerator makes it see the true world
    PartialState(cpu=not torch.cuda.is_available())
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_config(config), zero3_init_flag=False),
        gradient_accumulation_steps=config.engine.grad_accumulation,
    )
    if accelerator.num_processes != dist.get_world_size():
        raise RuntimeError(
            f"accelerate sees {accelerator.num_processes} processes, torch.distributed {dist.get_world_size()}"
        )
    optimizer = build_optimizer(system, config.optim)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # until the first step sets it
    engine, _ = accelerator.prepare(system, optimizer)
    # DeepSpeed's bf16 optimiser of ZeRO 0 has made a step of zero gradients, which Adam counts
    optimizer.state.clear()
    return engine


def _recompute_activations(system: System, zero_stage: int) -> None:
    blocks = system.recompute_activations()
    if zero_stage == 3:
        from deepspeed.utils import set_z3_leaf_module

        # a block's weights come and go together: the second run ends in the middle of the block, as soon as it has
        # what is missing, and ZeRO 3 would go on believing that the modules around that place are running
        for block in blocks:
            set_z3_leaf_module(block, True)


def _launcher_environment() -> None:
    """What accelerate and DeepSpeed read from the environment, for a run without a launcher."""
    facts = {"LOCAL_RANK": world.local_rank(), "RANK": world.rank(), "WORLD_SIZE": world.world_size()}
    for name, value in {"ACCELERATE_USE_DEEPSPEED": "true", **facts}.items():
        os.environ.setdefault(name, str(value))


def _check_engine(engine: Any, config: Config) -> None:
    """Refuse to train on anything else than what was asked for: each of these has gone wrong silently elsewhere."""
    import deepspeed

    if not isinstance(engine, deepspeed.DeepSpeedEngine):
        raise RuntimeError(f"expected a DeepSpeedEngine, got {type(engine).__name__}")
    if engine.zero_optimization_stage() != config.engine.zero_stage:
        raise RuntimeError(f"ZeRO stage {config.engine.zero_stage} asked, {engine.zero_optimization_stage()} running")
    if not dist.get_world_size() == engine.world_size == int(os.environ["WORLD_SIZE"]):
        raise RuntimeError(
            f"world sizes differ: torch.distributed {dist.get_world_size()}, deepspeed {engine.world_size}, "
            f"WORLD_SIZE {os.environ['WORLD_SIZE']}"
        )
    for partition in optimizer_state.partitions(engine.module, engine.optimizer, world.rank()):
        if partition.master.dtype != torch.float32:
            raise RuntimeError(f"the optimiser updates weights in {partition.master.dtype}, not in float32")
