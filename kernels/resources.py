"""Build a kernel for a GPU that is not there and read what it needs off the binary.

Triton compiles without a device. The types, constants and alignments come from a recorded launch by the functions of
triton's own JIT, so what is built here is what the launch would build. Registers and local memory of a cubin are read
by the cuobjdump in triton's wheel, those of an AMD binary stand in its assembly.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from avs_dist.kernels.runtime import Launch

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TENSOR_MEMORY_COLUMNS = 512  # of sm_100
# instructions of the tensor cores in each kind of assembly; those of PTX have no other implementation
TENSOR_CORES = {
    "sass": r"\b(?:[HIDQ]MMA|HGMMA|UTC\w*MMA)\b",
    "ptx": r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b",
    "amdgcn": r"\bv_mfma_",
}


class Target(NamedTuple):
    """A GPU to build for, and the most shared memory that one block may take there, in bytes."""

    gpu: GPUTarget
    shared_limit: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024),
}


class Resources(NamedTuple):
    """What one kernel takes: registers and bytes of spilled (local) memory a thread, bytes of shared memory a block.

    `dot` is "tensor" when products run on tensor cores, "scalar" when they do not, "ieee" when they do not because AMD
    has no tensor core for full float32, "-" without a product.
    """

    registers: int
    spilled: int
    shared: int
    dot: str


class Build(NamedTuple):
    """One compilation; equal keys give equal binaries."""

    target: str
    source: ASTSource
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """What the binary depends on."""
        s = self.source
        kernel = f"{s.fn.__module__}.{s.fn.__qualname__}"
        return f"{self.target} {kernel} {s.signature} {s.constants} {s.attrs} {self.options}"


def specialise(launch: Launch, target: str) -> Build:
    """What triton's JIT would compile for this launch on this target.

    Raises:
        TypeError: the arguments do not fit the kernel.
    """
    kernel, gpu = launch.kernel, TARGETS[target].gpu
    backend = make_backend(gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    named = {**launch.constants, **launch.options}
    try:
        arguments, specialisation, options = bind(*launch.args, **named)
    except TypeError as error:
        raise TypeError(f"{kernel.__name__}: {error}") from error
    options, signature, constants, attributes = kernel._pack_args(backend, named, arguments, specialisation, options)
    return Build(target, ASTSource(kernel, signature, constants, attributes), options.__dict__)


def measure(build: Build, disassemble: bool = True) -> Resources:
    """Compile and read the binary.

    Args:
        disassemble: look for tensor-core instructions in the machine code; else, in half the time, in the PTX.

    Raises:
        RuntimeError: it does not compile; the message is the compiler's.
    """
    backend = TARGETS[build.target].gpu.backend
    compiled = _compile(build)
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    if columns > TENSOR_MEMORY_COLUMNS:
        raise RuntimeError(f"takes {columns} columns of tensor memory, there are {TENSOR_MEMORY_COLUMNS}")
    products = [line for line in compiled.asm["ttir"].splitlines() if "tt.dot" in line]
    if backend == "cuda":
        kind = "sass" if products and disassemble else "ptx"
        registers, spilled, sass = _read_cubin(compiled.asm["cubin"], kind == "sass")
        assembly = sass or compiled.asm["ptx"]
    else:
        kind, assembly = "amdgcn", compiled.asm["amdgcn"]
        registers, spilled = _field(assembly, "vgpr_count"), _field(assembly, "private_segment_fixed_size")
    dot = "-"
    if products:
        # triton writes no inputPrecision where it is ieee
        full_float32 = all("xf32>" in line and "inputPrecision" not in line for line in products)
        otherwise = "ieee" if full_float32 and backend == "hip" else "scalar"
        dot = "tensor" if re.search(TENSOR_CORES[kind], assembly) else otherwise
    return Resources(registers, spilled, compiled.metadata.shared, dot)


def _compile(build: Build) -> Any:
    """Raises RuntimeError with what the compiler says is wrong; it prints that, and the whole program, by itself."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile("w+") as said:
        os.dup2(said.fileno(), 2)
        try:
            with contextlib.redirect_stdout(said):
                return triton.compile(build.source, target=TARGETS[build.target].gpu, options=build.options)
        except Exception as error:  # triton, MLIR and ptxas each have their own kinds
            said.seek(0)
            complaints = [line for line in said if "error:" in line][:1]
            words = " ".join([*complaints, str(error)]).split()
            raise RuntimeError(f"does not compile: {' '.join(words)[:400]}") from error
        finally:
            os.dup2(before, 2)
            os.close(before)


def _read_cubin(cubin: bytes, disassemble: bool) -> tuple[int, int, str]:
    """Registers, bytes of local memory, and the machine code if asked for."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(what: str) -> str:
            return subprocess.run([CUOBJDUMP, what, file.name], check=True, capture_output=True, text=True).stdout

        usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("-res-usage"))}
        return usage["REG"], usage["STACK"] + usage["LOCAL"], dump("-sass") if disassemble else ""


def _field(assembly: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", assembly)
    if found is None:
        raise RuntimeError(f"no .{name} in the assembly")
    return int(found[1])
