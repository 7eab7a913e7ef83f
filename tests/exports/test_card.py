"""Model cards and the releases built around them; the commands a card gives are run where the program is there."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from eval.llamacpp_tools import find_tool, tool
from eval.report import VariantResult, build_report, write_report
from exports import publish, pull
from exports.card import CardFacts, render_card, spdx
from exports.registry.base import GateFailed
from exports.registry.names import parse_reference
from exports.registry.transfer import directory_problems, read_release
from exports.releasing import build_release
from quantize.artifact import problems, read_manifest, record_evaluation

RECIPE = """# @package _global_
variants:
  fp16: {solver: {name: none}, container: safetensors}
  int4: {solver: {name: rtn}, container: gptq}
  int8: {solver: {name: rtn, bits: 8, group_size: -1, symmetric: true}, container: compressed-tensors}
  q8_0: {solver: {name: rtn}, container: gguf, grid: q8_0}
"""
MANIFEST: dict[str, Any] = {
    "name": "int4",
    "container": "gptq",
    "solver": {"name": "gptq", "bits": 4},
    "grid": None,
    "bits": 4,
    "bits_per_weight": 4.5,
    "size_bytes": 90_000_000,
    "base": {"name": "owner/model", "license": "apache-2.0", "sha256": "0" * 64},
    "versions": {"torch": "2.13"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, small_run: list[str], run_recipe: Callable[..., Path]) -> Path:
    """A run's directory with four artifacts, figures of two of them (made up: measuring takes a process each) and a report."""
    folder = tmp_path_factory.mktemp("card")
    path = run_recipe(folder, RECIPE, *small_run, "stages=[load,calibrate,quantize,export]")
    protocol, results = {"text": "t.txt", "window": 64}, []
    for name in ("fp16", "int4"):
        record_evaluation(path / "variants" / name, {"ppl": 300.5, "protocol": protocol, "consumer": "x 1.0"})
        manifest = read_manifest(path / "variants" / name)
        known = {key: manifest[key] for key in ("name", "container", "bits", "bits_per_weight", "size_bytes")}
        known |= {"solver": manifest["solver"]["name"], "path": f"variants/{name}", "consumer": "x 1.0", "seconds": 1.0}
        command = f"python -m eval.perplexity '{path}/variants/{name}' --text t.txt"
        required = [each.name for each in fields(VariantResult) if each.default is MISSING and each.default_factory is MISSING]
        rest: dict[str, Any] = {field: None for field in required if field not in known}
        rest |= {"compression": 1.0, "peak_rss_bytes": 2**20, "ppl": 300.5, "ppl_ratio": 1.0, "command": command}
        results.append(VariantResult(**{**rest, **known}))
    model = {"name": "tiny-llama", "path": next(line for line in small_run if "model.path" in line).split("=")[1]}
    write_report(build_report(results, model=model, protocol=protocol, environment={"python": "3"}), path)
    return path


def _data(card: str) -> dict[str, Any]:
    return ModelCard(card).data.to_dict()  # type: ignore[no-untyped-call, no-any-return]


def _card(**facts: Any) -> str:
    return render_card(CardFacts(**{"name": "demo-int4", "manifest": MANIFEST, "files": ["model.safetensors"], **facts}))


def _blocks(card: str, heading: str, language: str) -> list[str]:
    section = card.split(f"\n### {heading}\n", 1)[1].split("\n#", 1)[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


@pytest.mark.parametrize(
    ("license_id", "header", "expression"),
    [
        ("apache-2.0", {"license": "apache-2.0"}, "Apache-2.0"),
        ("MIT", {"license": "mit"}, "MIT"),
        ("llama3.2 community", {"license": "other", "license_name": "llama3.2 community"}, "LicenseRef-llama3.2-community"),
        (None, {}, "NOASSERTION"),
    ],
)
def test_the_header_is_what_the_hub_reads(license_id: str | None, header: dict[str, str], expression: str) -> None:
    card = _card(manifest={**MANIFEST, "base": {**MANIFEST["base"], "license": license_id}})
    assert _data(card) == {
        **header,
        "base_model": "owner/model",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["quantize", "gptq", "4-bit"],
    }
    assert f"<!-- SPDX-License-Identifier: {expression} -->" in card and spdx(license_id) == expression


def test_a_local_base_is_no_hub_id_unless_its_own_card_says_one() -> None:
    local = {**MANIFEST, "base": {**MANIFEST["base"], "name": "my-model"}}
    assert "base_model" not in _data(_card(manifest=local))
    assert _data(_card(manifest=local, base_model="a/b"))["base_model"] == "a/b"
    assert "`my-model`, of [a/b](https://huggingface.co/a/b), quantized" in _card(manifest=local, base_model="a/b")
    assert "\n[owner/model](https://huggingface.co/owner/model), quantized to 4 bits by GPTQ" in _card()


def test_the_table_has_the_figures_there_are_and_no_others() -> None:
    row = {"name": "fp16", "ppl": 10.0, "ppl_ratio": 1.0, "size_bytes": 2e8, "peak_rss_bytes": 2**30}
    mine = {"name": "int4", "ppl": 10.5, "ppl_ratio": 1.05, "size_bytes": 9e7, "kld_mean": 0.05, "command": "x"}
    report = {"variants": [row, mine, {**row, "name": "a|b", "ppl": None}], "protocol": {"text": "t.txt", "window": 64}}
    evaluation = {"ppl": 10.5, "protocol": report["protocol"], "divergence": {"top1_agreement": 0.91}, "consumer": "x 1.0"}
    card = _card(report=report, evaluation=evaluation, files=["model.safetensors", "report.png"])
    table = [line for line in card.splitlines() if line.startswith("| ")]
    assert table[0] == (
        "| variant | size (MB) | perplexity | against unquantized | KL divergence | same top token | peak RSS (MiB) |"
    )
    assert table[3] == "| **int4** | **90.0** | **10.50** | **+5.00 %** | **0.0500** | **91.0 %** | **n/a** |"
    assert table[4].startswith(r"| a\|b | 200.0 | n/a")
    assert "![Artifact size against perplexity](report.png)" in card and "- window: 64" in card and "x 1.0" in card
    alone = _card(evaluation=evaluation)
    assert "| int4 |" in alone.replace("**", "") and "report.png" not in alone
    assert "Nothing was measured on this artifact." in _card()


def test_accuracy_stands_with_its_standard_error() -> None:
    tasks = {"builtin": {"value": 0.8857, "stderr": 0.0140}, "own": {"value": 0.5, "stderr": None}}
    report = {"variants": [{"name": "int4", "tasks": tasks}, {"name": "fp16", "tasks": {}}], "protocol": {"text": "t.txt"}}
    table = [line for line in _card(report=report).splitlines() if line.startswith("| ")]
    assert table[0] == "| variant | accuracy (%) |"
    assert table[2:] == ["| **int4** | **builtin 88.6 ± 1.4, own 50.0** |", "| fp16 | n/a |"]


def test_a_release_of_a_run_holds_what_a_stranger_needs(run: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tiny_llama.parent)
    release = build_release(run / "variants" / "int4", "tiny-int4", run=run, gate={"passed": True, "checks": []})
    roles = {entry.name: entry.role for entry in release.entries}
    assert roles["README.md"] == "card" and roles["recipe.yaml"] == "recipe" and roles["gate.json"] == "gate"
    assert {name for name, role in roles.items() if role == "report"} == {
        f"report.{end}" for end in ("json", "md", "html", "png")
    }
    assert roles["evaluation.json"] == "evaluation" and roles["manifest.json"] == "manifest" and roles["SHA256SUMS"] == "sums"
    data = {entry.name: entry.data or b"" for entry in release.entries}
    recipe = yaml.safe_load(data["recipe.yaml"])
    assert "output_dir" not in recipe and set(recipe["variants"]) == {"fp16", "int4", "int8", "q8_0"}
    assert recipe["model"]["path"] == "~/tiny-llama"
    for name in ("report.json", "report.md", "report.html", "README.md", "recipe.yaml"):
        assert str(tiny_llama.parent).encode() not in data[name], name
    card = data["README.md"].decode()
    assert "**int4**" in card and "- [recipe" not in card and "[recipe.yaml](recipe.yaml)" in card
    assert release.facts["gate"] == {"passed": True} and release.facts["forced"] is False
    assert release.facts["artifact"]["solver"] == "rtn" and release.facts["license"] == "NOASSERTION"
    again = build_release(run / "variants" / "int4", "tiny-int4", run=run, gate={"passed": True, "checks": []})
    assert again.digest == release.digest


def test_licence_texts_and_the_base_model_are_carried_over(run: Path, tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("Permission is granted")
    (tmp_path / "README.md").write_text("---\nlicense: mit\nbase_model: owner/published\n---\n# Model\n")
    release = build_release(run / "variants" / "int4", "tiny", checkpoint=tmp_path)
    entries = {entry.name: entry for entry in release.entries}
    assert entries["LICENSE"].data == b"Permission is granted" and entries["LICENSE"].role == "license"
    assert release.facts["base"]["model"] == "owner/published"
    assert _data((entries["README.md"].data or b"").decode())["base_model"] == "owner/published"
    (tmp_path / "README.md").write_text("---\n: [\n---\n")
    assert build_release(run / "variants" / "int4", "tiny", checkpoint=tmp_path).facts["base"]["model"] is None


def test_what_failed_its_gate_is_published_by_force_only_and_says_so(run: Path) -> None:
    artifact = run / "variants" / "int4"
    for gate in ({"passed": False}, {}):
        with pytest.raises(GateFailed, match="failed its gate"):
            build_release(artifact, "tiny", gate=gate)
        release = build_release(artifact, "tiny", gate=gate, force=True)
        assert release.facts["gate"] == {"passed": False} and release.facts["forced"] is True
        card = next(entry.data for entry in release.entries if entry.name == "README.md")
        assert b"failed its quality gate" in (card or b"")
    assert build_release(artifact, "tiny", gate={"passed": True}, force=True).facts["forced"] is False


def test_publish_and_pull_by_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = f"local:{tmp_path / 'registry'}//demo/tiny-int4:v1"
    gate = tmp_path / "gate.json"
    gate.write_text('{"passed": false}')
    arguments = [str(run / "variants" / "int4"), target, "--run", str(run), "--gate", str(gate)]
    assert publish.main(arguments) == 3
    assert "failed its gate" in capsys.readouterr().err
    assert publish.main([*arguments, "--force"]) == 0
    reference = capsys.readouterr().out.splitlines()[0]
    assert reference.startswith(f"{target}@sha256:")
    assert read_release(parse_reference(reference))[2].facts["forced"] is True
    assert publish.main([*arguments, "--force"]) == 0
    assert "of which 0 were new" in capsys.readouterr().out
    assert pull.main([target, str(tmp_path / "pulled")]) == 0
    assert directory_problems(tmp_path / "pulled") == [] == problems(tmp_path / "pulled")
    capsys.readouterr()
    gate.write_text("[]")
    for wrong in (arguments, [arguments[0], reference], [str(tmp_path), target], [*arguments[:2], "--run", "none"]):
        assert publish.main(wrong) == 2, wrong
        assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("variant", ["fp16", "int8", pytest.param("int4", marks=pytest.mark.slow), "q8_0"])
def test_the_cards_transformers_commands_run(
    variant: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = f"local:{tmp_path / 'registry'}//tiny"
    assert publish.main([str(run / "variants" / variant), target, "--run", str(run)]) == 0
    assert pull.main([target, str(tmp_path / "pulled")]) == 0
    (code,) = _blocks((tmp_path / "pulled" / "README.md").read_text(), "transformers", "python")
    monkeypatch.chdir(tmp_path / "pulled")
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    # GPTQModel tells what it does on standard output too.
    assert re.search(r"^The capital of France is", capsys.readouterr().out, re.MULTILINE)
    assert directory_problems(tmp_path / "pulled") == []


def test_the_cards_llama_cpp_command_runs(run: Path, tmp_path: Path) -> None:
    if find_tool("llama-completion") is None:
        pytest.skip("needs llama.cpp's llama-completion: `make llamacpp`")
    release = build_release(run / "variants" / "q8_0", "tiny")
    card = next(entry.data for entry in release.entries if entry.name == "README.md")
    (commands,) = _blocks((card or b"").decode(), "llama.cpp", "sh")
    command = commands.splitlines()[0].replace("llama-completion", str(tool("llama-completion")), 1)
    subprocess.run(command, shell=True, cwd=run / "variants" / "q8_0", check=True, timeout=120, capture_output=True)


@pytest.mark.parametrize(
    ("container", "files", "present", "absent"),
    [
        ("gptq", ["model.safetensors"], ["vllm serve .", "gptqmodel"], ["ollama create", "llama-server"]),
        ("gguf", ["m.Q4_0.gguf"], ["vllm serve ./m.Q4_0.gguf --tokenizer owner/model", "llama-server -m m.Q4_0.gguf"], []),
        ("safetensors", ["model.safetensors"], ["ollama create demo-int4", "echo 'FROM .' > Modelfile"], ["llama-server"]),
    ],
)
def test_commands_are_those_of_the_container(container: str, files: list[str], present: list[str], absent: list[str]) -> None:
    card = _card(manifest={**MANIFEST, "container": container}, files=files)
    assert all(each in card for each in present) and not any(each in card for each in absent)


def test_a_planted_secret_is_in_no_published_text(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in the recipe, the report and the gate: as a user might have put it into a path or a URL."""
    secret = "planted-Secret-0123"
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("recipe.yaml", "report.json", "report.md", "report.html", "report.png"):
        (copy / name).write_bytes((run / name).read_bytes().replace(b"tiny-llama", f"tiny-{secret}".encode()))
    assert secret in (copy / "recipe.yaml").read_text()
    monkeypatch.setenv("HF_TOKEN", secret)
    release = build_release(
        run / "variants" / "int4", "tiny", run=copy, gate={"passed": True, "by": f"https://me:{secret}@host"}
    )
    assert secret.encode() not in release.manifest
    assert not [entry.name for entry in release.entries if secret.encode() in b"".join(entry.chunks())]
    assert json.loads(next(e.data or b"" for e in release.entries if e.name == "gate.json"))["by"] == "https://***@host"
