"""The CPU kernels in C++: compiled once for this machine's processor, then available as `torch.ops.reftserve.*`.

attention.cpp       paged_attention: a packed step against the paged cache, without gathering
span_attention.cpp  span_attention: a training pass against cached keys and values, without padding
linear.cpp          pack_linear, linear, linear_transposed: float32; a row is the same to the bit in any batch
int8.cpp            int8_linear, int8_gated_mlp: rounding and scaling around torch's integer product
elementwise.cpp     rms_norm, gated_activation, rotate, rotated
edits.cpp           edit_rows: a step's edits at one layer, without gathering
autograd.cpp        backward passes of linear, span_attention, rms_norm, gated_activation, rotated
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
COMPLETE = "complete"  # stands beside a library that was compiled to its end
NATIVE = "native"


@functools.cache
def load_kernels(march: str = NATIVE) -> None:
    """Make `torch.ops.reftserve` available, for one `march` in a process. The first call on a machine takes 45 s.

    march: GCC's name of the processor to compile for. Raises KernelsUnavailable when the kernels cannot be compiled.
    """
    name = f"reftserve_kernels_{identity(march)}"
    # ninja is installed in this environment, whose scripts may be missing from PATH.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    try:
        build = _build_folder(name)
        with FileLock(build / "reftserve.lock"):
            if (build / COMPLETE).exists():
                # The name says all that is in the library. ninja would compile it again for another checkout's paths.
                torch.ops.load_library(str(build / f"{name}.so"))  # type: ignore[no-untyped-call]
                return
            # A killed process leaves torch's own lock file behind, and the next one would wait for it forever.
            (build / "lock").unlink(missing_ok=True)
            cpp_extension.load(
                name,
                [str(FOLDER / source) for source in SOURCES],
                extra_cflags=_flags(march),
                extra_ldflags=["-fopenmp"],
                build_directory=str(build),
                is_python_module=False,
            )
            (build / COMPLETE).touch()
    except (RuntimeError, OSError, SubprocessError) as cause:
        raise KernelsUnavailable(
            f"the CPU kernels cannot be compiled, install g++ 11 or newer and ninja: {cause}"
        ) from cause


def _build_folder(name: str) -> Path:
    """Return torch's folder for a library, after creating it. Raises KernelsUnavailable."""
    try:
        # Without a home folder torch would write into a folder called `~` below the working folder.
        if "TORCH_EXTENSIONS_DIR" not in os.environ:
            Path.home()
        return Path(cpp_extension._get_build_directory(name, verbose=False))
    except (OSError, RuntimeError) as cause:
        raise KernelsUnavailable(
            f"compiled kernels have no folder that can be written ({cause}); set HOME or TORCH_EXTENSIONS_DIR to one"
        ) from cause


def identity(march: str = NATIVE, *more: str) -> str:
    """Return a hash of the sources, flags, torch's version, processor (a disk may move to another one) and `more`."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text("utf-8").split("\n\n")[0] if cpuinfo.is_file() else platform.processor()
    features = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    sources = ((FOLDER / name).read_text("utf-8") for name in SOURCES + HEADERS)
    parts = [torch.__version__, *_flags(march), *(features or [text]), *sources, *more]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _flags(march: str) -> list[str]:
    return [f"-march={march}", *FLAGS]
