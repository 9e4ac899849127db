"""The CPU kernels, in C++: compiled once for this machine's processor, then `torch.ops.reftserve.*`.

attention.cpp       paged_attention: a packed step against the cache, nothing gathered
span_attention.cpp  span_attention: a training pass against what is kept, nothing padded
linear.cpp          pack_linear, linear, linear_transposed: float32, each row the same to the bit in any batch
int8.cpp            int8_linear, int8_gated_mlp: what stands around torch's integer product
elementwise.cpp     rms_norm, gated_activation, rotate, rotated
edits.cpp           edit_rows: a step's edits at one layer, nothing gathered
autograd.cpp        the way back: of linear, span_attention, rms_norm, gated_activation, rotated
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import sysconfig
from pathlib import Path

import torch
from filelock import FileLock
from torch.utils import cpp_extension

from reftserve.server.base.model_errors import KernelsUnavailable

FOLDER = Path(__file__).parent
SOURCES = (
    "attention.cpp",
    "span_attention.cpp",
    "linear.cpp",
    "int8.cpp",
    "elementwise.cpp",
    "edits.cpp",
    "autograd.cpp",
)
HEADERS = ("vector.h", "activation.h", "kernels.h")
FLAGS = ["-O3", "-march=native", "-std=c++20", "-fopenmp", "-Wno-psabi", "-fno-math-errno"]


@functools.cache
def load_kernels() -> None:
    """Make `torch.ops.reftserve` available. The first time on a machine takes three quarters of a minute of compiling.

    Raises KernelsUnavailable when there is no compiler that can.
    """
    name = f"reftserve_kernels_{_identity()}"
    # ninja comes with this environment, whose scripts need not be on the path.
    os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])
    try:
        build = Path(cpp_extension._get_build_directory(name, verbose=False))
        with FileLock(build / "reftserve.lock"):
            # torch's own lock is a file that a process leaves behind when it is killed, and then waits for.
            (build / "lock").unlink(missing_ok=True)
            cpp_extension.load(
                name,
                [str(FOLDER / source) for source in SOURCES],
                extra_cflags=FLAGS,
                extra_ldflags=["-fopenmp"],
                build_directory=str(build),
                is_python_module=False,
            )
    except (RuntimeError, OSError) as cause:
        raise KernelsUnavailable(
            "the CPU kernels cannot be compiled: install g++ 11 or newer and ninja, or set cpu_kernels to false, "
            f"which is slower and has no int8: {cause}"
        ) from cause


def _identity() -> str:
    """Names what is compiled, by what, for what: a cache of it is shared by all versions and may move with its disk."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text().split("\n\n")[0] if cpuinfo.is_file() else platform.processor()
    features = [line for line in text.splitlines() if line.startswith(("flags", "Features", "model name"))]
    parts = [torch.__version__, *FLAGS, *(features or [text]), *((FOLDER / f).read_text() for f in SOURCES + HEADERS)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
