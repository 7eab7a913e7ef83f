"""Damaged GGUF files are read or refused as bad input, and nothing else, in bounded time and memory.

Mutants are read in a process of their own (this file, run as a script), whose address space is limited: whatever a file claims,
reading it may not take more than a few of its own sizes. A failure's seed makes the same mutant again.
"""

from __future__ import annotations

import json
import random
import resource
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Type

from quantize.checkpoint import open_checkpoint
from quantize.errors import InputError
from quantize.gguf_checkpoint import dequantize
from quantize.gguf_reader import GgufReader

PROJECT = Path(__file__).resolve().parents[2]
TENSOR_COUNT, KEY_COUNT = 8, 16
ADVERSARIAL = (
    *(0, 1, 2, 3, 4, 5, 8, 9, 13, 24, 31, 33, 64, 255, 256, 65535, 65536),
    *(base + step for base in (2**31, 2**32, 2**40, 2**60, 2**62, 2**63, 2**64) for step in (-32, -1, 0, 1)),
)


class Layout(NamedTuple):
    """Where things are in a sound file, in bytes: ``(offset, size)`` of numbers, ``(begin, end)`` of whole entries.

    ``values`` are the numbers that are a key's whole value: changing them leaves the file sound and the model absurd.
    """

    numbers: list[tuple[int, int]]
    values: list[tuple[int, int]]
    keys: list[tuple[int, int]]
    tensors: list[tuple[int, int]]
    header: int


def layout(file: Path) -> Layout:
    """Found by gguf-py, so that no mistake of the reader's hides a part of the file from the mutator."""
    reader = gguf.GGUFReader(file)
    found = Layout([], [], [], [], reader.data_offset)
    entries = [(field, found.keys) for field in reader.fields.values()]
    entries += [(tensor.field, found.tensors) for tensor in reader.tensors]
    for field, spans in entries:
        position = field.offset
        for part in field.parts:
            size = min(part.nbytes, part.itemsize) or 1
            if size > 1 or part.nbytes == 1:
                found.numbers.extend((position + i, size) for i in range(0, part.nbytes, size))
            position += part.nbytes
        if len(field.types) == 1 and field.types[0] is not Type.STRING and not field.name.startswith("GGUF."):
            found.values.append((position - field.parts[-1].nbytes, field.parts[-1].nbytes))
        if not field.name.startswith("GGUF."):
            spans.append((field.offset, position))
    return found


def flip(content: bytearray, where: Layout, random: random.Random) -> None:
    for _ in range(random.randint(1, 8)):
        end = len(content) if random.random() < 0.4 else min(where.header, len(content))
        content[random.randrange(end)] ^= 1 << random.randrange(8)


def truncate(content: bytearray, where: Layout, random: random.Random) -> None:
    del content[random.randint(1, len(content)) :]


def overwrite(content: bytearray, where: Layout, random: random.Random) -> None:
    """A number of the header, mostly by one chosen to do harm, sometimes by a neighbour of what it was."""
    change(content, *random.choice(where.numbers), random)


def overwrite_value(content: bytearray, where: Layout, random: random.Random) -> None:
    change(content, *random.choice(where.values or where.numbers), random)


def change(content: bytearray, position: int, size: int, random: random.Random) -> None:
    old = int.from_bytes(content[position : position + size], "little")
    new = random.choice((*ADVERSARIAL, *ADVERSARIAL, old - 1, old + 1, 2 * old, random.getrandbits(8 * size)))
    content[position : position + size] = (new % 256**size).to_bytes(size, "little")


def overwrite_anywhere(content: bytearray, where: Layout, random: random.Random) -> None:
    position, size = random.randrange(4, where.header), random.choice((4, 8))
    content[position : position + size] = (random.choice(ADVERSARIAL) % 256**size).to_bytes(size, "little")


def splice(content: bytearray, where: Layout, random: random.Random) -> None:
    """Put a piece of the file into another place, over or between what is there; or leave a piece out."""
    begin = random.randrange(len(content))
    piece = content[begin : begin + random.randint(1, 200)]
    to = random.randrange(4, len(content))
    length = random.choice((0, len(piece), random.randint(1, 64)))
    content[to : to + length] = piece if random.random() < 0.7 else b""


def duplicate(content: bytearray, where: Layout, random: random.Random) -> None:
    """An entry twice, counted or not."""
    spans, count = random.choice([(where.keys, KEY_COUNT), (where.tensors, TENSOR_COUNT)])
    begin, end = random.choice(spans)
    to = random.choice(spans)[0]
    content[to:to] = content[begin:end]
    if random.random() < 0.8:
        struct.pack_into("<Q", content, count, struct.unpack_from("<Q", content, count)[0] + 1)


MUTATIONS = (flip, truncate, overwrite, overwrite, overwrite_value, overwrite_value, overwrite_anywhere, splice, duplicate)


def mutant(content: bytes, where: Layout, seed: int) -> bytes:
    """A copy with one to three things wrong; those after the first may meet a file whose parts have moved."""
    chance = random.Random(seed)
    damaged = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 3))):
        if len(damaged) > 24:
            chance.choice(MUTATIONS)(damaged, where, chance)
    return bytes(damaged)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_values(file: Path) -> None:
    """Every type of value, and arrays of each."""
    writer = gguf.GGUFWriter(file, "llama")
    numbers = [kind for kind in Type if kind not in (Type.STRING, Type.ARRAY, Type.BOOL)]
    for kind in numbers:
        writer.add_key_value(f"one.{kind.name}", 3, kind)
        writer.add_key_value(f"many.{kind.name}", [1, 2, 3], Type.ARRAY, kind)
    writer.add_bool("one.BOOL", True)
    writer.add_array("many.BOOL", [True, False])
    writer.add_string("one.STRING", "a word ✓")
    writer.add_array("many.STRING", [f"token {i}" for i in range(20)])
    writer.add_array("nested", [[1, 2], [3]])
    writer.add_array("deep", [[["a"], ["b", "c"]], [["d"]]])
    writer.add_custom_alignment(16)
    writer.add_tensor("only", np.arange(6, dtype=np.float32).reshape(2, 3))
    finish(writer)


def write_tensors(file: Path) -> None:
    """A tensor of every type."""
    writer = gguf.GGUFWriter(file, "llama")
    generator = np.random.default_rng(0)
    for i, kind in enumerate(kind for kind in Kind if kind is not Kind.Q8_1):
        rows = [(), (3,), (2, 2), (1, 2, 2)][i % 4]
        raw = generator.integers(0, 256, (*rows, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        writer.add_tensor(f"tensor.{kind.name}", raw, raw_dtype=kind)
    finish(writer)


def write_model(file: Path) -> None:
    """A Llama of one block with a tokenizer, as small as transformers takes it."""
    writer = gguf.GGUFWriter(file, "llama")
    tokens = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyzĠ", "th", "the", "Ġthe"]
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2))
    writer.add_token_merges(["t h", "th e", "Ġ the"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    generator = np.random.default_rng(0)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    shapes = {f"blk.0.{name}": shape for name, shape in shapes.items()} | {"token_embd": (len(tokens), 32)}
    for name, shape in shapes.items():
        weight = generator.standard_normal(shape, np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, Kind.Q8_0), raw_dtype=Kind.Q8_0)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    finish(writer)


def read_file(file: Path) -> None:
    """All of a file."""
    reader = GgufReader(file)
    for key in reader.fields:
        assert reader.encoded(key)
        assert reader.fields[key] is not None
    for name, info in reader.tensors.items():
        data = reader.data(name)
        assert data.nbytes == info.nbytes
        try:
            values = dequantize(data, info.kind)
        except (KeyError, NotImplementedError):
            assert info.kind in ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K", "Q2_0", "NVFP4", "Q1_0"), info.kind
        else:
            assert values.shape == info.shape
    reader.release()


def read_model(file: Path) -> None:
    """All that a pipeline asks of a checkpoint."""
    checkpoint = open_checkpoint(str(file))
    for name in checkpoint.names():
        assert tuple(checkpoint.tensor(name).shape) == checkpoint.shape(name)
    checkpoint.config_dict()
    checkpoint.release()
    checkpoint.tokenizer()


READ = {"values": read_file, "tensors": read_file, "model": read_model}
WRITE = {"values": write_values, "tensors": write_tensors, "model": write_model}


def caused_by_memory(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, MemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


def outcome(what: str, file: Path) -> str:
    try:
        READ[what](file)
    except InputError as error:
        named = str(file) in str(error)
        return "refused" if named and not caused_by_memory(error) else f"{error!r} from {error.__cause__!r}"
    except BaseException as error:  # the tokenizers library's panics are no Exceptions
        return repr(error)
    return "read"


def limit_memory(more: int) -> None:
    """Allow this process ``more`` bytes of address space than it has now."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))


def run_mutants(what: str, directory: Path, first: int, last: int, allowance: int) -> None:
    """The child: read mutants number ``first`` to ``last - 1`` and print what came of them."""
    content = (directory / f"{what}.gguf").read_bytes()
    where = layout(directory / f"{what}.gguf")
    READ[what](directory / f"{what}.gguf")  # libraries load and cache what they need before memory is limited
    if sys.platform == "linux":
        limit_memory(allowance)
    outcomes: Counter[str] = Counter()
    failures, slowest = {}, 0.0
    for seed in range(first, last):
        print(seed, flush=True)
        file = directory / "mutant.gguf"
        file.unlink(missing_ok=True)  # to write over a file is to wait for the disk
        file.write_bytes(mutant(content, where, seed))
        begin = time.perf_counter()
        result = outcome(what, file)
        slowest = max(slowest, time.perf_counter() - begin)
        if result in ("read", "refused"):
            outcomes[result] += 1
        else:
            failures[seed] = result
    print(json.dumps({"outcomes": outcomes, "failures": failures, "slowest": slowest}))


def fuzz(what: str, directory: Path, first: int, last: int, allowance: int) -> dict[str, Any]:
    WRITE[what](directory / f"{what}.gguf")
    arguments = [what, str(directory), str(first), str(last), str(allowance)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *arguments],
        capture_output=True,
        text=True,
        timeout=60 + (last - first),
        cwd=PROJECT,
        env={"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    assert done.returncode == 0, f"ended with {done.returncode} at mutant {done.stdout[-10:]}: {done.stderr[-2000:]}"
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def check(result: dict[str, Any], mutants: int) -> None:
    assert result["failures"] == {}
    assert sum(result["outcomes"].values()) == mutants
    # Both happen, or the mutator is too tame or too wild to show anything.
    assert min(result["outcomes"]["read"], result["outcomes"]["refused"]) > mutants // 50
    assert result["slowest"] < 10


@pytest.mark.parametrize("what", ["values", "tensors"])
def test_mutants(tmp_path: Path, what: str) -> None:
    check(fuzz(what, tmp_path, 0, 150, 64 << 20), 150)


def test_mutants_as_checkpoints(tmp_path: Path) -> None:
    check(fuzz("model", tmp_path, 0, 150, 512 << 20), 150)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["values", "tensors"])
def test_many_mutants(tmp_path: Path, what: str) -> None:
    check(fuzz(what, tmp_path, 1000, 6000, 64 << 20), 5000)


@pytest.mark.slow
def test_many_mutants_as_checkpoints(tmp_path: Path) -> None:
    check(fuzz("model", tmp_path, 1000, 3000, 512 << 20), 2000)


if __name__ == "__main__":
    run_mutants(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
