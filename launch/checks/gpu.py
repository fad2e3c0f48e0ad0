"""The GPUs of this host, each tried with a product.

python -m avs_dist.launch.checks.gpu TOLD       the tries; a process of its own, so that no memory of a GPU is held
                                                while the collective starts others, and one that hangs is a row
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from avs_dist.launch.checks.rows import FAIL, OK, WARN, Options, Row, from_dict, one_line, size

ADVICE = "see nvidia-smi and dmesg; leave a bad GPU out with CUDA_VISIBLE_DEVICES"
ANSWER = "avs-dist-gpus "


def gpus(options: Options) -> list[Row]:
    import torch

    told = f"torch {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
    if not torch.cuda.is_available():
        drivers = _nvidia_smi("name") or [path.name for path in Path("/dev").glob("nvidia[0-9]*")]
        if drivers:
            advice = "the driver is too old for this CUDA, or the device files are closed to this user; see nvidia-smi"
            return [Row(FAIL, "GPUs", f"{told}: torch cannot use {', '.join(drivers)}", advice)]
        return [Row(WARN, "GPUs", f"none ({told})", "fine for a trial: training runs on the processors, slowly")]
    told += ", driver " + (_nvidia_smi("driver_version") or ["unknown"])[0]
    command = [sys.executable, "-m", "avs_dist.launch.checks.gpu", told]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.within_s)
    except subprocess.TimeoutExpired:
        return [Row(FAIL, "GPUs", f"{told}: no answer within {options.within_s:g} s", ADVICE)]
    answers = [line.removeprefix(ANSWER) for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if not answers:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        return [Row(FAIL, "GPUs", f"{told}: the try ended with code {done.returncode}: {last}", ADVICE)]
    return [from_dict(row) for row in json.loads(answers[-1])]


def main() -> int:
    """Try each GPU; prints the rows as one line of JSON."""
    import torch

    rows = [_gpu(number, sys.argv[1]) for number in range(torch.cuda.device_count())]
    print(ANSWER + json.dumps([dataclasses.asdict(row) for row in rows]))
    return 0


def _gpu(number: int, told: str) -> Row:
    import torch

    name = f"GPU {number}"
    try:
        torch.cuda.set_device(number)
        free, total = torch.cuda.mem_get_info(number)
        ones_NN = torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)
        works = bool(((ones_NN @ ones_NN) == 256).all())
    except RuntimeError as error:
        return Row(FAIL, name, one_line(error), ADVICE)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    found = f"{torch.cuda.get_device_name(number)}, {size(free)} free of {size(total)}, {told}"
    found += ", bf16" if bf16 else ", no bf16"
    if not works:
        return Row(FAIL, name, f"{found}: a product of ones is wrong", "take this GPU out of use")
    if free < 0.9 * total:
        return Row(WARN, name, found, "another process uses it (nvidia-smi)")
    if not bf16:
        return Row(WARN, name, found, "train with --engine.precision fp32")
    return Row(OK, name, found)


def _nvidia_smi(field: str) -> list[str]:
    """One fact of each GPU, as the driver tells it."""
    try:
        command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


if __name__ == "__main__":
    raise SystemExit(main())
