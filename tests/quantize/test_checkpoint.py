"""Checkpoints: every readable layout gives the same tensors, every bad one a message that names the file."""

from __future__ import annotations

import json
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig

from quantize.checkpoint import SIDE_FILES, open_checkpoint
from quantize.errors import InputError

MakeCheckpoint = Callable[..., Path]

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def single(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama, to be damaged."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "single"))


@pytest.fixture
def sharded(single: Path) -> Path:
    """The same in two shards."""
    stored = load_file(single / "model.safetensors")
    (single / "model.safetensors").unlink()
    names = sorted(stored)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: stored[name] for name in part}, single / file)
        weight_map.update(dict.fromkeys(part, file))
    (single / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return single


def edit_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shard_size", ["1GB", "10KB"])
def test_tensors_are_what_the_model_saved(
    tmp_path: Path, make_checkpoint: MakeCheckpoint, dtype: torch.dtype, shard_size: str
) -> None:
    make_checkpoint(tmp_path, CONFIG, dtype, max_shard_size=shard_size)
    checkpoint = open_checkpoint(str(tmp_path))
    stored = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert checkpoint.names() == sorted(stored)
    assert (len(checkpoint.weight_files()) > 1) == (shard_size == "10KB")
    assert set(checkpoint.weight_files()) == set(tmp_path.glob("*.safetensors"))
    for name, tensor in stored.items():
        assert checkpoint.dtype(name) == checkpoint.tensor(name).dtype == dtype
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(checkpoint.tensor(name), tensor)
    assert checkpoint.num_parameters() == sum(tensor.numel() for tensor in stored.values())
    assert checkpoint.config.model_type == "llama"


def test_single_and_sharded_are_alike(tiny_llama: Path, sharded: Path) -> None:
    left, right = open_checkpoint(str(tiny_llama)), open_checkpoint(str(sharded))
    assert left.names() == right.names()
    assert all(torch.equal(left.tensor(name), right.tensor(name)) for name in left.names())


def test_config_is_handed_on_as_it_was_written(single: Path) -> None:
    edit_json(single / "config.json", quantization_config=None, my_own_key=[1, 2])
    config = json.loads((single / "config.json").read_text())
    del config["quantization_config"]
    assert open_checkpoint(str(single)).config_dict() == config


def test_tokenizer_and_side_files(single: Path, tmp_path: Path) -> None:
    (single / "chat_template.jinja").write_text("{{ messages }}")
    checkpoint = open_checkpoint(str(single))
    ids = checkpoint.tokenizer()("def main(): pass")["input_ids"]
    assert checkpoint.tokenizer().decode(ids) == "def main(): pass"
    copy = tmp_path / "copy"
    copy.mkdir()
    checkpoint.copy_side_files(copy)
    assert {file.name for file in copy.iterdir()} == {file.name for file in single.iterdir()} & set(SIDE_FILES)
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= {file.name for file in copy.iterdir()}
    assert AutoTokenizer.from_pretrained(copy)("def main(): pass")["input_ids"] == ids


def test_fingerprint_covers_weights_config_and_tokenizer(sharded: Path) -> None:
    names = {file.name for file in open_checkpoint(str(sharded)).fingerprint_files()}
    assert names >= {SHARD, "model-00002-of-00002.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert "chat_template.jinja" not in names


def test_path_may_start_at_home(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(single.parent))
    assert open_checkpoint("~/single").path == single


# Bad input.


@pytest.mark.parametrize("path", ["/nowhere/at/all", "missing", "a/b/c", "a/b@c d", ""])
def test_path_that_does_not_exist(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if not path:  # the working directory itself, which holds nothing
        refused(Path(path), "has no config.json")
    else:
        with pytest.raises(InputError, match=rf"model\.path={re.escape(path)} does not exist; give a model directory"):
            open_checkpoint(path)


def test_file_of_another_kind(single: Path) -> None:
    refused(single / "model.safetensors", r"model\.safetensors is a file but not a \.gguf file; give its directory")


def test_directory_without_config(single: Path) -> None:
    (single / "config.json").unlink()
    refused(single, rf"{single} has no config\.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config\.json is not valid JSON"),
        ("", r"config\.json is not valid JSON"),
        ("[]", r"config\.json holds no JSON object but list"),
        ("{}", r"config\.json has no model_type"),
        ('{"model_type": "nosuch"}', r"config\.json: model_type='nosuch' is not usable"),
        ('{"model_type": ["llama"]}', r"config\.json: model_type=\['llama'\] is not usable"),
        ('{"model_type": "llama", "hidden_size": "wide"}', r"config\.json: model_type='llama' is not usable .*hidden_size"),
        ('{"model_type": "llama", "num_attention_heads": 0}', r"config\.json: model_type='llama' is not usable"),
        (
            '{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}',
            r"is quantized already \(awq\); give the FP16, BF16 or FP32 checkpoint",
        ),
        ('{"model_type": "llama", "quantization_config": {"bits": 4}}', r"is quantized already \(unknown\)"),
        ('{"model_type": "llama", "quantization_config": "gptq"}', r"is quantized already \(gptq\)"),
    ],
)
def test_bad_config(single: Path, text: str, message: str) -> None:
    (single / "config.json").write_text(text)
    refused(single, message)


def test_config_that_is_not_text(single: Path) -> None:
    (single / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(single, r"config\.json is not valid JSON")


def test_remote_code_is_never_run(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when somebody, or a script that says yes to everything, answers the question of transformers."""
    marker = single / "executed"
    (single / "custom.py").write_text(
        f"open({str(marker)!r}, 'w')\nfrom transformers import PretrainedConfig\n"
        "class Custom(PretrainedConfig):\n    model_type = 'custom'\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    edit_json(single / "config.json", model_type="custom", auto_map={"AutoConfig": "custom.Custom"})
    refused(single, r"config\.json: model_type='custom' is not usable")
    edit_json(single / "config.json", model_type="llama", auto_map={})
    edit_json(
        single / "tokenizer_config.json",
        tokenizer_class="Custom",
        auto_map={"AutoTokenizer": ["custom.Custom", "custom.Custom"]},
    )
    with pytest.raises(InputError, match=rf"{single} has no usable tokenizer"):
        open_checkpoint(str(single)).tokenizer()
    assert not marker.exists()


@pytest.mark.parametrize("kept", [0, 4, 8, 9, 300, -50_000, -1])
def test_truncated_weights(single: Path, kept: int) -> None:
    file = single / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(single, rf"{file} is truncated or corrupted \(.+\); fetch it again")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"\xff" * 8 + content[8:],  # a header longer than the file
        lambda content: content[:8] + b"\x00" * 100 + content[108:],
        lambda content: content.replace(b'"dtype":"F16"', b'"dtype":"F99"', 1),
        lambda content: content.replace(b'"shape":[64,64]', b'"shape":[64,65]', 1),
        lambda content: content + b"trailing bytes",
    ],
    ids=["length", "zeros", "dtype", "shape", "trailing"],
)
def test_corrupted_header(single: Path, damage: Callable[[bytes], bytes]) -> None:
    file = single / "model.safetensors"
    before = file.read_bytes()
    file.write_bytes(damage(before))
    assert file.read_bytes() != before
    refused(single, rf"{file} is truncated or corrupted")


def test_truncated_shard_is_named(sharded: Path) -> None:
    (sharded / SHARD).write_bytes((sharded / SHARD).read_bytes()[:-1])
    refused(sharded, rf"{sharded / SHARD} is truncated or corrupted")


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SHARD).unlink()
    refused(sharded, rf"{SHARD} is named by model\.safetensors\.index\.json but is not on disk; fetch the missing shard")


@pytest.mark.parametrize("outside", ["../outside.safetensors", "sub/inside.safetensors", "ABSOLUTE"])
def test_index_may_not_name_files_elsewhere(sharded: Path, outside: str) -> None:
    elsewhere = sharded.parent / "outside.safetensors"
    shutil.copy(sharded / SHARD, elsewhere)
    (sharded / "sub").mkdir()
    shutil.copy(sharded / SHARD, sharded / "sub" / "inside.safetensors")
    name = str(elsewhere) if outside == "ABSOLUTE" else outside
    edit_json(sharded / "model.safetensors.index.json", weight_map={"model.norm.weight": name})
    refused(sharded, r"model\.safetensors\.index\.json names .*side\.safetensors outside its own directory")


@pytest.mark.parametrize("weight_map", [None, {}, [], {"a": 3}, {"a": None, "b": "model.safetensors"}])
def test_damaged_index(sharded: Path, weight_map: Any) -> None:
    edit_json(sharded / "model.safetensors.index.json", weight_map=weight_map)
    refused(sharded, r"model\.safetensors\.index\.json has no weight_map; the index is damaged")


def test_index_that_is_no_object(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("[]")
    refused(sharded, r"model\.safetensors\.index\.json holds no JSON object but list")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float8_e4m3fn, torch.bool])
def test_quantized_tensors_are_refused(single: Path, dtype: torch.dtype) -> None:
    stored = load_file(single / "model.safetensors")
    stored["model.norm.weight"] = stored["model.norm.weight"].to(dtype)
    save_file(stored, single / "model.safetensors")
    refused(
        single, r"model\.safetensors: tensor model\.norm\.weight is \w+; .*F16, BF16, F32 \(is this one quantized already\?\)"
    )


def test_pickled_weights_are_never_loaded(single: Path) -> None:
    (single / "model.safetensors").unlink()
    refused(single, r"has neither model\.safetensors nor model\.safetensors\.index\.json")
    (single / "pytorch_model-00001-of-00002.bin").write_bytes(b"")
    refused(single, r"holds pickled weights \(pytorch_model\.bin\), which are never loaded; save it as safetensors")


@pytest.mark.parametrize("damaged", [False, True])
def test_missing_or_damaged_tokenizer(single: Path, damaged: bool) -> None:
    (single / "tokenizer_config.json").unlink()
    (single / "tokenizer.json").unlink()
    if damaged:
        (single / "tokenizer.json").write_text('{"model": 7}')
    with pytest.raises(InputError, match=rf"{single} has no usable tokenizer \(.+\); put its tokenizer files there"):
        open_checkpoint(str(single)).tokenizer()


# The hub.


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.mark.parametrize("revision", ["", "@main", "@v1.0"])
def test_hub_id_is_found_in_the_local_cache(hub_cache: Path, tiny_llama: Path, revision: str) -> None:
    repository = hub_cache / "models--some-org--tiny.llama"
    commit = "abc" * 13 + "d"
    shutil.copytree(tiny_llama, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / (revision.removeprefix("@") or "main")).write_text(commit)
    checkpoint = open_checkpoint(f"some-org/tiny.llama{revision}")
    assert checkpoint.path == repository / "snapshots" / commit
    assert checkpoint.names() == open_checkpoint(str(tiny_llama)).names()


@pytest.mark.parametrize("path", ["some-org/absent", "some-org/absent@v2", "some--org/name", "some-org/name.git"])
def test_hub_that_gives_nothing(hub_cache: Path, path: str) -> None:
    repository = path.partition("@")[0]
    with pytest.raises(InputError, match=rf"model\.path={repository} is no local path, and the hub did not give it"):
        open_checkpoint(path)


# Laziness.


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_opening_reads_headers_only(single: Path) -> None:
    """Four gigabytes that are on no disk: a sparse file."""
    count, size = 16, 2**28
    header = {
        f"layer{i}.weight": {"dtype": "F16", "shape": [size // 4096, 2048], "data_offsets": [i * size, (i + 1) * size]}
        for i in range(count)
    }
    encoded = json.dumps(header).encode()
    with (single / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + count * size)
    before = resident_bytes()
    checkpoint = open_checkpoint(str(single))
    assert checkpoint.num_parameters() == count * size // 2
    mapped = checkpoint.tensor("layer7.weight")
    assert resident_bytes() - before < 50 * 2**20
    assert float(mapped[-1].abs().max()) == 0
