"""The host itself: processors, memory, limits, shared memory, clock."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from avs_dist.launch.checks import cgroup
from avs_dist.launch.checks.rows import FAIL, OK, WARN, Options, Row, one_line, size

GIB = 2**30
# a loading process keeps pipes, sockets and shards open
FEWEST_FILES, ENOUGH_FILES = 1024, 4096
# with the 64 MiB of a container's default a loading process dies of a bus error
SMALLEST_SHM, ENOUGH_SHM = 256 * 2**20, 2 * GIB
# this code did not exist before
EARLIEST = time.mktime((2026, 1, 1, 0, 0, 0, 0, 0, 0))
LATEST = time.mktime((2100, 1, 1, 0, 0, 0, 0, 0, 0))


def processors(options: Options) -> Row:
    allowed, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    found = f"{allowed} of {there} processors for this process"
    if quota := cgroup.processors():
        found += f", {quota:g} by the quota of its container"
    if threads := os.environ.get("OMP_NUM_THREADS", ""):
        found += f", OMP_NUM_THREADS={threads}"
    if threads.isdigit() and int(threads) > allowed:
        return Row(WARN, "processors", found, f"set OMP_NUM_THREADS to {allowed} or less")
    if min(allowed, quota or allowed) < 2:
        return Row(WARN, "processors", found, "ask for more for each task: reading clips needs some of its own")
    return Row(OK, "processors", found)


def memory(options: Options) -> Row:
    lines = Path("/proc/meminfo").read_text().splitlines()
    values = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    free = values["MemAvailable"]
    found = f"{size(free)} free of {size(values['MemTotal'])}"
    if bound := cgroup.memory():
        free = min(free, bound.free)
        found += f"; {size(bound.free)} free of the {size(bound.limit)} that its container or job may use"
    if free < 4 * GIB:
        return Row(WARN, "memory", found, "end what else runs here; a rank with its loading processes takes a few GiB")
    return Row(OK, "memory", found)


def limits(options: Options) -> list[Row]:
    files, locked, stack = (
        resource.getrlimit(limit)[0]
        for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_STACK)
    )
    rows = [_at_least("ulimit -n (open files)", files, FEWEST_FILES, ENOUGH_FILES, "ulimit -n 65536")]
    rdma = Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir())
    if rdma and locked != resource.RLIM_INFINITY:
        advice = "ulimit -l unlimited: NCCL locks memory for InfiniBand"
        rows.append(Row(FAIL, "ulimit -l (locked memory)", size(locked), advice))
    else:
        told = "unlimited" if locked == resource.RLIM_INFINITY else f"{size(locked)}, enough without InfiniBand"
        rows.append(Row(OK, "ulimit -l (locked memory)", told))
    rows.append(_at_least("ulimit -s (stack)", stack, 2**20, 8 * 2**20, "ulimit -s 8192", size))
    return rows


def _at_least(name: str, value: int, least: int, enough: int, advice: str, shown: Callable[[int], str] = str) -> Row:
    if value == resource.RLIM_INFINITY:
        return Row(OK, name, "unlimited")
    state = FAIL if value < least else WARN if value < enough else OK
    return Row(state, name, shown(value), "" if state == OK else f"{advice} (better {shown(enough)} or more)")


def shared_memory(options: Options) -> Row:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError as error:
        return Row(FAIL, "/dev/shm", one_line(error), "mount a tmpfs there, or train with --data.workers 0")
    found = f"{size(usage.free)} free of {size(usage.total)}"
    advice = "docker run --shm-size=8g (or --ipc=host), or train with --data.workers 0"
    state = FAIL if usage.free < SMALLEST_SHM else WARN if usage.free < ENOUGH_SHM else OK
    return Row(state, "/dev/shm", found, "" if state == OK else advice)


def temporary(options: Options) -> Row:
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(bytes(2**20))
            file.flush()
    except OSError as error:
        return Row(FAIL, "temporary files", one_line(error), "free some room there, or set TMPDIR to another folder")
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    advice = "free some room there, or set TMPDIR to another folder" if free < GIB else ""
    return Row(WARN if advice else OK, "temporary files", f"{folder}, {size(free)} free", advice)


def clock(options: Options) -> Row:
    now = time.time()
    found = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if not EARLIEST < now < LATEST:
        return Row(FAIL, "clock", found, "set it (timedatectl set-ntp true): certificates and file times go wrong")
    return Row(OK, "clock", found)
