"""Bad input: one line that names what is wrong and the mend, exit code 2, and no half-written artifact."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from exports.stream import SafetensorsWriter
from quantize.__main__ import main

PROJECT = Path(__file__).resolve().parents[2]
Cli = Callable[..., tuple[int, str, str]]
Fails = Callable[..., str]
ARTIFACTS = "stages=[load,calibrate,quantize,export]"


def overrides(model: Path, directory: Path) -> list[str]:
    """The command line of a run of a second."""
    return [
        "recipe=gptq",
        f"model.path={model}",
        f"output_dir={directory}",
        "calibration.num_samples=4",
        "calibration.seq_len=32",
        "solver.group_size=32",
        "quality=fast",
        "eval.windows=2",
        "eval.seq_len=64",
    ]


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own to damage."""
    return shutil.copytree(tiny_llama, tmp_path / "model")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The output directory."""
    return tmp_path / "run"


@pytest.fixture
def fails(model: Path, directory: Path, cli: Cli) -> Fails:
    """``fails("key=value", ...)``: run, require failure in the agreed manner, and give the error line."""

    def run(*arguments: str) -> str:
        code, out, err = cli(*overrides(model, directory), *arguments)
        assert code == 2, err
        assert out == ""
        assert "Traceback" not in err
        assert err.count("error:") == 1
        assert_nothing_half_written(directory)
        return err.splitlines()[-1]

    return run


def assert_nothing_half_written(directory: Path) -> None:
    """No artifact is there, or a whole one."""
    if directory.is_dir():
        assert not list(directory.rglob("*.tmp-*"))
        assert not (directory / "variants" / "gptq").exists()


def check(line: str, *words: str) -> None:
    """The error line holds every word."""
    assert line.startswith("error: ")
    for word in words:
        assert word in line


# The checkpoint.


def test_a_missing_model(fails: Fails, tmp_path: Path) -> None:
    check(fails(f"model.path={tmp_path / 'nothing'}"), "model.path=", "nothing does not exist", "give a model directory")


def test_a_directory_that_is_no_model(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check(fails(f"model.path={tmp_path / 'empty'}"), "no config.json", "model directory")


@pytest.mark.parametrize("kept", [0, 4, 5000, -1])
def test_truncated_weights(fails: Fails, model: Path, kept: int) -> None:
    file = model / "model.safetensors"
    os.truncate(file, kept if kept >= 0 else file.stat().st_size - 1)
    check(fails(), str(file), "truncated or corrupted", "fetch it again")


def test_a_missing_shard(fails: Fails, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[:10], "model-00002-of-00002.safetensors": names[10:]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, model / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model-00002-of-00002.safetensors").unlink()
    check(fails(), str(model / "model-00002-of-00002.safetensors"), "not on disk", "fetch the missing shard")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number(fails: Fails, model: Path, value: float) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    check(fails(), str(model), "model.layers.2.mlp.up_proj.weight", "NaN or infinity", "damaged")


def test_infinities_that_cancel_are_found_too(fails: Fails, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][:2] = torch.tensor([float("inf"), float("-inf")])
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    check(fails(), "model.norm.weight", "NaN or infinity")


def test_a_tokenizer_of_another_model(fails: Fails, model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 300, "content": "<extra>"})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    check(fails(), str(model), "token id 300", "300 rows", "tokenizer belongs to another model")


def test_a_checkpoint_that_is_quantized_already(fails: Fails, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    check(fails(), str(model), "quantized already (awq)", "FP16")


def test_a_tensor_that_is_not_there(fails: Fails, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    check(fails(), str(model), "model.layers.1.mlp.up_proj.weight")


# Texts.


@pytest.mark.parametrize("content", ["", " \n\n\t\n"])
def test_an_empty_calibration_text(fails: Fails, tmp_path: Path, content: str) -> None:
    (tmp_path / "notes.txt").write_text(content)
    line = fails("calibration=text", f"calibration.path={tmp_path / 'notes.txt'}")
    check(line, str(tmp_path / "notes.txt"), "holds no text", "calibration=builtin")


def test_a_missing_calibration_text(fails: Fails, tmp_path: Path) -> None:
    check(fails("calibration=text", f"calibration.path={tmp_path / 'no.txt'}"), "calibration.path", "no.txt", "does not exist")


def test_a_calibration_text_that_is_too_short(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("A short text.\n\nIt has two paragraphs, which is not enough.\n")
    line = fails("calibration=text", f"calibration.path={tmp_path / 'notes.txt'}")
    check(line, "tokens but calibration.num_samples=4", "need 128", "use calibration.", "longer text")


def test_a_missing_text_for_evaluation_is_told_before_any_work(fails: Fails, directory: Path, tmp_path: Path) -> None:
    check(fails(f"eval.text={tmp_path / 'no.txt'}"), "eval.text=", "no.txt does not exist", "give a text file")
    assert not directory.exists()


def test_windows_longer_than_the_context_are_told_before_any_work(fails: Fails, directory: Path) -> None:
    check(fails("eval.seq_len=2049"), "eval.seq_len=2049", "context of 2048 tokens", "use 2048 or less")
    check(fails("eval.seq_len=2048", "eval.bos=true"), "eval.seq_len=2048", "use 2047 or less")
    assert not directory.exists()


def test_what_evaluation_finds_wrong_is_one_line_too(
    model: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("Far too short.")
    arguments = [*overrides(model, directory), "recipe=fp16", f"eval.text={tmp_path / 'short.txt'}"]
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["quantize", *arguments])
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert main() == 2
    err = capsys.readouterr().err
    check(err.splitlines()[-1], "evaluation of fp16", "tokens, room for 0 windows of eval.seq_len=64")
    assert err.count("error:") == 1
    assert "Traceback" not in err


# Settings that only the checkpoint shows to be impossible.


def test_a_group_size_that_does_not_divide(fails: Fails) -> None:
    line = fails("solver.group_size=48")
    check(line, "group_size=48 does not divide in_features=64", "q_proj", "use 64, 32, 16 or -1")


def test_a_device_that_is_not_there(fails: Fails) -> None:
    if torch.cuda.device_count() > 99:
        pytest.skip("this machine has it")
    check(fails("device=cuda:99"), "device=cuda:99 is not on this machine", "device=auto")


# The output directory.


def test_an_output_directory_that_is_a_file(fails: Fails, directory: Path) -> None:
    directory.write_text("mine")
    check(fails(), f"output_dir={directory} is a file", "choose another output_dir")
    assert directory.read_text() == "mine"


def test_an_output_directory_below_a_file(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    check(fails(f"output_dir={tmp_path / 'file' / 'run'}"), str(tmp_path / "file"), "not a directory", "another output_dir")


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.EROFS, "read-only"), (errno.EACCES, "permission denied"), (errno.ENOSPC, "disk is full")]
)
def test_an_output_directory_that_cannot_be_written_to(
    fails: Fails, directory: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    check(fails(), str(directory), reason, "output_dir")
    assert not directory.exists()


def test_an_output_directory_that_cannot_be_made(fails: Fails, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def refuse(self: Path, *arguments: Any, **options: Any) -> None:
        if self == directory:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    check(fails(), str(directory), "permission denied", "choose an output_dir")


@pytest.mark.parametrize("text", ["{", '{"schema": 99, "steps": {}}'])
def test_a_damaged_manifest(fails: Fails, directory: Path, text: str) -> None:
    directory.mkdir()
    (directory / "manifest.json").write_text(text)
    check(fails(), str(directory / "manifest.json"), "output_dir" if "99" in text else "delete it")


@pytest.mark.parametrize("name", ["windows.safetensors", "block-00002.safetensors", "model.safetensors", "manifest.json"])
def test_a_disk_that_fills_up(fails: Fails, monkeypatch: pytest.MonkeyPatch, directory: Path, name: str) -> None:
    """The disk has no room for one certain file; with room again, the same command ends as if nothing had been."""

    def full(write: Callable[..., Any]) -> Callable[..., Any]:
        def write_or_refuse(*arguments: Any, **options: Any) -> Any:
            path = next(argument for argument in arguments if isinstance(argument, Path))
            if name in path.name or (name == "model.safetensors" and path.name.startswith("shard-")):
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return write(*arguments, **options)

        return write_or_refuse

    with monkeypatch.context() as patch:
        patch.setattr("quantize.files.save_file", full(save_file))
        patch.setattr("exports.shards.SafetensorsWriter", full(SafetensorsWriter))
        patch.setattr(Path, "write_text", full(Path.write_text))
        check(fails(ARTIFACTS), str(directory), "the disk is full", "free some space")
    assert main() == 0
    assert (directory / "variants" / "gptq" / "model.safetensors").stat().st_size > 10_000


def run_limited(arguments: list[str], file_bytes: int) -> subprocess.CompletedProcess[str]:
    """The command in a process that can write no file larger than this."""
    return subprocess.run(
        [sys.executable, "-m", "quantize", *arguments],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes)),
    )


def test_a_file_system_that_takes_no_large_files(model: Path, directory: Path) -> None:
    result = run_limited([*overrides(model, directory), ARTIFACTS], 90_000)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    check(result.stderr.splitlines()[-1], str(directory), "refuses a file of this size", "output_dir")
    assert_nothing_half_written(directory)
    # It was the artifact that did not fit: its blocks are finished.
    assert len(list(directory.rglob("block-*.safetensors"))) == 4


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 192 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(place)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    # Lazily, because files that are still mapped keep it busy.
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_is_really_full(fails: Fails, tiny_disk: Path) -> None:
    line = fails(ARTIFACTS, f"output_dir={tiny_disk / 'run'}")
    check(line, str(tiny_disk), "the disk is full", "free some space")
    assert_nothing_half_written(tiny_disk / "run")


# Debugging.


def test_debug_shows_where(model: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    arguments = [*overrides(model, directory), f"model.path={tmp_path / 'nothing'}", "debug=true"]
    monkeypatch.setattr(sys, "argv", ["quantize", *arguments])
    assert main() == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert "InputError" in err
    assert err.splitlines()[-1].startswith("error: model.path=")


# GPTQ's options.


def test_an_override_that_matches_nothing(fails: Fails) -> None:
    line = fails("solver.overrides=[{match: lm_haed, bits: 8}]")
    check(line, "solver.overrides", "match=lm_haed matches no quantized layer", "model.layers.0.self_attn.q_proj")


def test_an_override_with_an_impossible_grid(fails: Fails) -> None:
    check(fails("solver.overrides=[{match: down_proj, bits: 5}]"), "bits=5 is not supported", "2, 3, 4, 8")


def test_an_override_with_a_group_size_that_does_not_fit_its_layers(fails: Fails) -> None:
    line = fails("solver.overrides=[{match: q_proj, group_size: 48}]")
    check(line, "group_size=48 does not divide in_features=64", "q_proj", "use 64, 32, 16 or -1")


def test_an_override_that_is_no_regular_expression(fails: Fails) -> None:
    check(fails("solver.overrides=[{match: '(', bits: 8}]"), "solver.overrides", "is no regular expression")


def test_an_override_without_a_match(fails: Fails) -> None:
    check(fails("solver.overrides=[{bits: 8}]"), "match")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("solver.act_group_aware=true", ["desc_act and act_group_aware", "desc_act=false"]),
        ("solver.search_steps=-1", ["search_steps=-1 is negative", "0 (min-max)"]),
        ("solver.gptaq_alpha=1.5", ["gptaq_alpha=1.5 is not in [0, 1]"]),
        ("solver.tune_epochs=-2", ["tune_epochs=-2 is negative"]),
        ("solver.tune_epochs=-1", ["tune_epochs=-1 is negative"]),
    ],
)
def test_impossible_effort(fails: Fails, setting: str, words: list[str]) -> None:
    check(fails(setting), *words)


def test_an_output_embedding_that_cannot_be_packed(fails: Fails) -> None:
    check(fails("solver.lm_head=true"), "out_features=300 of lm_head is not a multiple of 8", "solver.skip")
