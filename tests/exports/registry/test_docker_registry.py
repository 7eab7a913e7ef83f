"""Docker's own registry, as Debian packages it (`make docker-registry`): push, pull, verify, and what goes wrong."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from exports.registry import connect, oci_client, oci_upload
from exports.registry.base import Conflict, Damaged
from exports.registry.release import Release
from exports.registry.transfer import directory_problems, publish, pull, reference_problems
from quantize.errors import InputError
from tests.exports.registry.network import cutting_proxy

pytestmark = pytest.mark.registries
MakeRelease = Callable[..., Release]
CACHE = Path(os.environ.get("QUANTIZE_CACHE", Path.home() / ".cache" / "quantize"))
PROGRAM = CACHE / "docker-registry" / "usr" / "bin" / "docker-registry"


@dataclass(frozen=True)
class Docker:
    """A running server: its port, and the folder in which it keeps blobs."""

    port: int
    folder: Path

    def blob(self, sha256: str) -> Path:
        """Where it keeps a blob."""
        return self.folder / "docker/registry/v2/blobs/sha256" / sha256[:2] / sha256 / "data"


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Docker]:
    if not PROGRAM.is_file():
        pytest.skip(f"{PROGRAM} is missing; run `make docker-registry` (needs apt-get and dpkg)")
    monkeypatch.setattr(oci_upload, "CHUNK_BYTES", 100_000)
    monkeypatch.setattr(oci_upload, "PAUSE", 0.02)
    monkeypatch.setattr(oci_client, "PAUSE", 0.02)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = int(taken.getsockname()[1])
    folder, config = tmp_path / "docker", tmp_path / "config.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {folder}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}', secret: for-this-test}}\n"
    )
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([PROGRAM, "serve", config], stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.05)
        yield Docker(port, folder)
    finally:
        process.terminate()
        process.wait(20)


def test_push_pull_verify_and_a_second_tag(docker: Docker, make_release: MakeRelease, tmp_path: Path) -> None:
    release, registry = make_release(files=2, size=350_000), connect("oci", f"127.0.0.1:{docker.port}")
    reference, sent = publish(registry, "team/tiny", "v1", release)
    assert sent == release.size and publish(registry, "team/tiny", "latest", release)[1] == 0
    pull(reference, tmp_path / "pulled")
    assert directory_problems(tmp_path / "pulled") == [] and reference_problems(reference, tmp_path) == []
    for path in (tmp_path / "artifact").iterdir():
        assert (tmp_path / "pulled" / path.name).read_bytes() == path.read_bytes()
    assert registry.names() == ["team/tiny"] and set(registry.tags("team/tiny")) == {"v1", "latest"}


@pytest.mark.parametrize("at", [130_000, 420_000])
def test_a_network_cut_half_way(docker: Docker, make_release: MakeRelease, tmp_path: Path, at: int) -> None:
    old, new = make_release("old"), make_release("new", seed=1, files=3, size=350_000)
    registry = connect("oci", f"127.0.0.1:{docker.port}")
    publish(registry, "tiny", "latest", old)
    with cutting_proxy(docker.port) as proxy:
        proxy.cuts = [at]  # once: the same publisher goes on
        reference, _ = publish(connect("oci", f"127.0.0.1:{proxy.port}"), "tiny", "once", new)
        assert not proxy.cuts
    pull(registry.reference("tiny", "once", reference.digest), tmp_path / "pulled")
    third = make_release("third", seed=2, files=3, size=350_000)
    with cutting_proxy(docker.port) as proxy:
        proxy.cuts = [at + 400_000 + 1000 * number for number in range(200)]  # for good
        with pytest.raises(InputError, match="the same command goes on"):
            publish(connect("oci", f"127.0.0.1:{proxy.port}"), "tiny", "latest", third)
    assert registry.tags("tiny") == {"latest": old.digest, "once": new.digest}
    finished = sum(entry.size for entry in third.entries if registry.has("tiny", entry))
    assert finished > 0
    assert publish(registry, "tiny", "latest", third)[1] == third.size - finished
    assert registry.tags("tiny")["latest"] == third.digest


def test_a_flipped_bit_on_the_server(docker: Docker, make_release: MakeRelease, tmp_path: Path) -> None:
    release, registry = make_release(size=350_000), connect("oci", f"127.0.0.1:{docker.port}")
    reference, _ = publish(registry, "tiny", "latest", release)
    blob = docker.blob(next(entry.sha256 for entry in release.entries if entry.name == "model-0.safetensors"))
    data = bytearray(blob.read_bytes())
    data[200_000] ^= 1
    blob.write_bytes(data)
    with pytest.raises(Damaged, match=r"model-0\.safetensors is damaged"):
        pull(reference, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def test_of_two_publishers_one_wins_whole(docker: Docker, make_release: MakeRelease, tmp_path: Path) -> None:
    releases = [make_release(f"r{number}", seed=number, size=350_000) for number in range(2)]
    registries = [connect("oci", f"127.0.0.1:{docker.port}") for _ in releases]
    for registry, release in zip(registries, releases, strict=True):
        registry.push("tiny", release.entries)
        registry.put("tiny", release.manifest, release.entries)

    def move(number: int) -> str:
        try:
            registries[number].set_tag("tiny", "latest", releases[number].digest, None)
            return "won"
        except Conflict:
            return "told"

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(move, range(2))) == ["told", "won"]
    pull(registries[0].reference("tiny", "latest"), tmp_path / "pulled")
    weights = hashlib.sha256((tmp_path / "pulled" / "model-0.safetensors").read_bytes()).hexdigest()
    assert weights in {entry.sha256 for release in releases for entry in release.entries}
