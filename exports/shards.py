"""Safetensors model directories: writing them shard by shard, opening them lazily.

Layout of a directory (Hugging Face convention): ``model.safetensors`` alone, or ``model-0000i-of-0000n.safetensors`` with
``model.safetensors.index.json`` mapping each tensor to its shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from exports.stream import SafetensorsWriter

SHARD_BYTES = 2 * 1024**3
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``(name, tensor)`` pairs into ``directory``, holding one tensor in memory.

    The caller makes the directory atomic. Order of tensors decides which shard each lands in, so equal input gives equal
    bytes.
    """
    shards: list[tuple[Path, list[str]]] = []
    total_bytes = 0
    pending = iter(tensors)
    following = next(pending, None)
    while following is not None or not shards:
        path = directory / f"shard-{len(shards)}.safetensors"
        with SafetensorsWriter(path, {"format": "pt"}) as shard:
            while following is not None and (not shard.names or shard.nbytes + _size(following) <= shard_bytes):
                shard.add(*following)
                following = next(pending, None)
        shards.append((path, shard.names))
        total_bytes += shard.nbytes

    if len(shards) == 1:
        shards[0][0].rename(directory / SINGLE_FILE)
        return
    weight_map = {}
    for number, (path, names) in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.rename(directory / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def _size(item: tuple[str, Tensor]) -> int:
    return item[1].numel() * item[1].element_size()


def shard_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, in order."""
    if (directory / INDEX_FILE).exists():
        weight_map = json.loads((directory / INDEX_FILE).read_text())["weight_map"]
        return [directory / name for name in sorted(set(weight_map.values()))]
    if not (directory / SINGLE_FILE).exists():
        # AutoGPTQ names its file after the grid: gptq_model-4bit-128g.safetensors.
        return sorted(directory.glob("*.safetensors")) or [directory / SINGLE_FILE]
    return [directory / SINGLE_FILE]


def read_shards(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a model directory, by name."""
    tensors: dict[str, Tensor] = {}
    for path in shard_files(directory):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors
