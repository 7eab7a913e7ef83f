"""pull, verify, inspect and diff as a user runs them, on artifacts of every container."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exports import diff, inspect, pull, verify
from exports.registry import connect
from exports.registry.release import assemble
from exports.registry.transfer import publish
from quantize.artifact import record_evaluation

RECIPE = """# @package _global_
variants:
  fp16: {solver: {name: none}, container: safetensors}
  gptq: {solver: {name: rtn}, container: gptq}
  awq: {solver: {name: rtn}, container: awq}
  w4: {solver: {name: rtn}, container: compressed-tensors}
  w8: {solver: {name: rtn, bits: 8, group_size: -1, symmetric: true}, container: compressed-tensors}
  nf4: {solver: {name: nf4, group_size: 64, symmetric: true}, container: bitsandbytes}
  int8: {solver: {name: llm_int8, bits: 8, group_size: -1, symmetric: true}, container: bitsandbytes}
  q4_0: {solver: {name: rtn}, container: gguf, grid: q4_0}
"""
KINDS = {
    "fp16": ("F16", 16.0),
    "gptq": ("I4 (gptq)", 4),
    "awq": ("I4 (awq)", 4),
    "w4": ("I4 (compressed-tensors)", 4),
    "w8": ("I8 (compressed-tensors)", 8),
    "nf4": ("NF4 (bitsandbytes)", 4),
    "int8": ("I8 (bitsandbytes)", 8),
    "q4_0": ("Q4_0", 4.5),
}
Main = Callable[[list[str] | None], int]


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory, small_run: list[str], run_recipe: Callable[..., Path]) -> Path:
    """Artifacts of a tiny model in every container, by name. Read them only."""
    folder = tmp_path_factory.mktemp("commands")
    return run_recipe(folder, RECIPE, *small_run, "stages=[load,calibrate,quantize,export]") / "variants"


@pytest.fixture
def release(variants: Path, tmp_path: Path) -> str:
    """The reference of a published GPTQ artifact."""
    extras = {"README.md": ("card", b"# Tiny")}
    registry = connect("local", str(tmp_path / "registry"))
    return str(publish(registry, "tiny", "latest", assemble(variants / "gptq", extras, {"gate": None}))[0])


def _json(main: Main, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    assert main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", KINDS)
def test_inspect_knows_every_container(name: str, variants: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = _json(inspect.main, capsys, str(variants / name))
    kind, bits = KINDS[name]
    row = next(row for row in report["kinds"] if row["kind"] == kind)
    dense = _json(inspect.main, capsys, str(variants / "fp16"))
    shapes = {tensor["name"]: tensor["shape"] for tensor in dense["tensors"]}
    # Four blocks of seven linear layers, whatever they are packed into; of a dense model everything is one kind.
    assert row["bits"] == bits and row["layers"] == {"fp16": len(shapes)}.get(name, 28)
    assert len(report["layers"]) == len(shapes)
    if name != "q4_0":  # where tensors have other names
        assert report["weights"] == dense["weights"] == sum(row["weights"] for row in report["kinds"])
        assert {layer["name"] for layer in report["layers"]} == set(shapes)
    stored = sum(tensor["nbytes"] for tensor in report["tensors"])
    assert report["tensor_bytes"] == stored == sum(row["bytes"] for row in report["kinds"])
    assert stored <= sum(report["files"].values())
    assert report["lineage"]["container"] in ("safetensors", name, "compressed-tensors", "bitsandbytes", "gguf")
    assert report["lineage"]["base"]["name"] == "tiny-llama"


def test_inspect_reads_headers_of_a_release_too(release: str, variants: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = _json(inspect.main, capsys, release)
    assert report["release"]["digest"] in release and report["release"]["gate"] is None
    assert report["kinds"] == _json(inspect.main, capsys, str(variants / "gptq"))["kinds"]
    assert inspect.main([release, "--tensors"]) == 0
    printed = capsys.readouterr().out
    assert "I4 (gptq)" in printed and "model.layers.0.mlp.down_proj.qweight" in printed and "fingerprint" in printed


def test_pull_and_verify(release: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pull.main([release, str(tmp_path / "pulled")]) == 0
    assert "sha256:" in capsys.readouterr().out
    assert _json(verify.main, capsys, str(tmp_path / "pulled"), release) == {str(tmp_path / "pulled"): [], release: []}
    weights = tmp_path / "pulled" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 4
    weights.write_bytes(data)
    assert verify.main([str(tmp_path / "pulled"), release]) == 3
    assert "model.safetensors: changed" in capsys.readouterr().out
    assert pull.main([release, str(tmp_path / "pulled")]) == 2
    assert "holds something else" in capsys.readouterr().err
    blob = next(path for path in (tmp_path / "registry" / "blobs").rglob("*/*/*") if path.stat().st_size == len(data))
    blob.chmod(0o644)
    blob.write_bytes(data)
    assert verify.main([release]) == 3 and pull.main([release, str(tmp_path / "again")]) == 3
    assert "model.safetensors is damaged" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_verify_an_artifact_never_published(variants: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert verify.main([str(variants / "awq")]) == 0
    for what, said in ((str(tmp_path), "neither"), (str(tmp_path / "none"), "neither"), ("local:none//x", "has no tags")):
        assert verify.main([what]) == 2
        assert said in capsys.readouterr().err


def test_diff_tells_files_tensors_config_lineage_and_figures(
    variants: Path, release: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _json(diff.main, capsys, release, release)["tensors"] == {"added": [], "removed": [], "changed": []}
    result = _json(diff.main, capsys, str(variants / "gptq"), release, code=3)
    assert result["files"] == {"added": ["README.md", "SHA256SUMS"], "removed": [], "changed": []}
    assert not any(result["tensors"].values()) and not result["config"] and not result["lineage"]

    pull.main([release, str(tmp_path / "changed")])
    folder = tmp_path / "changed"
    data = bytearray((folder / "model.safetensors").read_bytes())
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    begin = header["model.layers.1.mlp.up_proj.scales"]["data_offsets"][0]
    data[8 + struct.unpack("<Q", data[:8])[0] + begin] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["group_size"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    record_evaluation(folder, {"ppl": 12.5})
    capsys.readouterr()
    result = _json(diff.main, capsys, release, str(folder), code=3)
    assert result["tensors"]["changed"] == ["model.layers.1.mlp.up_proj.scales"]
    assert result["files"]["changed"] == ["config.json", "model.safetensors"]
    assert result["config"] == {"quantization_config.group_size": {"a": 32, "b": 16}}
    assert result["figures"]["ppl"] == {"a": None, "b": 12.5}
    assert diff.main([release, str(folder)]) == 3
    assert "~ tensor model.layers.1.mlp.up_proj.scales" in capsys.readouterr().out
    result = _json(diff.main, capsys, str(variants / "gptq"), str(variants / "awq"), code=3)
    assert "model.layers.0.mlp.up_proj.g_idx" in result["tensors"]["removed"]
    assert result["lineage"]["container"] == {"a": "gptq", "b": "awq"}


def test_damaged_headers_are_told_in_one_line(variants: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    good = (variants / "gptq" / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    for data in (b"", good[:5], good[: length // 2], struct.pack("<Q", 2**60) + good[8:], good[:8] + b"[" * length, good[:-10]):
        (folder / "model.safetensors").write_bytes(data)
        assert inspect.main([str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: model.safetensors") and error.count("\n") == 1
    (folder / "model.safetensors").unlink()
    assert inspect.main([str(folder)]) == 2
    assert "has no safetensors" in capsys.readouterr().err


def test_commands_start_without_torch_and_keep_secrets_out_of_errors(release: str, tmp_path: Path) -> None:
    code = "import sys; from exports import pull, verify, inspect, diff; assert 'torch' not in sys.modules"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
    environment = {**os.environ, "HF_TOKEN": "planted-secret-token"}
    command = [sys.executable, "-m", "exports.pull", "local:planted-secret-token//x", str(tmp_path / "pulled")]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.startswith("error: local:***//x")
    assert "planted" not in result.stderr + result.stdout
