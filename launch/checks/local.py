"""All checks of one host, in the order of the table."""

from __future__ import annotations

from avs_dist.launch.checks import collective, gpu, machine, network, software, storage
from avs_dist.launch.checks.rows import Check, Options, Row, findings

CHECKS: dict[str, Check] = {
    "Python": software.python,
    "packages": software.packages,
    "code": software.code,
    "decoders": software.decoders,
    "GPUs": gpu.gpus,
    "processors": machine.processors,
    "memory": machine.memory,
    "limits": machine.limits,
    "/dev/shm": machine.shared_memory,
    "temporary files": machine.temporary,
    "clock": machine.clock,
    "host name": network.host_name,
    "interfaces": network.interface_names,
    "master port": network.port,
    "collective": collective.local,
    "out dir": storage.out_dir,
    "shards": storage.shards,
}


def examine(options: Options) -> list[Row]:
    """The findings on this host."""
    return findings(CHECKS, options)
