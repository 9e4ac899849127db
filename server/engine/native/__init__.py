"""The CPU kernels, in C++: compiled once for this machine's processor, then `torch.ops.reftserve.*`.

attention.cpp    paged_attention: a packed step against the cache, nothing gathered
int8.cpp         int8_linear, int8_gated_mlp: what stands around torch's integer product
elementwise.cpp  rms_norm, gated_activation
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import sysconfig
from pathlib import Path

from torch.utils import cpp_extension

from reftserve.server.engine.errors import EngineError

SOURCES = ("attention.cpp", "int8.cpp", "elementwise.cpp")
FLAGS = ["-O3", "-march=native", "-std=c++20", "-fopenmp", "-Wno-psabi", "-fno-math-errno"]


@functools.cache
def load_kernels() -> None:
    """Make `torch.ops.reftserve` available. The first time on a machine takes half a minute of compiling.

    Raises EngineError when there is no compiler that can.
    """
    folder = Path(__file__).parent
    # ninja comes with this environment, whose scripts need not be on the path.
    os.environ["PATH"] = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])
    try:
        cpp_extension.load(
            f"reftserve_kernels_{_processor()}",
            [str(folder / source) for source in SOURCES],
            extra_cflags=FLAGS,
            extra_ldflags=["-fopenmp"],
            is_python_module=False,
        )
    except (RuntimeError, OSError) as cause:
        raise EngineError(
            "the CPU kernels cannot be compiled: install g++ 11 or newer and ninja, or set native_kernels to false, "
            f"which is slower and has no int8: {cause}"
        ) from cause


def _processor() -> str:
    """Names what the code is compiled for: a cache of it may move to another machine with its home folder or volume."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text().split("\n\n")[0] if cpuinfo.is_file() else platform.processor()
    features = sorted(line for line in text.splitlines() if line.startswith(("flags", "Features", "model name")))
    return hashlib.sha256("\n".join(features or [text]).encode()).hexdigest()[:12]
