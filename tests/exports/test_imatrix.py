"""Importance matrices: both of llama.cpp's formats, what damage is called, and the values against transformers' own forward."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config

from calibration import imatrix as collector
from exports.imatrix import ImatrixEntry, read, write
from quantize.checkpoint import open_checkpoint
from quantize.errors import InputError

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CPU = torch.device("cpu")
finite = st.floats(0, 2.0**100, width=32)


@st.composite
def entry(draw: st.DrawFn) -> ImatrixEntry:
    """Of one matrix, or of some experts."""
    experts, columns = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    values = draw(st.lists(finite, min_size=experts * columns, max_size=experts * columns))
    counts = draw(st.lists(st.integers(0, 2**24), min_size=experts, max_size=experts))
    sums = np.array(values, np.float32).reshape(experts, columns)
    return ImatrixEntry(sums[0] if experts == 1 else sums, np.array(counts, np.int64))


def one(columns: int = 4) -> dict[str, ImatrixEntry]:
    return {"blk.0.attn_q.weight": ImatrixEntry(np.arange(columns, dtype=np.float32), np.array([2], np.int64))}


def legacy(entries: dict[str, tuple[int, list[float]]], tail: bytes = b"") -> bytes:
    """The bytes of the older format, by its description."""
    parts = [struct.pack("<i", len(entries))]
    for name, (calls, values) in entries.items():
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", calls, len(values))]
        parts.append(struct.pack(f"<{len(values)}f", *values))
    return b"".join(parts) + tail


@given(entries=st.dictionaries(st.from_regex(r"blk\.[0-9]\.[a-z_]{1,12}\.weight", fullmatch=True), entry(), min_size=1))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, entries: dict[str, ImatrixEntry]) -> None:
    file = tmp_path_factory.mktemp("imatrix") / "i.gguf"
    write(file, entries, ["text.txt"], 3, 512)
    found = read(file)
    assert found.keys() == entries.keys()
    for name, expected in entries.items():
        assert found[name].sums.dtype == np.float32 and found[name].counts.dtype == np.int64
        assert np.array_equal(found[name].sums, expected.sums)
        assert np.array_equal(found[name].counts, expected.counts)


def test_the_file_has_llama_cpps_keys_tensors_and_nothing_else(tmp_path: Path) -> None:
    entries = one() | {"blk.0.ffn_up_exps.weight": ImatrixEntry(np.ones((3, 5), np.float32), np.array([1, 0, 2], np.int64))}
    write(tmp_path / "a", entries, ["one.txt", "two.txt"], 64, 512)
    write(tmp_path / "b", dict(reversed(entries.items())), ["one.txt", "two.txt"], 64, 512)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    reader = gguf.GGUFReader(tmp_path / "a")
    own = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert own == {
        "general.type": "imatrix",
        "imatrix.datasets": ["one.txt", "two.txt"],
        "imatrix.chunk_count": 64,
        "imatrix.chunk_size": 512,
    }
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes == {
        "blk.0.attn_q.weight.in_sum2": [4, 1],
        "blk.0.attn_q.weight.counts": [1, 1],
        "blk.0.ffn_up_exps.weight.in_sum2": [5, 3],
        "blk.0.ffn_up_exps.weight.counts": [1, 3],
    }
    assert list(shapes) == sorted(shapes, key=lambda name: (name.rsplit(".", 1)[0], name.endswith("counts")))
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}


def test_means_are_what_llama_quantize_weighs_with() -> None:
    experts = ImatrixEntry(np.array([[2, 4], [0, 0]], np.float32), np.array([2, 0], np.int64))
    assert experts.means().tolist() == [[1, 2], [1, 1]]
    assert one()["blk.0.attn_q.weight"].means().tolist() == [0, 0.5, 1, 1.5]


@pytest.mark.parametrize("tail", [b"", struct.pack("<ii", 7, 4) + b"text"])
def test_the_older_format_gives_the_same_means(tmp_path: Path, tail: bytes) -> None:
    file = tmp_path / "old.dat"
    file.write_bytes(legacy({"blk.0.attn_q.weight": (7, [7.0, 14.0]), "blk.1.attn_q.weight": (1, [3.0])}, tail))
    found = read(file)
    assert {name: entry.means().tolist() for name, entry in found.items()} == {
        "blk.0.attn_q.weight": [1.0, 2.0],
        "blk.1.attn_q.weight": [3.0],
    }


@given(data=st.binary(max_size=200))
def test_no_bytes_are_read_as_nonsense(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.mktemp("damage") / "i"
    file.write_bytes(data)
    try:
        found = read(file)
    except InputError as error:
        assert str(file) in str(error)
    else:
        assert all(np.isfinite(entry.sums).all() and (entry.counts > 0).all() for entry in found.values())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("older", [False, True])
def test_half_a_file_is_damaged(tmp_path: Path, share: float, older: bool) -> None:
    file = tmp_path / "i"
    file.write_bytes(legacy({"blk.0.attn_q.weight": (7, [1.0] * 64)})) if older else write(file, one(64), ["t"], 1, 512)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match="make it again"):
        read(file)


def test_other_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.gguf cannot be read"):
        read(tmp_path / "none.gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="of type model, no importance matrix"):
        read(tmp_path / "model.gguf")


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_sums_that_cannot_be_are_refused(tmp_path: Path, bad: float) -> None:
    (tmp_path / "old.dat").write_bytes(legacy({"blk.0.attn_q.weight": (1, [1.0, bad])}))
    with pytest.raises(InputError, match=r"blk\.0\.attn_q\.weight holds sums of squares"):
        read(tmp_path / "old.dat")


def test_nothing_unfit_is_written(tmp_path: Path) -> None:
    unfit = {"a": ImatrixEntry(np.ones(4, np.float32), np.ones(2, np.int64))}
    infinite = {"a": ImatrixEntry(np.full(4, np.inf, np.float32), np.ones(1, np.int64))}
    for entries, datasets in ((unfit, ["t"]), (infinite, ["t"]), ({}, ["t"]), (one(), [])):
        with pytest.raises(InputError):
            write(tmp_path / "i.gguf", entries, datasets, 1, 512)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
def expected_sums(path: Path, windows: Tensor) -> dict[str, tuple[Tensor, int]]:
    """Sums of squares of every linear layer's inputs, from one forward of transformers' own model."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found: dict[str, tuple[Tensor, int]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def add(_: nn.Module, args: tuple[Tensor]) -> None:
            rows = args[0].double().reshape(-1, args[0].shape[-1])
            found[name] = (rows.square().sum(0), len(rows))

        return add

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(watch(name))
    model(windows, use_cache=False)
    return found


def test_sums_are_those_of_transformers_inputs(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "_BATCH_TOKENS", 70)  # several batches, the last one smaller
    windows = torch.randint(2, 300, (5, 33), generator=torch.Generator().manual_seed(3))
    found = collector.collect(open_checkpoint(str(tiny_llama)), windows, device=CPU, dtype=torch.float32, output=True)
    expected = expected_sums(tiny_llama, windows)
    translated = {
        f"blk.{i}.{theirs}.weight": expected[f"model.layers.{i}.{ours}"] for i in range(4) for ours, theirs in NAMES.items()
    }
    # The output embedding is the input embedding's matrix here.
    translated["token_embd.weight"] = expected["lm_head"]
    assert found.keys() == translated.keys()
    for name, (sums, count) in translated.items():
        assert found[name].counts.tolist() == [count] == [5 * 33]
        np.testing.assert_allclose(found[name].sums, sums.float().numpy(), rtol=1e-5, err_msg=name)


def test_the_command_writes_the_windows_it_says(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {i} says that {i} squared is {i * i}." for i in range(200)))
    checkpoint = open_checkpoint(str(tiny_llama))
    common = ["--text", str(text), "--seq-len", "32", "--device", "cpu"]
    assert collector.main([str(tiny_llama), str(tmp_path / "i.gguf"), *common, "--chunks", "6"]) == 0
    found = read(tmp_path / "i.gguf")
    assert len(found) == 4 * len(NAMES) and all(entry.counts.tolist() == [6 * 32] for entry in found.values())
    fields = gguf.GGUFReader(tmp_path / "i.gguf").fields
    assert fields["imatrix.datasets"].contents() == ["text.txt"]
    assert (fields["imatrix.chunk_count"].contents(), fields["imatrix.chunk_size"].contents()) == (6, 32)

    arguments = [str(tiny_llama), "out", *common, "--chunks", "3", "--in-order", "--part", "all"]
    plain = collector.choose_windows(checkpoint, collector.parse(arguments))
    ids = checkpoint.tokenizer()(text.read_text(), add_special_tokens=False)["input_ids"]
    assert plain.flatten().tolist() == ids[: 3 * 32]
    with_bos = collector.choose_windows(checkpoint, collector.parse([*arguments, "--bos"]))
    assert with_bos[:, 0].tolist() == [checkpoint.tokenizer().bos_token_id] * 3
    assert torch.equal(with_bos[:, 1:], plain[:, 1:])


def test_bad_input_of_the_command_is_one_line(
    tiny_llama: Path, tmp_path: Path, make_checkpoint: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(make_checkpoint)
    target = str(tmp_path / "i.gguf")
    small = ["--chunks", "2", "--seq-len", "32", "--device", "cpu"]
    assert collector.main([str(tiny_llama), target, "--chunks", "1000000", "--in-order", "--device", "cpu"]) == 2
    assert "use --chunks -1" in capsys.readouterr().err
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    other = make_checkpoint(tmp_path / "gpt2", config)
    for file in tiny_llama.glob("*token*"):
        (other / file.name).write_bytes(file.read_bytes())
    assert collector.main([str(other), target, *small]) == 2
    assert "model_type=gpt2" in capsys.readouterr().err
    assert not Path(target).exists()
