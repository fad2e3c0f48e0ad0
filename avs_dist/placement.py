"""Which ranks of a run are on which host."""

from __future__ import annotations

import itertools
import os
import socket

from avs_dist import world


def placement() -> str:
    """One line like "ranks: 0-7 on node-a 10.0.0.1, 8-15 on node-b 10.0.0.2"; collective."""
    hosts = world.gather_objects(f"{socket.gethostname()} {_address()}".rstrip())
    groups = [[rank for rank, _ in group] for _, group in itertools.groupby(enumerate(hosts), lambda item: item[1])]
    spans = [f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}" for ranks in groups]
    return "ranks: " + ", ".join(f"{span} on {hosts[ranks[0]]}" for span, ranks in zip(spans, groups, strict=True))


def _address() -> str:
    """The address by which this host reaches rank 0's; no packet is sent for it."""
    try:
        master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        family, kind, protocol, _, target = socket.getaddrinfo(*master, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except (KeyError, ValueError, OSError):
        return ""  # no launcher, so one process
