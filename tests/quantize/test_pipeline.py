"""Whole runs on a tiny checkpoint: what they leave on disk, what a second run does again, and that bytes repeat."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantize import pipeline
from quantize.artifact import problems, read_evaluation, read_manifest
from quantize.files import files_below, sha256_file, write_json

PROJECT = Path(__file__).resolve().parents[2]
Cli = Callable[..., tuple[int, str, str]]
ARTIFACTS = "stages=[load,calibrate,quantize,export]"
FIELDS = {
    "name",
    "solver",
    "container",
    "bits",
    "bits_per_weight",
    "size_bytes",
    "compression",
    "peak_rss_bytes",
    "ppl",
    "ppl_ratio",
    "kld_mean",
    "top1_agreement",
    "seconds",
    "consumer",
}


COMPARED = {"kld_mean", "top1_agreement"}  # the baseline has none


@pytest.fixture
def canned_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """No evaluation but figures made up, for tests of what is run and when: the consumers' imports take many seconds."""

    def run(command: Sequence[str], **_: Any) -> SimpleNamespace:
        options = dict(zip(command[4::2], command[5::2], strict=False))
        figures = {
            "ppl": 10.0,
            "consumer": "made up 1.0",
            "protocol": {"windows": options["--windows"]},
            "compute_dtype": "float32",
            "peak_rss_bytes": 1,
        }
        write_json(Path(options["--json"]), figures)
        if "--save-reference" in options:
            Path(options["--save-reference"]).write_text(str(options["--windows"]))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(pipeline, "subprocess", SimpleNamespace(run=run, DEVNULL=None, PIPE=None))


@pytest.fixture(scope="module")
def small(small_run: list[str]) -> list[str]:
    """The demo recipe without two of its variants."""
    return ["recipe=demo", "~variants.int8", "~variants.int4-rtn", *small_run]


@pytest.fixture(scope="module")
def finished(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from the command line, in processes of its own. Copy it before changing it."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    run_process(*small, f"output_dir={directory}")
    return directory


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A finished run to work on."""
    return shutil.copytree(finished, tmp_path / "run")


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m quantize`` as a person runs it."""
    command = [sys.executable, "-m", "quantize", *arguments]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result


def steps_run(log: str) -> list[str]:
    """Names of the steps that a log says were carried out."""
    return re.findall(r"^INFO: (\S+) \.\.\.$", log, re.MULTILINE)


def hashes(directory: Path) -> dict[str, str]:
    """sha256 of every file below ``directory``, by relative path."""
    return {str(file.relative_to(directory)): sha256_file(file) for file in files_below(directory)}


def artifacts_in(directory: Path) -> dict[str, str]:
    """sha256 of every file of the artifacts below ``directory``; figures hold times, which differ."""
    return {name: digest for name, digest in hashes(directory).items() if not name.endswith("/evaluation.json")}


def test_the_run_directory_has_the_documented_layout(finished: Path) -> None:
    side = {
        "manifest.json",
        "evaluation.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    blocks = {f"work/quantize/int4-gptq/block-{index:05d}.safetensors" for index in range(4)}
    assert set(hashes(finished)) == {
        "manifest.json",
        "recipe.yaml",
        *(f"report.{suffix}" for suffix in ("json", "md", "html", "png")),
        *(f"variants/fp16/{name}" for name in side),
        *(f"variants/int4-gptq/{name}" for name in side | {"quantize_config.json"}),
        "work/calibration/windows.safetensors",
        *blocks,
        "work/quantize/int4-gptq/key",
        "work/quantize/int4-gptq/seconds",
        "work/evaluate/fp16.json",
        "work/evaluate/reference.npz",
        *(name for name in hashes(finished) if re.fullmatch(r"work/evaluate/texts/tokens-[0-9a-f]{32}\.npz", name)),
        "work/evaluate/int4-gptq.json",
    }


def test_the_report_has_every_field_of_every_variant(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert [row["name"] for row in report["variants"]] == ["fp16", "int4-gptq"]
    for row in report["variants"]:
        assert set(row) == FIELDS | {"path", "command", "tasks", "gate"}
        assert row["gate"] is None  # no limits were set
        assert all(row[field] is not None for field in FIELDS - COMPARED)
    dense, packed = report["variants"]
    assert (dense["bits"], packed["bits"]) == (16, 4)
    assert packed["size_bytes"] == (finished / "variants" / "int4-gptq" / "model.safetensors").stat().st_size
    assert dense["ppl_ratio"] == 1.0
    assert dense["kld_mean"] is dense["top1_agreement"] is None
    assert 0 < packed["kld_mean"] < 10
    assert 0 < packed["top1_agreement"] < 1
    assert "divergence" in report["protocol"]
    assert packed["ppl_ratio"] == pytest.approx(packed["ppl"] / dense["ppl"])
    assert "gptqmodel" in packed["consumer"]
    assert "gptqmodel" not in dense["consumer"]
    assert min(row["peak_rss_bytes"] for row in report["variants"]) > 100 * 2**20


def test_every_artifact_says_what_it_is_and_carries_its_figures(finished: Path, tiny_llama: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    for row in report["variants"]:
        artifact = finished / "variants" / row["name"]
        manifest, figures = read_manifest(artifact), read_evaluation(artifact)
        assert problems(artifact) == []
        assert manifest["size_bytes"] == row["size_bytes"]
        assert manifest["base"]["name"] == tiny_llama.name
        assert str(tiny_llama.parent) not in (artifact / "manifest.json").read_text()
        assert figures is not None
        assert figures["artifact_fingerprint"] == manifest["fingerprint"]
        assert figures["ppl"] == row["ppl"]
    packed = read_manifest(finished / "variants" / "int4-gptq")
    assert packed["grid"] == {"name": None, "bits": 4, "group_size": 32, "symmetric": False, "scale_dtype": "float16"}
    assert packed["solver"]["search_steps"] == 20  # what quality=fast says
    assert packed["recipe"]["calibration"]["num_samples"] == 4
    dense = read_manifest(finished / "variants" / "fp16")
    assert (dense["solver"], dense["grid"], dense["seed"]) == ({"name": "none"}, None, None)


def test_the_text_is_tokenised_and_the_baseline_run_once(finished: Path) -> None:
    assert len(list((finished / "work" / "evaluate" / "texts").iterdir())) == 1
    packed = read_evaluation(finished / "variants" / "int4-gptq")
    dense = read_manifest(finished / "variants" / "fp16")
    assert packed is not None
    assert packed["divergence"]["reference"]["artifact_fingerprint"] == dense["fingerprint"]
    report = json.loads((finished / "report.json").read_text())
    assert "--reference" in report["variants"][1]["command"]
    assert "--save-reference" in report["variants"][0]["command"]


@pytest.mark.usefixtures("canned_evaluation")
def test_another_top_k_stores_the_baseline_again_and_compares_again(copied: Path, small: list[str], cli: Cli) -> None:
    assert cli(*small, f"output_dir={copied}")[0] == 0
    code, _, err = cli(*small, "eval.top_k=8", f"output_dir={copied}")
    assert code == 0
    assert steps_run(err)[0] == "evaluate/fp16"


@pytest.mark.usefixtures("canned_evaluation")
def test_without_divergence_nothing_is_stored(copied: Path, small: list[str], cli: Cli) -> None:
    code, _, err = cli(*small, "eval.divergence=false", f"output_dir={copied}")
    assert code == 0
    assert steps_run(err) == ["evaluate/fp16", "evaluate/int4-gptq", "report"]
    report = json.loads((copied / "report.json").read_text())
    assert not any("reference" in row["command"] for row in report["variants"])
    assert all(row["kld_mean"] is None for row in report["variants"])


def test_figures_that_went_missing_are_laid_beside_the_artifact_again(
    copied: Path, small: list[str], cli: Callable[..., tuple[int, str, str]]
) -> None:
    file = copied / "variants" / "fp16" / "evaluation.json"
    before = file.read_bytes()
    file.unlink()
    code, _, log = cli(*small, f"output_dir={copied}")
    assert code == 0
    assert steps_run(log) == []
    assert file.read_bytes() == before


def test_the_baseline_is_the_checkpoint(finished: Path, tiny_llama: Path) -> None:
    assert sha256_file(finished / "variants/fp16/model.safetensors") == sha256_file(tiny_llama / "model.safetensors")


def test_the_manifest_has_the_lineage_of_every_step(finished: Path, tiny_llama: Path) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    assert list(manifest["steps"]) == [
        "load",
        "calibrate",
        "quantize/int4-gptq",
        "export/fp16",
        "export/int4-gptq",
        "evaluate/fp16",
        "evaluate/int4-gptq",
        "report",
    ]
    assert manifest["seed"] == 0
    assert manifest["recipe"]["variants"]["int4-gptq"]["solver"]["group_size"] == 32
    assert manifest["steps"]["load"]["result"]["files"]["model.safetensors"] == sha256_file(tiny_llama / "model.safetensors")
    recorded = {name for entry in manifest["steps"].values() for name in entry["files"]}
    unrecorded = {"manifest.json", "recipe.yaml", "work/quantize/int4-gptq/key", "work/quantize/int4-gptq/seconds"}
    unrecorded |= {f"variants/{name}/evaluation.json" for name in ("fp16", "int4-gptq")}
    unrecorded |= {name for name in hashes(finished) if name.startswith("work/evaluate/texts/")}
    assert recorded | unrecorded == set(hashes(finished))


def test_the_recipe_written_down_makes_the_same_run(finished: Path, copied: Path, cli: Cli, tmp_path: Path) -> None:
    recipes = tmp_path / "recipes" / "recipe"
    recipes.mkdir(parents=True)
    (recipes / "again.yaml").write_text("# @package _global_\n" + (finished / "recipe.yaml").read_text())
    code, _, err = cli("--config-dir", str(recipes.parent), "recipe=again", f"output_dir={copied}")
    assert code == 0
    assert "nothing to do" in err


def test_a_finished_run_does_nothing_and_says_so(copied: Path, small: list[str], cli: Cli) -> None:
    cli(*small, f"output_dir={copied}")  # writes the new output_dir into recipe.yaml
    before = hashes(copied)
    code, out, err = cli(*small, f"output_dir={copied}")
    assert code == 0
    assert steps_run(err) == []
    assert f"nothing to do: {copied} is finished" in err
    assert "int4-gptq" in out
    assert str(copied / "report.html") in out
    assert hashes(copied) == before


@pytest.mark.usefixtures("canned_evaluation")
def test_another_protocol_evaluates_again_and_nothing_else(copied: Path, small: list[str], cli: Cli) -> None:
    artifacts = artifacts_in(copied / "variants")
    code, _, err = cli(*small, "eval.windows=3", f"output_dir={copied}")
    assert code == 0
    assert steps_run(err) == ["evaluate/fp16", "evaluate/int4-gptq", "report"]
    assert json.loads((copied / "report.json").read_text())["protocol"] == {
        "windows": "3",
        "compute dtype": "float32",
        "divergence": "from fp16, nats a token; its 256 likeliest and the rest as one",
        "size": "safetensors files",
        "peak RSS": "consumer process while loading",
    }
    assert artifacts_in(copied / "variants") == artifacts


def test_another_solver_setting_makes_one_variant_again(copied: Path, small: list[str], cli: Cli) -> None:
    code, _, err = cli(*small, "variants.int4-gptq.solver.damp_percent=0.02", ARTIFACTS, f"output_dir={copied}")
    assert code == 0
    assert steps_run(err) == ["quantize/int4-gptq", "export/int4-gptq"]


def test_how_a_run_is_carried_out_makes_nothing_again(copied: Path, small: list[str], cli: Cli) -> None:
    code, _, err = cli(*small, "calibration.activations=disk", "debug=true", "log_level=debug", f"output_dir={copied}")
    assert code == 0
    assert "nothing to do" in err


@pytest.mark.parametrize(
    ("stages", "missing"),
    [
        ("[quantize]", "no finished load"),
        ("[calibrate]", "no finished load"),
        ("[load,quantize]", "no finished calibrate"),
        ("[load,calibrate,export]", "no finished load|no finished quantize/int4-gptq"),
        ("[report]", "no finished"),
    ],
)
def test_a_stage_without_those_before_it_is_told_what_is_missing(
    small: list[str], cli: Cli, tmp_path: Path, stages: str, missing: str
) -> None:
    code, _, err = cli(*small, f"stages={stages}", f"output_dir={tmp_path / 'run'}")
    assert code == 2
    message = err.splitlines()[-1]
    assert message.startswith("error: ")
    assert re.search(missing, message)
    assert "to stages" in message
    assert not (tmp_path / "run" / "variants" / "int4-gptq").exists()


@pytest.mark.usefixtures("canned_evaluation")
def test_stages_can_be_run_one_after_another(small: list[str], cli: Cli, tmp_path: Path, finished: Path) -> None:
    directory = f"output_dir={tmp_path / 'run'}"
    code, out, err = cli(*small, ARTIFACTS, directory)
    assert (code, out) == (0, "")
    assert steps_run(err) == ["load", "calibrate", "quantize/int4-gptq", "export/fp16", "export/int4-gptq"]
    code, out, err = cli(*small, "stages=[evaluate,report]", directory)
    assert code == 0
    assert steps_run(err) == ["evaluate/fp16", "evaluate/int4-gptq", "report"]
    # Another process and another directory give the same bytes.
    assert artifacts_in(tmp_path / "run" / "variants") == artifacts_in(finished / "variants")


@pytest.mark.parametrize(
    ("file", "steps"),
    [
        ("variants/int4-gptq/model.safetensors", ["export/int4-gptq"]),
        ("variants/int4-gptq/config.json", ["export/int4-gptq"]),
        ("work/quantize/int4-gptq/block-00001.safetensors", ["quantize/int4-gptq"]),
        ("work/quantize/int4-gptq/block-00003.safetensors", ["quantize/int4-gptq"]),
        ("work/calibration/windows.safetensors", ["calibrate"]),
        ("report.md", ["report"]),
    ],
)
def test_a_damaged_file_is_noticed_and_made_again(
    copied: Path, small: list[str], cli: Cli, file: str, steps: list[str]
) -> None:
    before = hashes(copied)
    content = bytearray((copied / file).read_bytes())
    content[-1] ^= 1
    (copied / file).write_bytes(content)
    code, _, err = cli(*small, f"output_dir={copied}")
    assert code == 0
    assert steps_run(err) == steps
    changed = {name for name, sha256 in hashes(copied).items() if before[name] != sha256}
    # The report's commands name the run directory, which is another one here.
    reports = {"report.json", "report.md", "report.html"} if "report" in steps else set()
    assert changed <= {"manifest.json", "recipe.yaml", "work/quantize/int4-gptq/seconds"} | reports


def test_blocks_made_again_do_not_count_the_lost_time(copied: Path, small: list[str], cli: Cli) -> None:
    (copied / "work/quantize/int4-gptq/seconds").write_text("5000")
    (copied / "work/quantize/int4-gptq/block-00000.safetensors").unlink()
    cli(*small, ARTIFACTS, f"output_dir={copied}")
    assert json.loads((copied / "manifest.json").read_text())["steps"]["quantize/int4-gptq"]["seconds"] < 1000


def test_activations_on_disk_give_the_same_bytes(small: list[str], cli: Cli, tmp_path: Path, finished: Path) -> None:
    spilled = ["calibration.activations=disk", "calibration.batch_tokens=2048"]
    assert cli(*small, *spilled, ARTIFACTS, f"output_dir={tmp_path}")[0] == 0
    assert artifacts_in(tmp_path / "variants") == artifacts_in(finished / "variants")


def test_several_batches_on_disk_give_the_bytes_of_several_batches_in_memory(
    small: list[str], cli: Cli, tmp_path: Path
) -> None:
    for place in ("memory", "disk"):
        # With everything on: two streams of hidden states, tuning.
        settings = [f"calibration.activations={place}", "calibration.batch_tokens=64", "quality=best", ARTIFACTS]
        assert cli(*small, *settings, f"output_dir={tmp_path / place}")[0] == 0
    assert artifacts_in(tmp_path / "memory" / "variants") == artifacts_in(tmp_path / "disk" / "variants")


def test_the_number_of_threads_changes_no_byte(small: list[str], cli: Cli, tmp_path: Path, finished: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        assert cli(*small, ARTIFACTS, f"output_dir={tmp_path}")[0] == 0
    finally:
        torch.set_num_threads(threads)
    assert artifacts_in(tmp_path / "variants") == artifacts_in(finished / "variants")


def test_calibration_is_made_once_a_variant_needs_it(small_run: list[str], cli: Cli, tmp_path: Path) -> None:
    plain = ["recipe=int8", *small_run, ARTIFACTS, f"output_dir={tmp_path}"]
    assert cli(*plain)[0] == 0
    assert not (tmp_path / "work" / "calibration").exists()
    assert steps_run(cli(*plain, "calibration.num_samples=5")[2]) == []
    code, _, err = cli(*plain, "variants.int8.solver.name=gptq", "solver.desc_act=false")
    assert code == 0, err
    assert steps_run(err) == ["calibrate", "quantize/int8", "export/int8"]


def test_skipped_layers_stay_as_they_are(small_run: list[str], cli: Cli, tmp_path: Path) -> None:
    from exports.gptq import read

    skipping = ["solver.skip=[down_proj,'layers\\.0\\.self_attn']"]
    assert cli("recipe=gptq", "solver=rtn", *small_run, *skipping, ARTIFACTS, f"output_dir={tmp_path}")[0] == 0
    quantized, dense = read(tmp_path / "variants" / "gptq")
    assert len(quantized) == 4 * 6 - 4
    assert "model.layers.0.self_attn.q_proj.weight" in dense
    assert "model.layers.3.mlp.down_proj.weight" in dense


def test_what_a_killed_run_left_half_written_is_swept_up(copied: Path, small: list[str], cli: Cli) -> None:
    (copied / "variants" / ".int4-gptq.tmp-1").mkdir()
    (copied / "variants" / ".int4-gptq.tmp-1" / "model.safetensors").write_text("half")
    (copied / ".manifest.json.tmp-1").write_text("half")
    assert cli(*small, f"output_dir={copied}")[0] == 0
    assert not list(copied.rglob("*.tmp-*"))


@pytest.mark.slow
def test_the_demo_recipe_from_the_command_line(small_run: list[str], tmp_path: Path) -> None:
    result = run_process("recipe=demo", *small_run, f"output_dir={tmp_path / 'run'}")
    names = ["fp16", "int8", "int4-rtn", "int4-gptq"]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["name"] for row in report["variants"]] == names
    assert [row["bits"] for row in report["variants"]] == [16, 8, 4, 4]
    for name in names:
        assert name in result.stdout
    # The command in the report repeats the figure.
    for row in report["variants"][:2]:
        again = subprocess.run(
            [sys.executable, *row["command"].split()[1:]], cwd=PROJECT, capture_output=True, text=True, check=True
        )
        assert json.loads(again.stdout)["ppl"] == row["ppl"]
