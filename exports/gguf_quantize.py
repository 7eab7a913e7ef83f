"""GGUF files in 16 or 32 bits to quantized ones: ``python -m exports.gguf_quantize IN.gguf OUT.gguf Q4_K_M``.

The files are those of llama.cpp's ``llama-quantize`` without an importance matrix (``src/llama-quant.cpp``): its mixes, its
order of tensors, its metadata, its bytes. Tensors are read, rounded and written in pieces by a few threads, each with buffers
of its own, so memory does not depend on the model; numpy holds no lock while it computes.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exports.gguf_header import Plan, plan_file
from exports.gguf_layout import TYPES, Bytes
from exports.gguf_mix import ALIASES, FILE_TYPES, quantizable, tensor_types
from exports.gguf_throughput import TensorReport, copy_rate, describe, processors
from exports.gguf_types import SLICE, convert_into
from quantize.atomic import atomic_path
from quantize.errors import InputError
from quantize.gguf_reader import GgufReader, GgufTensorInfo

# Weights a thread takes at a time: enough that handing them out costs nothing, few enough that the threads end together.
_PIECE = 4 * SLICE


@dataclass(frozen=True)
class Options:
    """What the command line can change.

    Attributes:
        file_type: a name in :data:`exports.gguf_mix.FILE_TYPES`.
        pure: every matrix in the file type's own tensor type.
        embedding: tensor type of the token embedding; None: by the mix.
        output: tensor type of the output matrix; None: by the mix.
        threads: how many compute; None: as many as there are processors to run on.
    """

    file_type: str
    pure: bool = False
    embedding: str | None = None
    output: str | None = None
    threads: int | None = None


@dataclass(frozen=True)
class _Piece:
    """``count`` weights of a tensor, bytes where its blocks are copied, and where they lie in both files."""

    name: str
    count: int
    source: int
    target: int


def quantize_file(source: Path, target: Path, options: Options) -> list[TensorReport]:
    """Quantize a GGUF file.

    Args:
        source: a whole (unsplit) model; tensors that are to change must be F32, F16 or BF16.
        target: written atomically; an existing file is replaced.
        options: the file type and what deviates from its mix.

    Returns:
        One report a tensor, in the order in which the tensors lie in ``target``.

    Raises:
        InputError: ``source`` is damaged, quantized already, one of several parts or ``target`` itself; a value is not finite;
            a type does not fit a tensor; the disk is full.
    """
    if target.exists() and target.samefile(source):
        raise InputError(f"{target} is the input as well; give the output another name, for example {target.stem}-q4.gguf")
    reader = GgufReader(source)
    kinds = chosen_kinds(reader, options)
    plan = plan_file(reader, kinds, FILE_TYPES[options.file_type])
    threads = options.threads or processors()
    with source.open("rb") as before, atomic_path(target) as temporary, temporary.open("wb") as after:
        after.write(plan.header)
        after.truncate(plan.size)
        after.flush()
        worker = _Worker(reader, kinds, before.fileno(), after.fileno())
        spent = _in_parallel(worker, list(_pieces(reader, kinds, plan)), threads)
    return [
        TensorReport(
            name,
            reader.tensors[name].kind,
            kinds[name],
            _weights(reader.tensors[name]),
            reader.tensors[name].nbytes + plan.nbytes[name],
            spent.get(name, 0.0) / threads,
        )
        for name in plan.offsets
    ]


def chosen_kinds(reader: GgufReader, options: Options) -> dict[str, str]:
    """Types of all tensors by name, in the file's order; tensors that are not quantized keep theirs.

    Raises:
        InputError: a tensor is quantized already, the file is one of several, or a type does not fit.
    """
    if _number(reader, "split.count", 1) > 1:
        raise InputError(f"{reader.path} is one of several parts; join them first with llama-gguf-split --merge")
    architecture = reader.architecture
    heads = _number(reader, f"{architecture}.attention.head_count", 0)
    mixed = tensor_types(
        [(name, info.shape) for name, info in reader.tensors.items()],
        options.file_type,
        layers=_number(reader, f"{architecture}.block_count"),
        heads=heads,
        kv_heads=_number(reader, f"{architecture}.attention.head_count_kv", heads),
        experts=_number(reader, f"{architecture}.expert_count", 0),
        architecture=architecture,
        pure=options.pure,
        embedding=options.embedding,
        output=options.output,
    )
    kinds = {}
    for name, info in reader.tensors.items():
        kinds[name] = mixed[name] if quantizable(name, info.shape) else info.kind
        if kinds[name] != info.kind and info.kind not in ("F32", "F16", "BF16"):
            raise InputError(
                f"{reader.path}: {name} is {info.kind} already, and quantizing twice loses quality; "
                "give the model in 16 bits, for example as converted to F16"
            )
    return kinds


def _number(reader: GgufReader, key: str, default: int | None = None) -> int:
    """An integer of the metadata, or the first of one for each layer."""
    value = reader.field(key) if default is None else reader.field(key, default)
    numbers = np.ravel(np.asarray(value))
    if not numbers.size or numbers.dtype.kind not in "iu":
        raise InputError(f"{reader.path}: {key} is {value!r}; it must be an integer like 32")
    return int(numbers[0])


def _weights(info: GgufTensorInfo) -> int:
    return int(np.prod(info.shape, dtype=np.int64))


def _pieces(reader: GgufReader, kinds: dict[str, str], plan: Plan) -> Iterator[_Piece]:
    for name, offset in plan.offsets.items():
        info = reader.tensors[name]
        if kinds[name] not in TYPES:
            # Copied as it is: bytes, whatever they mean.
            for start in range(0, info.nbytes, 4 * _PIECE):
                yield _Piece(name, min(4 * _PIECE, info.nbytes - start), info.offset + start, offset + start)
            continue
        before, after, weights = TYPES[info.kind], TYPES[kinds[name]], _weights(info)
        for start in range(0, weights, _PIECE):
            source = info.offset + start // before.block_size * before.type_size
            target = offset + start // after.block_size * after.type_size
            yield _Piece(name, min(_PIECE, weights - start), source, target)


def _in_parallel(worker: _Worker, pieces: Sequence[_Piece], threads: int) -> dict[str, float]:
    """Thread seconds by tensor. The first error stops what has not begun."""
    spent: dict[str, float] = {piece.name: 0.0 for piece in pieces}
    with ThreadPoolExecutor(threads) as pool:
        try:
            for piece, seconds in zip(pieces, pool.map(worker, pieces), strict=True):
                spent[piece.name] += seconds
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return spent


class _Worker:
    """Reads, rounds and writes one piece; every thread has its own buffers."""

    def __init__(self, reader: GgufReader, kinds: dict[str, str], source: int, target: int) -> None:
        self._reader, self._kinds, self._source, self._target = reader, kinds, source, target
        self._local = threading.local()

    def __call__(self, piece: _Piece) -> float:
        started = time.thread_time()
        kind = self._kinds[piece.name]
        try:
            written = self._converted(piece) if kind in TYPES else self._read(piece, piece.count)
        except ValueError as error:
            raise InputError(f"{self._reader.path}: {piece.name} cannot become {kind}: {error}") from error
        position = piece.target
        while len(written):
            done = os.pwrite(self._target, written.data, position)
            written, position = written[done:], position + done
        return time.thread_time() - started

    def _converted(self, piece: _Piece) -> Bytes:
        before, after = TYPES[self._reader.tensors[piece.name].kind], TYPES[self._kinds[piece.name]]
        raw = self._read(piece, piece.count // before.block_size * before.type_size)
        if before is after and not before.dense:
            return raw
        written = self._buffer("written", piece.count // after.block_size * after.type_size)
        convert_into(raw, before, after, written)
        return written

    def _read(self, piece: _Piece, count: int) -> Bytes:
        raw = self._buffer("raw", count)
        if os.preadv(self._source, [raw.data], piece.source) != count:
            raise InputError(f"{self._reader.path} was changed while it was being read; leave it alone and start again")
        return raw

    def _buffer(self, name: str, size: int) -> Bytes:
        buffer: Bytes | None = getattr(self._local, name, None)
        if buffer is None or len(buffer) < size:
            buffer = np.empty(size, np.uint8)
            setattr(self._local, name, buffer)
        return buffer[:size]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m exports.gguf_quantize", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, metavar="IN.gguf", help="a model in F16, BF16 or F32")
    parser.add_argument("target", type=Path, metavar="OUT.gguf")
    parser.add_argument("file_type", type=str.upper, metavar="TYPE", help=", ".join(FILE_TYPES))
    parser.add_argument("--pure", action="store_true", help="no mix: every matrix in the same type")
    parser.add_argument("--token-embedding-type", type=str.upper, metavar="T", help="type of the token embedding")
    parser.add_argument("--output-tensor-type", type=str.upper, metavar="T", help="type of the output matrix")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one for each processor")
    parser.add_argument("--verbose", action="store_true", help="time and throughput of every tensor")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; exit code 2 for bad input."""
    parsed = _parse(arguments)
    started = time.perf_counter()
    file_type = ALIASES.get(parsed.file_type, parsed.file_type)
    options = Options(file_type, parsed.pure, parsed.token_embedding_type, parsed.output_tensor_type, parsed.threads)
    try:
        if parsed.threads is not None and parsed.threads < 1:
            raise InputError(f"--threads is {parsed.threads}; at least 1 is needed, for example 2")
        reports = quantize_file(parsed.source, parsed.target, options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - started
    if parsed.verbose:
        print(describe(reports, copy_rate(parsed.threads or processors())))
    kinds = Counter(one.target for one in reports)
    size, weights = parsed.target.stat().st_size, sum(one.weights for one in reports)
    mix = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    print(f"{parsed.target}: {size / 1e6:.1f} MB, {8 * size / weights:.2f} bits a weight ({mix}), in {seconds:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
