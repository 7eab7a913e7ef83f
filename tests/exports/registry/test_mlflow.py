"""A real MLflow server with SQLite: push, pull, verify, aliases, and what goes wrong."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from exports.registry import connect
from exports.registry import mlflow as registry_module
from exports.registry.base import Conflict, Damaged, NotFound
from exports.registry.mlflow import MlflowRegistry
from exports.registry.release import Release
from exports.registry.transfer import directory_problems, publish, pull, reference_problems
from quantize.artifact import record_evaluation
from quantize.errors import InputError
from tests.exports.registry.network import cutting_proxy

MakeRelease = Callable[..., Release]
HAS_MLFLOW = importlib.util.find_spec("mlflow") is not None
needs_mlflow = pytest.mark.skipif(not HAS_MLFLOW, reason="mlflow is missing; install the `publish` extra")


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a server that has started; its files are in the folder ``mlflow0/artifacts``."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = int(taken.getsockname()[1])
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(free), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/db.sqlite", "--artifacts-destination", str(folder / "artifacts")]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{free}/health", timeout=10).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.25)
        yield free
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # it would wait for idle connections
        process.wait(60)


def _registry(port: int) -> MlflowRegistry:
    made = connect("mlflow", f"http://127.0.0.1:{port}")
    assert isinstance(made, MlflowRegistry)
    return made


@needs_mlflow
@pytest.mark.registries
def test_push_pull_verify_and_aliases(port: int, make_release: MakeRelease, tmp_path: Path) -> None:
    first, second = make_release("first", files=2), make_release("second", seed=1)
    registry = _registry(port)
    reference, sent = publish(registry, "tiny", "candidate", first)
    assert sent == first.size and registry.names() == ["tiny"]
    pull(reference, tmp_path / "pulled")
    assert directory_problems(tmp_path / "pulled") == [] and reference_problems(reference, tmp_path) == []
    for path in (tmp_path / "first").iterdir():
        assert (tmp_path / "pulled" / path.name).read_bytes() == path.read_bytes()
    assert publish(registry, "tiny", "champion", first)[1] == 0
    publish(registry, "tiny", "candidate", second)
    assert registry.tags("tiny") == {"champion": first.digest, "candidate": second.digest, "latest": second.digest}
    publish(registry, "tiny", "latest", first)
    assert registry.tags("tiny")["latest"] == first.digest
    with pytest.raises(NotFound, match="no release"):
        registry.manifest("tiny", f"sha256:{'0' * 64}")
    model = registry.client.get_model_version_by_alias("tiny", "champion")
    run = registry.client.get_run(model.run_id)
    assert run.data.params["solver.name"] == "gptq" and run.data.params["bits"] == "4" and run.info.status == "FINISHED"


@needs_mlflow
@pytest.mark.registries
def test_figures_become_metrics(port: int, make_artifact: Callable[..., Path]) -> None:
    from exports.registry.release import assemble

    artifact = make_artifact("measured")
    record_evaluation(artifact, {"ppl": 10.5})
    registry = _registry(port)
    publish(registry, "measured", "champion", assemble(artifact, {}, {}))
    model = registry.client.get_model_version_by_alias("measured", "champion")
    assert registry.client.get_run(model.run_id).data.metrics["ppl"] == 10.5


@needs_mlflow
@pytest.mark.registries
def test_a_network_cut_half_way(port: int, make_release: MakeRelease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(registry_module, "_PAUSE", 0.01)
    old, new = make_release("old"), make_release("new", seed=1, files=4, size=200_000)
    direct = _registry(port)
    publish(direct, "cut", "candidate", old)
    with cutting_proxy(port) as proxy:
        proxy.cuts = [450_000 + 1000 * number for number in range(3000)]
        with pytest.raises(InputError, match="127"):
            publish(_registry(proxy.port), "cut", "candidate", new)
        proxy.cuts.clear()
        _assert_the_rest_is_sent(direct, _registry(proxy.port), old, new)
        pull(direct.reference("cut", "candidate"), tmp_path / "pulled")


def _assert_the_rest_is_sent(direct: MlflowRegistry, again: MlflowRegistry, old: Release, new: Release) -> None:
    """``again`` is the server that failed: MLflow remembers, in a process, where a run's files are sent."""
    assert direct.tags("cut")["candidate"] == old.digest
    finished = sum(entry.size for entry in new.entries if entry.size == 200_000 and direct.has("cut", entry))
    assert 0 < finished < 800_000
    reference, sent = publish(again, "cut", "candidate", new)
    assert reference.digest == new.digest and sent <= new.size - finished


@needs_mlflow
@pytest.mark.registries
def test_a_flipped_bit_on_the_server(
    port: int, make_release: MakeRelease, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reference, _ = publish(_registry(port), "flipped", "candidate", make_release("flipped", seed=9))
    found = [
        path
        for path in tmp_path_factory.getbasetemp().glob("mlflow[0-9]*/artifacts/**/model-0.safetensors")
        if path.read_bytes() == (tmp_path / "flipped" / "model-0.safetensors").read_bytes()
    ]
    assert len(found) == 1
    data = bytearray(found[0].read_bytes())
    data[100] ^= 1
    found[0].write_bytes(data)
    with pytest.raises(Damaged, match=r"model-0\.safetensors is damaged"):
        pull(reference, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


@needs_mlflow
@pytest.mark.registries
def test_of_two_publishers_one_wins_whole(port: int, make_release: MakeRelease) -> None:
    releases = [make_release(f"two{number}", seed=number) for number in range(2)]
    registries = [_registry(port) for _ in releases]
    for registry, release in zip(registries, releases, strict=True):
        registry.push("two", release.entries)
        registry.put("two", release.manifest, release.entries)

    def move(number: int) -> str:
        try:
            registries[number].set_tag("two", "champion", releases[number].digest, None)
            return "won"
        except Conflict:
            return "told"

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(move, range(2))) == ["told", "won"]


@pytest.mark.parametrize("location", ["", "host", "http://me:pass-word@host", "sqlite:///x", "http://"])
def test_what_is_no_server_is_refused_without_telling_a_password(location: str) -> None:
    with pytest.raises(InputError, match="http://HOST:PORT") as caught:
        connect("mlflow", location)
    assert "pass-word" not in str(caught.value)
