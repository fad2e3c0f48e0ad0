"""What the hosts of a cluster say of themselves, and whether they agree and reach each other."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from avs_dist.launch.checks import collective
from avs_dist.launch.checks.hosts import Host, HostError
from avs_dist.launch.checks.rows import FAIL, OK, WARN, Options, Row, from_dict

QUICK_S = 30.0
MOST_OFFSET_S = 1.0


@dataclasses.dataclass(frozen=True)
class Report:
    """rows of each host by its name, and those about all of them together."""

    hosts: dict[str, list[Row]]
    together: list[Row]

    def rows(self) -> list[Row]:
        return [row for rows in self.hosts.values() for row in rows] + self.together


def each(hosts: Sequence[Host], question: Callable[[Host], Any]) -> dict[str, Any]:
    """The same asked of all hosts at once: answer, or HostError, by name."""

    def asked(host: Host) -> Any:
        try:
            return question(host)
        except HostError as error:
            return error

    with ThreadPoolExecutor(max_workers=max(1, len(hosts))) as pool:
        return dict(zip((host.name for host in hosts), pool.map(asked, hosts), strict=True))


def examine(hosts: Sequence[Host], options: Options, master_addr: str | None, limit_s: float) -> Report:
    """Ask everything. A host that does not answer is a row; the others go on without it."""
    offsets = each(hosts, lambda host: clock_offset(host, limit_s))
    rows: dict[str, list[Row]] = {}
    for name, offset in offsets.items():
        if isinstance(offset, HostError):
            rows[name] = [Row(FAIL, "reached", str(offset), f"try: ssh {name} hostname")]
    alive = [host for host in hosts if host.name not in rows]
    found = each(alive, lambda host: host.ask("examine", limit_s, **dataclasses.asdict(options)))
    for name, answer in found.items():
        rows[name] = _failed("checks", answer) if isinstance(answer, HostError) else [from_dict(row) for row in answer]
    alive = [host for host in alive if not isinstance(found[host.name], HostError)]
    together = [clocks({host.name: offsets[host.name] for host in alive})] if alive else []
    facts = each(alive, lambda host: host.ask("facts", QUICK_S + limit_s, shards=options.shards))
    for host in alive:
        answer = facts[host.name]
        rows[host.name] += _failed("facts", answer) if isinstance(answer, HostError) else slots(host, answer["gpus"])
    alive = [host for host in alive if not isinstance(facts[host.name], HostError)]
    if len(alive) > 1:
        together += agreement({host.name: facts[host.name]["same"] for host in alive})
        together.append(shared_folder(alive, options.out_dir))
        first = facts[alive[0].name]["addresses"]
        address = master_addr or (first[0] if first else alive[0].name)
        reached = port_reached(alive, address, options.master_port)
        together.append(reached)
        if reached.state != FAIL:
            together.append(all_reduce(alive, address, options.master_port, limit_s))
    return Report({host.name: rows[host.name] for host in hosts}, together)


def _failed(name: str, error: HostError) -> list[Row]:
    return [Row(FAIL, name, str(error), "see the same command on that host: avs-dist doctor")]


def slots(host: Host, gpus: int) -> list[Row]:
    """The hostfile's number of ranks against the GPUs that are there."""
    if gpus == 0:
        return [Row(OK, "slots", f"{host.slots}, on processors")]
    if host.slots > gpus:
        return [Row(FAIL, "slots", f"{host.slots} in the hostfile, {gpus} GPUs there", f"write slots={gpus}")]
    state = OK if host.slots == gpus else WARN
    return [Row(state, "slots", f"{host.slots} of {gpus} GPUs", "" if state == OK else "some GPUs stay idle")]


def clock_offset(host: Host, limit_s: float) -> float:
    """Seconds by which its clock is ahead of ours, from the quickest of three answers.

    limit_s: of the first answer, which waits for ssh and for Python to start.
    """
    host.ask("clock", limit_s)
    best = (float("inf"), 0.0)
    for _ in range(3):
        begin, since = time.time(), time.perf_counter()
        there = host.ask("clock", QUICK_S)
        took = time.perf_counter() - since
        best = min(best, (took, there - (begin + took / 2)))
    return best[1]


def clocks(offsets: dict[str, float]) -> Row:
    spread = max(offsets.values()) - min(offsets.values())
    if spread < MOST_OFFSET_S:
        return Row(OK, "clocks", f"at most {spread * 1e3:.0f} ms apart")
    told = ", ".join(f"{name} {offset:+.1f} s" for name, offset in offsets.items())
    return Row(
        FAIL, "clocks", f"{spread:.1f} s apart: {told}", "let all follow one time server: timedatectl set-ntp true"
    )


def agreement(facts: dict[str, dict[str, str]]) -> list[Row]:
    """One row for what all hosts have alike, one for each thing that they do not."""
    names = list(next(iter(facts.values())))
    rows, alike = [], []
    for name in names:
        by_value: dict[str, list[str]] = {}
        for host, found in facts.items():
            by_value.setdefault(found[name], []).append(host)
        if len(by_value) == 1:
            alike.append(name)
            continue
        told = "; ".join(f"{value} on {', '.join(hosts)}" for value, hosts in by_value.items())
        rows.append(Row(FAIL, f"same {name}", told, "bring all hosts to the same: ranks would not compute alike"))
    return [Row(OK, "same on all hosts", ", ".join(alike)), *rows]


def shared_folder(hosts: Sequence[Host], folder: str) -> Row:
    """Whether what the first host writes in out_dir is seen by the others."""
    first, token = hosts[0], secrets.token_hex(8)
    try:
        path = first.ask("leave", QUICK_S, folder=folder, token=token)
    except HostError as error:
        return Row(FAIL, "shared out dir", f"{first.name} cannot write there: {error}", "choose another train.out_dir")
    seen = each(hosts[1:], lambda host: host.ask("see", QUICK_S, path=path, token=token))
    each([first], lambda host: host.ask("remove", QUICK_S, path=path))
    blind = [name for name, answer in seen.items() if answer is not True]
    if blind:
        what = f"a file that {first.name} wrote in {folder} is not there on {', '.join(blind)}"
        return Row(FAIL, "shared out dir", what, "train.out_dir must be on a file system that all hosts share")
    return Row(OK, "shared out dir", f"{folder}: what {first.name} writes is seen by all")


def port_reached(hosts: Sequence[Host], address: str, port: int) -> Row:
    """Whether each host comes through to the port of rank 0."""
    first, where = hosts[0], f"{address}:{port}"
    try:
        first.ask("listen", QUICK_S, port=port)
    except HostError as error:
        return Row(FAIL, "master port", f"{first.name} cannot listen on {port}: {error}", "use another --master-port")
    reached = each(hosts, lambda host: host.ask("reach", QUICK_S, address=address, port=port))
    each([first], lambda host: host.ask("close", QUICK_S))
    bad = [f"{name}: {answer}" for name, answer in reached.items() if answer != ""]
    if bad:
        advice = "open the port in the firewall, or give the right address with --master-addr"
        return Row(FAIL, "master port", f"{where} is not reached by {'; '.join(bad)}", advice)
    return Row(OK, "master port", f"{where} is reached by all")


def all_reduce(hosts: Sequence[Host], address: str, port: int, limit_s: float) -> Row:
    """A real sum with one rank on each host."""
    shared = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": str(len(hosts)), "LOCAL_RANK": "0"}
    ranks = {host.name: {**shared, "RANK": str(rank)} for rank, host in enumerate(hosts)}
    each(hosts, lambda host: host.ask("join", QUICK_S, variables=ranks[host.name]))
    answers = each(hosts, lambda host: host.ask("joined", limit_s + QUICK_S, within_s=limit_s))
    outcomes = [{"error": str(a)} if isinstance(a, HostError) else a for a in answers.values()]
    return collective.row("collective of all hosts", outcomes)
