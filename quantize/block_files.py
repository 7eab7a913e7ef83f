"""What a quantization in progress keeps on disk, so that a killed run loses one block at most.

After block ``i``: its codes in ``block-i.safetensors`` (with any other tensor of the block that was changed), and for solvers
with calibration the hidden states that enter block ``i + 1`` in ``hidden/i+1``. Both are written atomically, in that order; the
next run goes on where both exist.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from quantize.files import write_tensors, write_text
from quantize.grids import Grid, QuantizedTensor

_PARTS = ("codes", "scales", "zeros", "g_idx", "input_scale")
_DENSE = "dense:"  # marks a changed tensor that is not a quantized layer's


class BlockFiles:
    """The files of a quantization in progress: one for each finished block, and the newest hidden states."""

    def __init__(self, directory: Path, key: str, count: int) -> None:
        """Open ``directory``; what was made under another ``key`` is discarded."""
        self.directory, self.count = directory, count
        key_file = directory / "key"
        if not key_file.exists() or key_file.read_text() != key:
            shutil.rmtree(directory, ignore_errors=True)
            write_text(key_file, key)

    def path(self, index: int) -> Path:
        """The file of block ``index``."""
        return self.directory / f"block-{index:05d}.safetensors"

    def hidden(self, index: int) -> Path:
        """The directory of the hidden states that enter block ``index``."""
        return self.directory / "hidden" / f"{index:05d}"

    def done(self, with_hidden: bool) -> int:
        """Number of leading blocks that need not be done again."""
        done = 0
        while done < self.count and self.path(done).exists():
            done += 1
        if not with_hidden or done == self.count:
            return done
        return max((index for index in range(1, done + 1) if self.hidden(index).exists()), default=0)

    def write(self, index: int, layers: Mapping[str, QuantizedTensor], dense: Mapping[str, Tensor] | None = None) -> None:
        """Write a block's quantized layers, and other tensors of the block that no longer are the checkpoint's."""
        tensors = {
            f"{name}.{part}": getattr(layer, part)
            for name, layer in layers.items()
            for part in _PARTS
            if getattr(layer, part) is not None
        }
        write_tensors(self.path(index), tensors | {_DENSE + name: tensor for name, tensor in (dense or {}).items()})

    def add_seconds(self, seconds: float) -> None:
        """Note time spent, so that a resumed run reports all of it."""
        write_text(self.directory / "seconds", f"{self._seconds() + seconds:.3f}")

    def forget_seconds(self) -> None:
        """Drop the time noted so far: what it was spent on has to be done again."""
        (self.directory / "seconds").unlink(missing_ok=True)

    def _seconds(self) -> float:
        file = self.directory / "seconds"
        return float(file.read_text()) if file.exists() else 0.0

    def earlier_seconds(self, started: float) -> float:
        """Seconds noted beyond those since ``started`` (a ``time.perf_counter`` reading)."""
        return max(0.0, self._seconds() - (time.perf_counter() - started))

    def finish(self) -> list[Path]:
        """Drop what only an unfinished quantization needs; returns the block files."""
        shutil.rmtree(self.directory / "hidden", ignore_errors=True)
        return [self.path(index) for index in range(self.count)]

    @staticmethod
    def read_all(directory: Path, grids: Mapping[str, Grid]) -> Iterator[tuple[str, QuantizedTensor]]:
        """All quantized layers of a finished quantization, block by block; ``grids`` has the grid of each, by full name."""
        for path in sorted(directory.glob("block-*.safetensors")):
            with safe_open(path, "pt") as file:
                names = [name for name in file.keys() if not name.startswith(_DENSE)]  # noqa: SIM118
                for layer in sorted({name.rsplit(".", 1)[0] for name in names}):
                    stored = [part for part in _PARTS if f"{layer}.{part}" in names]
                    parts = {part: file.get_tensor(f"{layer}.{part}") for part in stored}
                    yield layer, QuantizedTensor(**parts, grid=grids[layer])

    @staticmethod
    def reader(directory: Path, grids: Mapping[str, Grid]) -> Callable[[str], QuantizedTensor]:
        """Gives any one quantized layer of a finished quantization, by full name."""
        files: dict[str, Path] = {}
        for path in sorted(directory.glob("block-*.safetensors")) if grids else ():
            with safe_open(path, "pt") as file:
                files |= {name.rsplit(".", 1)[0]: path for name in file.keys() if not name.startswith(_DENSE)}  # noqa: SIM118

        def read(layer: str) -> QuantizedTensor:
            with safe_open(files[layer], "pt") as file:
                stored = [part for part in _PARTS if f"{layer}.{part}" in file.keys()]  # noqa: SIM118
                return QuantizedTensor(**{part: file.get_tensor(f"{layer}.{part}") for part in stored}, grid=grids[layer])

        return read

    @staticmethod
    def read_dense(directory: Path) -> dict[str, Tensor]:
        """All other tensors that a finished quantization changed, by the name the model class gives them."""
        tensors = {}
        for path in sorted(directory.glob("block-*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name.startswith(_DENSE):
                        tensors[name.removeprefix(_DENSE)] = file.get_tensor(name)
        return tensors


class HiddenStates:
    """The hidden states between two blocks, in batches: on disk always (to resume from), and in memory if wanted."""

    def __init__(self, directory: Path, in_memory: bool) -> None:
        self.directory, self._in_memory = directory, in_memory
        self._kept: dict[int, Tensor] = {}

    def load(self, batch: int) -> Tensor:
        """Hidden states of one batch, ``[windows, tokens, hidden]``."""
        # Handed out once: the forward lets go of its input half way through the block, and so must this.
        return self._kept.pop(batch) if batch in self._kept else self.read(self.directory, batch)

    def store(self, directory: Path, batch: int, hidden: Tensor) -> None:
        """Write one batch below ``directory`` (temporary, renamed by the caller when all are there)."""
        hidden = hidden.detach()
        self.write(directory, batch, hidden)
        if self._in_memory:
            self._kept[batch] = hidden

    @classmethod
    def read(cls, directory: Path, batch: int) -> Tensor:
        """One batch's file below ``directory``."""
        with safe_open(cls._file(directory, batch), "pt") as file:
            tensor: Tensor = file.get_tensor("hidden")
        return tensor

    @classmethod
    def read_windows(cls, directory: Path, windows: Sequence[int], per_batch: int) -> Tensor:
        """Single windows out of the files below ``directory``, which hold ``per_batch`` each (the last one perhaps fewer)."""
        rows = []
        for window in windows:
            batch, row = divmod(window, per_batch)
            with safe_open(cls._file(directory, batch), "pt") as file:
                rows.append(file.get_slice("hidden")[row : row + 1])
        return torch.cat(rows)

    @classmethod
    def write(cls, directory: Path, batch: int, hidden: Tensor) -> None:
        """Write one batch's file below ``directory``."""
        write_tensors(cls._file(directory, batch), {"hidden": hidden})

    @staticmethod
    def _file(directory: Path, batch: int) -> Path:
        return directory / f"batch-{batch:05d}.safetensors"
