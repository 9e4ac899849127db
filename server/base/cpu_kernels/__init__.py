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
from subprocess import SubprocessError

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
FLAGS = ("-O3", "-std=c++20", "-fopenmp", "-Wno-psabi", "-fno-math-errno")
NATIVE = "native"  # GCC's word for the processor that it runs on


@functools.cache
def load_kernels(march: str = NATIVE) -> None:
    """Make `torch.ops.reftserve` available. The first time on a machine takes three quarters of a minute of compiling.

    march: GCC's name of the processor to compile for; a process can load the kernels for one of them.
    Raises KernelsUnavailable when no compiler can make them.
    """
    name = f"reftserve_kernels_{identity(march)}"
    # ninja comes with this environment, whose scripts need not be on the path.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    try:
        build = Path(cpp_extension._get_build_directory(name, verbose=False))
        with FileLock(build / "reftserve.lock"):
            # torch's own lock is a file that a process leaves behind when it is killed, and then waits for.
            (build / "lock").unlink(missing_ok=True)
            cpp_extension.load(
                name,
                [str(FOLDER / source) for source in SOURCES],
                extra_cflags=_flags(march),
                extra_ldflags=["-fopenmp"],
                build_directory=str(build),
                is_python_module=False,
            )
    except (RuntimeError, OSError, SubprocessError) as cause:
        raise KernelsUnavailable(
            f"the CPU kernels cannot be compiled, install g++ 11 or newer and ninja: {cause}"
        ) from cause


def identity(march: str = NATIVE, *more: str) -> str:
    """Return a hash of the sources, the flags, torch's version, the processor's features and `more`.

    A cache of compiled kernels is shared by all versions and may move with its disk to another processor.
    """
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text().split("\n\n")[0] if cpuinfo.is_file() else platform.processor()
    features = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    sources = ((FOLDER / name).read_text() for name in SOURCES + HEADERS)
    parts = [torch.__version__, *_flags(march), *(features or [text]), *sources, *more]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _flags(march: str) -> list[str]:
    return [f"-march={march}", *FLAGS]
