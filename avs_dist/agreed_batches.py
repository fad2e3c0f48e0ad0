"""Batches that all ranks take together, made by loading processes or by this one."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any, Generic
from weakref import WeakSet

from torch.utils.data import DataLoader

from avs_dist import watchdog
from avs_dist.damage import DamageLog, agree
from avs_dist.shards.children import deaf, die_with_parent
from avs_dist.shards.pipeline import Batch, EvalStream, Loaded, TrainStream
from avs_dist.watchdog import LAST_RESORT, phase

_loading: WeakSet[BaseProcess] = WeakSet()


class AgreedBatches(Generic[Batch]):
    """The batches of this rank's stream; every `next` is collective.

    Args:
        workers: Loading processes; 0 makes the batches in this one.
        damage: Where damaged clips of all ranks are noted.
    """

    def __init__(self, stream: TrainStream[Batch] | EvalStream[Batch], workers: int, damage: DamageLog) -> None:
        self._stream, self._workers, self._damage = stream, workers, damage
        self._loaded, self._processes = _iterate(stream, workers)
        self._number = 0

    def __next__(self) -> Loaded[Batch]:
        """The next batch, once all ranks have theirs and know of each other's damage and signals.

        Raises:
            Preempted, TooManyDamagedError, NoBatchError: see `damage.agree`; on all ranks.
        """
        batch, failure = self._own()
        self._number += 1
        with phase("waiting for the batches of the other ranks"):
            agree(self._damage, batch.damages if batch else (), failure)
        assert batch is not None
        return batch

    def _own(self) -> tuple[Loaded[Batch] | None, str | None]:
        """This rank's batch, and why there is none for all to train on."""
        # torch ends the wait for a loading process itself
        patience = LAST_RESORT if self._workers else 1.0
        try:
            with phase(lambda: f"reading {self._stream.describe(self._number)}", patience):
                batch = next(self._loaded)
        except Exception as error:  # whatever it is, the other ranks must not wait for this one
            _kill(self._processes)
            limit = f" (engine.timeout_s={watchdog.timeout_s():g})" if "timed out" in str(error) else ""
            return None, f"{_last_line(error)}{limit}; to be read: {self._stream.describe(self._number)}"
        if batch.batch is None:
            return batch, f"{len(batch.damages)} clips one after the other cannot be read"
        return batch, None


def _last_line(error: Exception) -> str:
    """What is wrong, also where torch has put the trace of a loading process before it."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"


def _iterate(
    stream: TrainStream[Batch] | EvalStream[Batch], workers: int
) -> tuple[Iterator[Loaded[Batch]], set[BaseProcess]]:
    """Batches of a stream, and the processes that make them; where there are none this one does."""
    # the stream is already split over ranks and workers and yields whole batches
    loader = DataLoader(
        stream,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_begin_loading,
        timeout=watchdog.timeout_s() if workers else 0,
    )
    if not workers:
        return iter(loader), set()
    with deaf():
        resource_tracker.ensure_running()  # unblocks SIGTERM where it starts its process
    handler, others = signal.getsignal(signal.SIGCHLD), set(multiprocessing.active_children())
    with deaf():
        loaded = iter(loader)
    processes = set(multiprocessing.active_children()) - others
    _loading.update(processes)
    # torch's handler raises wherever this process is when a loading process dies, in the middle of a collective too;
    # without it the death is noticed where the next batch is taken, and the other ranks can be told
    if signal.getsignal(signal.SIGCHLD) != handler:
        signal.signal(signal.SIGCHLD, handler)
    return loaded, processes


def _begin_loading(_: int) -> None:
    die_with_parent()


def _kill(processes: Iterable[BaseProcess]) -> None:
    """End loading processes that may be stuck: they do not hear the SIGTERM with which Python ends its children, before
    it waits for them."""
    for process in processes:
        if process.is_alive():
            process.kill()


atexit.register(_kill, _loading)


def _as_it_is(loaded: Any) -> Any:
    return loaded
