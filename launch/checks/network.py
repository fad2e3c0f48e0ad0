"""Names, addresses, ports, and what the deepspeed launcher sends along."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import re
import shutil
import socket
import struct
from pathlib import Path

from avs_dist.launch.checks.rows import FAIL, OK, WARN, Options, Row

_SIOCGIFADDR = 0x8915
# which interface gloo and NCCL take
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
# variables that the deepspeed launcher (0.19) takes along from its own environment; NCCL's too, where it sees a GPU
LAUNCHER_PREFIXES = ("MLFLOW", "PYTHON", "MV2", "UCX")
_QUOTED = re.compile(r"[^\w@%+=:,./-]")


def interfaces() -> dict[str, str]:
    """IPv4 address of each interface that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                request = struct.pack("256s", name.encode()[:15])
                found[name] = socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24])
            except OSError:
                continue
    return found


def reachable_addresses() -> list[str]:
    """Addresses of this host that others can use, in the order of the interfaces."""
    return [address for address in interfaces().values() if not ipaddress.ip_address(address).is_loopback]


def host_name(options: Options) -> Row:
    """Whether the own name leads to an address that other hosts can use: gloo takes it where no interface is named."""
    name = socket.gethostname()
    try:
        addresses = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)})
    except OSError as error:
        return Row(FAIL, "host name", f"{name} does not resolve: {error}", "put it into /etc/hosts with its address")
    found = f"{name} is {', '.join(addresses)}"
    if not any(ipaddress.ip_address(address.partition("%")[0]).is_loopback for address in addresses):
        return Row(OK, "host name", found)
    if options.many_hosts and not any(os.environ.get(variable) for variable in INTERFACE_VARIABLES):
        if on_gpus():  # NCCL looks for an interface itself
            advice = "fine for NCCL; torchrun and gloo would give others this address: mend /etc/hosts"
            return Row(WARN, "host name", found, advice)
        advice = "other hosts would connect to themselves: mend /etc/hosts, or set GLOO_SOCKET_IFNAME in .deepspeed_env"
        return Row(FAIL, "host name", found, advice)
    return Row(OK, "host name", f"{found}: enough for one machine")


def interface_names(options: Options) -> Row:
    there = interfaces()
    told = ", ".join(f"{name} {address}" for name, address in there.items()) or "none has an address"
    for variable in INTERFACE_VARIABLES:
        # NCCL also takes a list, prefixes, "=" for exact names and "^" for all others
        wanted = [name for name in re.split(",", os.environ.get(variable, "").lstrip("=")) if name]
        if not wanted or wanted[0].startswith("^"):
            continue
        if not any(name.startswith(wish.partition(":")[0]) for wish in wanted for name in there):
            value = os.environ[variable]
            return Row(
                FAIL, "interfaces", f"{told}; {variable}={value} is none of them", f"set {variable} to one of them"
            )
    usable = [name for name, address in there.items() if not ipaddress.ip_address(address).is_loopback]
    if options.many_hosts and len(usable) > 1 and not any(os.environ.get(name) for name in INTERFACE_VARIABLES):
        return Row(WARN, "interfaces", told, f"say which one: {INTERFACE_VARIABLES[0]}=... in .deepspeed_env")
    return Row(OK, "interfaces", told)


def port(options: Options) -> Row:
    """Whether rank 0 could listen on the port of the training."""
    number = options.master_port
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", number))
    except OSError as error:
        advice = "another program has it (ss -tlnp): give the launcher another --master_port"
        return Row(WARN, "master port", f"{number}: {error.strerror}", advice)
    return Row(OK, "master port", f"{number} is free")


def deepspeed_env_files() -> list[Path]:
    """The files whose lines the deepspeed launcher sets on every host, in its order."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")  # may also be an absolute path
    files = [folder / name for folder in (Path.home(), Path.cwd())]
    return [file for file in dict.fromkeys(files) if file.is_file()]


def deepspeed_env() -> dict[str, str]:
    """What these files set."""
    pairs = (line.partition("=") for file in deepspeed_env_files() for line in file.read_text().splitlines())
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def exported() -> dict[str, str]:
    """Variables that the deepspeed launcher sets on every host, the values quoted as it does: in double quotes, in
    which a shell still replaces $NAME."""
    prefixes = (*LAUNCHER_PREFIXES, "NCCL") if on_gpus() else LAUNCHER_PREFIXES
    sent = {name: value for name, value in os.environ.items() if name.startswith(prefixes)}
    sent["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    sent |= deepspeed_env()
    sent = {name: value.strip() for name, value in sent.items()}
    return {name: f'"{value}"' if _QUOTED.search(value) else value for name, value in sent.items()}


def on_gpus() -> bool:
    """Whether training on this machine would use GPUs."""
    try:
        import torch
    except (ImportError, OSError):  # a row of its own tells it
        return False
    return torch.cuda.is_available()


def launcher(options: Options) -> list[Row]:
    """What the machine that starts a training on many hosts needs."""
    rows = []
    for program in ("ssh", "pdsh"):
        if path := shutil.which(program):
            rows.append(Row(OK, program, path))
        else:
            advice = (
                f"install it (apt install {'openssh-client' if program == 'ssh' else 'pdsh'}): deepspeed starts with it"
            )
            rows.append(Row(FAIL, program, "not found", advice))
    for file in deepspeed_env_files():
        lines = file.read_text().splitlines()
        bad = [number for number, line in enumerate(lines, start=1) if "=" not in line]
        if bad:
            what = f"{file}:{bad[0]} is no NAME=VALUE, and the launcher breaks on it (also on comments and empty lines)"
            rows.append(Row(FAIL, ".deepspeed_env", what, "remove that line"))
        else:
            rows.append(Row(OK, ".deepspeed_env", f"{file}: {', '.join(line.partition('=')[0] for line in lines)}"))
    return rows
