"""The compiled step: built once for this processor and compiler, kept beside the other things this project makes once."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

from quantize.demo_model import cache_directory
from quantize.errors import InputError
from quantize.files import atomic_path

SOURCE = Path(__file__).with_name("step.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
_COMPILERS = ("g++", "c++", "clang++")

_ADDRESS, _COUNT = ctypes.c_void_p, ctypes.c_int64
# What step.cpp's functions take; none gives anything back.
_FUNCTIONS = {
    "decode_step": (_ADDRESS, _COUNT, _ADDRESS, _ADDRESS, _COUNT, _ADDRESS),
    "multiply": (_ADDRESS, _ADDRESS, _COUNT, _ADDRESS, _COUNT),
    "attend_in_slots": (_ADDRESS, _COUNT, _COUNT, _ADDRESS, _ADDRESS, _COUNT, _ADDRESS),
    "attend_in_pages": (_ADDRESS, _COUNT, _COUNT, _ADDRESS, _ADDRESS, _COUNT, _COUNT, _ADDRESS, _COUNT),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The step's library, compiled if need be (some seconds).

    Raises:
        InputError: no C++ compiler, or one that does not compile it.
    """
    command = [*compiler(), *FLAGS]
    file = cache_directory() / "native" / f"step-{_key(command)}.so"
    if not file.exists():
        with atomic_path(file) as made:
            _compile([*command, "-o", str(made), str(SOURCE)])
    return declared(ctypes.CDLL(str(file)))


def declared(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """The same, its functions taking integers and addresses as Python has them."""
    for name, takes in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = takes, None
    return loaded


def compiler() -> list[str]:
    """``$CXX`` or the first C++ compiler on the path.

    Raises:
        InputError: there is none.
    """
    chosen = os.environ.get("CXX", "").split()
    found = chosen or [name for name in _COMPILERS if shutil.which(name)][:1]
    if not found or shutil.which(found[0]) is None:
        raise InputError(
            f"native=true needs a C++ compiler with OpenMP, and {found[0] if found else 'none'} is not on the path; "
            "install g++, name one in CXX, or use native=false"
        )
    return found


def _compile(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(
            f"native=true: {' '.join(command[:-3])} does not compile {SOURCE.name}: {' '.join(done.stderr.split())[:200]}"
        )


def _key(command: list[str]) -> str:
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=False).stdout
    sources = [file.read_text() for file in sorted(SOURCE.parent.glob("*.[ch]pp"))]
    parts = [*sources, version, *command, platform.machine(), _processor()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What ``-march=native`` depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
