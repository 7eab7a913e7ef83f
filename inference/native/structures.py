"""The C++ side's structures, as ctypes lays them out."""

from __future__ import annotations

import ctypes
from typing import Any

POINTER = ctypes.c_void_p


def structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    """A structure of these fields, in their order."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def integers(*names: str) -> dict[str, Any]:
    """Fields of 64 bits."""
    return dict.fromkeys(names, ctypes.c_int64)


def pointers(*names: str) -> dict[str, Any]:
    """Fields that are addresses."""
    return dict.fromkeys(names, POINTER)


# product.hpp's Linear.
LINEAR = structure(
    "Linear",
    **integers("kind", "rows", "columns", "group"),
    **pointers("weight", "scales", "minima", "bias", "order"),
    input_scale=ctypes.c_double,
)
