"""llama.cpp's tools: built once, kept outside the checkout, found again.

``python -m eval.llamacpp_tools`` (``make llamacpp``) fetches the source distribution of the PyPI package ``llama-cpp-python``,
checks its sha256, and builds the llama.cpp inside (MIT) for this machine's processor. The binaries go to ``bin`` in the folder
``llama.cpp-VERSION`` of the project's cache; ``$QUANTIZE_LLAMACPP`` names another folder of binaries, such as that of a build
one has already. An interrupted build goes on where it stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantize.demo_model import cache_directory
from quantize.errors import InputError
from quantize.files import atomic_directory, disk_error, sha256_file

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
SDIST = f"llama_cpp_python-{VERSION}.tar.gz"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SOURCE = f"llama_cpp_python-{VERSION}/vendor/llama.cpp"
VARIABLE = "QUANTIZE_LLAMACPP"

TOOLS = (
    "llama-quantize",
    "llama-perplexity",
    "llama-imatrix",
    "llama-bench",
    "llama-server",
    "llama-completion",
    "llama-tokenize",
)

OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    # Libraries are looked for beside the binaries, so that the folder can be moved.
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
    "-DGGML_NATIVE=ON",
    # Nothing that would need the network: models are local files, and the server is spoken to by this project alone.
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)


def home() -> Path:
    """Where this version's tools are kept: ``llama.cpp-VERSION`` in the project's cache."""
    return cache_directory() / f"llama.cpp-{VERSION}"


def directory() -> Path:
    """The folder of binaries: ``$QUANTIZE_LLAMACPP``, or the one that ``make llamacpp`` fills."""
    given = os.environ.get(VARIABLE)
    return Path(given).expanduser() if given else home() / "bin"


def find_tool(name: str) -> Path | None:
    """The binary ``name``, such as ``llama-quantize``; None where it is not there."""
    path = directory() / name
    return path if path.is_file() and os.access(path, os.X_OK) else None


def find_library(name: str) -> Path | None:
    """The shared library ``name``, such as ``ggml-base``, for ctypes; None where it is not there."""
    for pattern in (f"lib{name}.so", f"lib{name}.dylib"):
        path = directory() / pattern
        if path.is_file():
            return path
    return None


def tool(name: str) -> Path:
    """The binary ``name``.

    Raises:
        InputError: it is not there; the message says how to build it.
    """
    path = find_tool(name)
    if path is None:
        other = f"correct {VARIABLE}" if os.environ.get(VARIABLE) else f"set {VARIABLE} to a folder that has it"
        raise InputError(f"{directory()} has no {name}; run `make llamacpp`, or {other}")
    return path


def build(source: Path | None = None, *, jobs: int | None = None) -> Path:
    """Build the tools, unless they are there; returns the folder of binaries.

    Args:
        source: llama.cpp's source tree; None: the pinned one, fetched from PyPI.
        jobs: compilers at work at once; None: one for each processor.

    Raises:
        InputError: the source cannot be fetched or is not the known one, CMake is missing, or the build fails.
    """
    if all((home() / "bin" / name).is_file() for name in TOOLS):
        return home() / "bin"
    if shutil.which("cmake") is None:
        raise InputError("building llama.cpp needs CMake and a C++ compiler: `pip install cmake`, or the system's packages")
    work = home().with_name(f"{home().name}-build")
    tree = source or _unpacked(work)
    build_tree = work / "build"
    _run(["cmake", "-S", str(tree), "-B", str(build_tree), *OPTIONS], "configuring")
    count = jobs or os.cpu_count() or 1
    _run(["cmake", "--build", str(build_tree), "--parallel", str(count), "--target", *TOOLS], "building")
    with atomic_directory(home() / "bin") as folder:
        copy_binaries(build_tree / "bin", folder)
    shutil.rmtree(work)
    return home() / "bin"


def copy_binaries(built: Path, folder: Path) -> None:
    """Copy tools and shared libraries; links among the libraries stay links.

    Raises:
        InputError: ``built`` lacks a tool.
    """
    lacking = [name for name in TOOLS if not (built / name).is_file()]
    if lacking:
        raise InputError(f"{built} has no {', '.join(lacking)}; remove {built.parent} and run `make llamacpp` again")
    libraries = [path for path in sorted(built.iterdir()) if path.suffix == ".dylib" or ".so" in path.suffixes]
    for path in (*(built / name for name in TOOLS), *libraries):
        shutil.copy2(path, folder / path.name, follow_symlinks=False)


def _unpacked(work: Path) -> Path:
    """llama.cpp's source tree, from the package's source distribution."""
    tree = work / "source"
    if not tree.exists():
        archive = fetch(cache_directory() / "sdists")
        # Python 3.11 has filters from 3.11.4 on; the archive is the one whose hash is known, so nothing hangs on it.
        options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        with atomic_directory(tree) as folder, tarfile.open(archive) as members:
            for member in members:
                name = member.name.removeprefix(f"{SOURCE}/")
                if name not in (member.name, ".git"):  # which points to a repository that is not there
                    member.name = name
                    members.extract(member, folder, **options)
    return tree


def fetch(folder: Path) -> Path:
    """The source distribution, fetched with pip unless ``folder`` has it.

    Raises:
        InputError: it cannot be fetched, or is not the one this project knows.
    """
    archive = folder / SDIST
    if not archive.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(folder, error) or error from error
        # Not `--no-binary :all:`, which would build the package's build tools from source as well.
        options = ["--no-deps", "--no-binary", PACKAGE, "--dest", str(folder)]
        command = [sys.executable, "-m", "pip", "download", "--quiet", *options, f"{PACKAGE}=={VERSION}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode or not archive.exists():
            last = (result.stderr.strip().splitlines() or ["no output"])[-1]
            raise InputError(f"llama.cpp could not be fetched from PyPI ({last}); check the network, or set {VARIABLE}")
    found = sha256_file(archive)
    if found != SDIST_SHA256:
        raise InputError(f"{archive} has sha256 {found}, not the known {SDIST_SHA256}; delete it and run again")
    return archive


def _run(command: Sequence[str], what: str) -> None:
    """Run a step of the build, its output shown as it comes."""
    status = subprocess.run(command, check=False).returncode
    if status:
        raise InputError(f"{what} llama.cpp failed (exit code {status}); the lines above say why")


def main(arguments: list[str] | None = None) -> int:
    """Command line; exit code 0 done, 2 where the tools cannot be had."""
    parser = argparse.ArgumentParser(prog="python -m eval.llamacpp_tools", description="Build llama.cpp's tools, once.")
    parser.add_argument("--source", type=Path, help="llama.cpp's source tree; default: fetched from PyPI")
    parser.add_argument("--jobs", type=int, help="compilers at work at once; default: one for each processor")
    options = parser.parse_args(arguments)
    try:
        print(build(options.source, jobs=options.jobs))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
