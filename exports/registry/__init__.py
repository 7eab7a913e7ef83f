"""Registries: where releases of artifacts are kept. The interface is in base.py, one registry a file.

A new registry is one new file with ``connect(scheme, location)`` and one line below.
"""

from __future__ import annotations

import importlib
from typing import cast

from exports.registry.base import Registry
from exports.registry.names import Reference
from quantize.errors import InputError

# By module name: what a registry needs is imported only where it is used.
REGISTRIES: dict[str, str] = {
    "local": "exports.registry.local",
    "oci": "exports.registry.oci",
    "hub": "exports.registry.hub",
    "mlflow": "exports.registry.mlflow",
}

__all__ = ["REGISTRIES", "Reference", "Registry", "connect"]


def connect(scheme: str, location: str) -> Registry:
    """The registry of a scheme (``local``) at a location (a directory, a URI, a host).

    Raises:
        InputError: unknown scheme, or a location that is no such registry.
    """
    if scheme not in REGISTRIES:
        raise InputError(f"registry {scheme!r} is unknown; use {' or '.join(REGISTRIES)}")
    return cast(Registry, importlib.import_module(REGISTRIES[scheme]).connect(scheme, location))
