"""A card's commands for vLLM and Ollama: vLLM's is run where vLLM is; else both are held against what they document."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig, PreTrainedTokenizerFast

from eval.tasks_vllm import python as vllm_python
from exports.card_commands import how_to_run
from quantize.errors import InputError

# Ollama's documentation of Modelfiles: `INSTRUCTION arguments` a line, of these; `FROM` is required.
_INSTRUCTIONS = {"FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE"}
_OLLAMA_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,78}[a-z0-9])?")
# Of `vllm serve --help`; the model is its only positional argument.
_VLLM_OPTIONS = {"--tokenizer", "--host", "--port", "--dtype", "--quantization", "--max-model-len", "--load-format"}
CASES = [
    ("gptq", "model.safetensors"),
    ("awq", "model.safetensors"),
    ("compressed-tensors", "model.safetensors"),
    ("bitsandbytes", "model.safetensors"),
    ("safetensors", "model.safetensors"),
    ("gguf", "tiny.Q4_0.gguf"),
]


def _commands(container: str, file: str, program: str, name: str = "Me/Demo model") -> list[list[str]]:
    blocks = how_to_run(name, container, [file, "config.json"], "owner/model")
    section = blocks[blocks.index(f"### {program}") + 1 :]
    text = next((each for each in section[: _end(section)] if each.startswith("```sh\n")), "```sh\n```")
    return [shlex.split(line) for line in text.removeprefix("```sh\n").removesuffix("```").splitlines()]


def _end(section: list[str]) -> int:
    return next((number for number, each in enumerate(section) if each.startswith("### ")), len(section))


@pytest.fixture
def release(tmp_path: Path) -> Callable[[str], Path]:
    """``release(file)``: a directory with an empty file of weights."""

    def make(file: str) -> Path:
        (tmp_path / file).write_bytes(b"")
        (tmp_path / "config.json").write_text("{}")
        return tmp_path

    return make


@pytest.mark.parametrize(("container", "file"), CASES)
def test_vllm_is_called_with_what_it_has(container: str, file: str, release: Callable[[str], Path]) -> None:
    (command,) = _commands(container, file, "vLLM")
    assert command[:2] == ["vllm", "serve"]
    options = command[3:]
    assert (release(file) / command[2]).exists() and not command[2].startswith("-")
    assert len(options) % 2 == 0 and set(options[::2]) <= _VLLM_OPTIONS
    assert not any(value.startswith("-") for value in options[1::2])


@pytest.mark.parametrize(("container", "file"), CASES)
def test_ollamas_modelfile_is_written_and_read(container: str, file: str, release: Callable[[str], Path]) -> None:
    commands = _commands(container, file, "Ollama")
    if container not in ("gguf", "safetensors"):
        assert commands == []
        return
    write, create, run = commands
    folder = release(file)
    subprocess.run(shlex.join(write).replace("'>'", ">"), shell=True, cwd=folder, check=True)
    lines = [line for line in (folder / "Modelfile").read_text().splitlines() if line and not line.startswith("#")]
    parsed = [line.split(maxsplit=1) for line in lines]
    assert all(len(each) == 2 and each[0] in _INSTRUCTIONS for each in parsed)
    (source,) = [arguments for instruction, arguments in parsed if instruction == "FROM"]
    # A file's path is relative to the Modelfile; a bare word would be a model of Ollama's library.
    assert source.startswith(("./", "/")) or source == "."
    assert (folder / source).is_file() if container == "gguf" else list((folder / source).glob("*.safetensors"))
    assert create == ["ollama", "create", run[2], "-f", "Modelfile"] and run == ["ollama", "run", run[2]]
    assert _OLLAMA_NAME.fullmatch(run[2]), run[2]


@pytest.mark.slow
def test_the_cards_vllm_command_serves(
    tmp_path: Path,
    small_run: list[str],
    run_recipe: Callable[..., Path],
    make_checkpoint: Callable[..., Path],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    try:
        program = vllm_python().absolute().parent / "vllm"
    except InputError as error:
        pytest.skip(str(error))
    recipe = "# @package _global_\nvariants:\n  fp16: {solver: {name: none}, container: safetensors}\n"
    # As small as vLLM's attention takes it: 64 columns a head.
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = make_checkpoint(tmp_path / "model", LlamaConfig(vocab_size=320, max_position_embeddings=256, **sizes))
    tiny_tokenizer.save_pretrained(model)
    settings = [*small_run, f"model.path={model}"]
    run = run_recipe(tmp_path, recipe, *settings, "stages=[load,calibrate,quantize,export]")
    ((_, *arguments),) = _commands("safetensors", "model.safetensors", "vLLM")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
    # The card's command; only where it listens, how much memory it takes and that it compiles nothing are the test's.
    arguments += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "128", "--enforce-eager"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(_named_vllm(tmp_path / "named", program.parent.parent))
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, *arguments],
            cwd=run / "variants" / "fp16",
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    try:
        _wait(port, process, tmp_path / "log")
        asked = json.dumps({"model": ".", "prompt": "The capital of France is", "max_tokens": 8}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", asked, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as answer:
            told = json.load(answer)
        assert told["usage"]["completion_tokens"] > 0 and isinstance(told["choices"][0]["text"], str)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


def _named_vllm(folder: Path, environment: Path) -> Path:
    """A folder that names vllm-cpu's version as vllm's: its program asks for the version of a package of that name."""
    folder.mkdir()
    for found in environment.glob("lib/python*/site-packages/vllm_cpu-*.dist-info"):
        version = f"{found.name.removeprefix('vllm_cpu-').removesuffix('.dist-info')}+cpu"
        (folder / f"vllm-{version}.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        (folder / f"vllm-{version}.dist-info" / "METADATA").write_text(text)
    return folder


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"vLLM does not answer: {log.read_text()[-3000:]}")
