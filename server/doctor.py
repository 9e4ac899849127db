"""The checks of `reftserve doctor`: what a machine gives to a server, one line each."""

from __future__ import annotations

import locale
import os
import platform
import pwd
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from urllib.request import getproxies

from reftserve.server.base.folder import check_base
from reftserve.server.base.model_errors import BaseModelError
from reftserve.server.environment import (
    GIB,
    check_data_folder,
    check_database,
    check_store,
    check_temporary_folder,
    listening,
)
from reftserve.server.errors import ServerError
from reftserve.server.settings import Settings
from reftserve.server.settings_sources import service_links

Check = Callable[[Settings], str]
FEW_FILES = 4096  # a stream needs one, and so does a connection that is kept alive
LITTLE_DISK = GIB
LONGEST_SOCKET_FOLDER = 80  # bytes: a socket's path has at most 107 (unix(7)), and ours needs 27 below the folder


class Advice(Exception):
    """A server starts, but with a drawback; the message says which, and what to set."""


def checks() -> dict[str, Check]:
    """Return all checks by name. The last one takes seconds, because it imports torch."""
    return {
        "python": lambda _: platform.python_version(),
        "variables": _variables,
        "PATH": _path,
        "HOME": _home,
        "user": _user,
        "locale": _locale,
        "data folder": check_data_folder,
        "temporary folder": check_temporary_folder,
        "TMPDIR's length": _socket_folder,
        "disk space": _disk_space,
        "open files": _open_files,
        "proxies": _proxies,
        "database": check_database,
        "store": check_store,
        "port": _port,
        "base model": check_base,
        "torch": _torch,
    }


def examine(check: Check, settings: Settings) -> tuple[str, str]:
    """Make one check; return "ok", "note" or "wrong", and what it found."""
    try:
        return "ok", check(settings)
    except Advice as cause:
        return "note", str(cause)
    except OSError as cause:
        return "wrong", ": ".join(filter(None, (cause.filename, cause.strerror or str(cause))))
    except (ServerError, BaseModelError, ImportError) as cause:
        return "wrong", str(cause)


def _variables(settings: Settings) -> str:
    links = service_links(os.environ)
    return f"{', '.join(links)} ignored: Kubernetes sets them for a service" if links else "no unknown REFTSERVE_*"


def _path(settings: Settings) -> str:
    where = "is not set; the system's default is searched" if "PATH" not in os.environ else "is set"
    compiler = shutil.which("g++", path=os.environ.get("PATH", os.defpath))
    if compiler is None and settings.cpu_kernels != "never":
        raise Advice(f"PATH {where}, and no g++ is found there: torch computes without our kernels; install g++")
    return f"{where}, g++ is {compiler}"


def _home(settings: Settings) -> str:
    try:
        folder = Path.home()
    except RuntimeError as cause:
        raise Advice("no home folder is known; set HOME, where models and compiled kernels are kept") from cause
    if not os.access(folder, os.W_OK):
        raise Advice(
            f"{folder} cannot be written; set HOME, or HF_HOME for models of the hub and TORCH_EXTENSIONS_DIR for "
            "compiled kernels"
        )
    return str(folder)


def _user(settings: Settings) -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"{os.getuid()}, without a name"


def _locale(settings: Settings) -> str:
    encoding = "utf-8" if sys.flags.utf8_mode else locale.getencoding()
    if encoding.lower().replace("-", "") != "utf8":
        raise Advice(f"texts are read as {encoding}; set PYTHONUTF8=1, or LANG=C.UTF-8")
    return encoding


def _socket_folder(settings: Settings) -> str:
    length = len(os.fsencode(tempfile.gettempdir()))
    if length > LONGEST_SOCKET_FOLDER:
        raise Advice(
            f"{length} bytes are too long for the engine's socket, which goes to /tmp; set TMPDIR to a path of at most "
            f"{LONGEST_SOCKET_FOLDER}"
        )
    return f"{length} bytes"


def _disk_space(settings: Settings) -> str:
    folders = {str(settings.data.resolve()), tempfile.gettempdir()}
    free = {folder: shutil.disk_usage(folder).free for folder in sorted(folders) if Path(folder).is_dir()}
    text = ", ".join(f"{free_bytes / GIB:.1f} GiB in {folder}" for folder, free_bytes in free.items())
    if any(free_bytes < LITTLE_DISK for free_bytes in free.values()):
        raise Advice(f"{text}; uploads, checkpoints and weights need more")
    return text


def _open_files(settings: Settings) -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FEW_FILES:
        raise Advice(f"at most {hard}, and each connection takes one; raise it with `ulimit -n`")
    return f"{soft}, at most {'any number' if hard == resource.RLIM_INFINITY else hard}"


def _proxies(settings: Settings) -> str:
    proxies = {scheme: url for scheme, url in getproxies().items() if scheme != "no"}
    if any(url.startswith("socks") for url in proxies.values()) and find_spec("socksio") is None:
        raise Advice(
            "a SOCKS proxy is set, which the client and the hub need a package for: pip install 'httpx[socks]'"
        )
    return ", ".join(sorted(proxies)) + " (addresses of this machine are asked directly)" if proxies else "none"


def _port(settings: Settings) -> str:
    with listening(settings):
        return f"{settings.host}:{settings.port} is free"


def _torch(settings: Settings) -> str:
    import torch

    from reftserve.server.base.model import resolve_device

    return f"{torch.__version__} on {resolve_device(settings.device)}, {torch.get_num_threads()} threads"
