"""An OCI registry as the specification has it: what is sent, resumed, refused, and how one logs in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from exports.registry import connect, oci_client, oci_upload
from exports.registry.base import Conflict, Damaged, Entry, NotFound
from exports.registry.names import parse_reference
from exports.registry.oci import OciRegistry
from exports.registry.release import Release
from exports.registry.transfer import publish, pull, reference_problems
from quantize.errors import InputError
from tests.exports.registry.network import cutting_proxy
from tests.exports.registry.oci_server import Server, oci_server

MakeRelease = Callable[..., Release]


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oci_upload, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(oci_upload, "PAUSE", 0.01)
    monkeypatch.setattr(oci_client, "PAUSE", 0.01)
    for name in ("OCI_USERNAME", "OCI_PASSWORD", "OCI_PLAIN_HTTP"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Server]:
    with oci_server() as made:
        yield made


def _registry(port: int) -> OciRegistry:
    made = connect("oci", f"127.0.0.1:{port}")
    assert isinstance(made, OciRegistry)
    return made


def _same(folder: Path, release: Release) -> bool:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items() if name != "release.json"} == {
        entry.name: entry.sha256 for entry in release.entries
    } and found["release.json"] == release.manifest


def test_published_is_pulled_by_tag_digest_and_image_digest(server: Server, make_release: MakeRelease, tmp_path: Path) -> None:
    release, registry = make_release(files=2, size=50_000), _registry(server.server_port)
    reference, sent = publish(registry, "team/tiny", "v1", release)
    assert str(reference) == f"oci:127.0.0.1:{server.server_port}/team/tiny:v1@{release.digest}" and sent == release.size
    image = server.manifests["team/tiny", "v1"]
    digests = [release.digest, f"sha256:{hashlib.sha256(image).hexdigest()}"]
    base = f"oci:{registry.location}/team/tiny"
    for number, text in enumerate([f"{base}:v1", *(f"{base}@{digest}" for digest in digests)]):
        pull(parse_reference(text), tmp_path / str(number))
        assert _same(tmp_path / str(number), release)
    assert reference_problems(reference, tmp_path) == []
    assert registry.names() == ["team/tiny"] and registry.tags("team/tiny") == {"v1": release.digest}
    with pytest.raises(NotFound, match="its tags: v1"):
        pull(parse_reference(f"{base}:v2"), tmp_path / "none")
    with pytest.raises(NotFound, match="no release"):
        pull(parse_reference(f"{base}@sha256:{'0' * 64}"), tmp_path / "none")
    assert publish(registry, "team/tiny", "v1", release) == (reference, 0)


def test_the_image_manifest_is_modelpacks(server: Server, make_release: MakeRelease) -> None:
    release = make_release()
    publish(_registry(server.server_port), "tiny", "latest", release)
    image = json.loads(server.manifests["tiny", "latest"])
    assert image["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert image["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    types = {layer["annotations"]["org.cncf.model.filepath"]: layer["mediaType"] for layer in image["layers"]}
    assert types["model-0.safetensors"] == "application/vnd.cncf.model.weight.v1.raw"
    assert types["tokenizer.json"] == "application/vnd.cncf.model.weight.config.v1.raw"
    assert types["README.md"] == types["release.json"] == "application/vnd.cncf.model.doc.v1.raw"
    config = json.loads(server.blobs[image["config"]["digest"]])
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer["digest"] for layer in image["layers"]]}
    assert config["descriptor"]["name"] == "tiny-int4" and config["config"]["format"] == "safetensors"


@pytest.mark.parametrize("at", [30_000, 75_000, 110_000])
def test_an_upload_cut_in_a_chunk_goes_on_where_it_was(
    server: Server, make_release: MakeRelease, tmp_path: Path, at: int
) -> None:
    release = make_release(size=120_000)
    with cutting_proxy(server.server_port) as proxy:
        proxy.cuts = [at, at + 5000]
        registry = _registry(proxy.port)
        reference, _ = publish(registry, "tiny", "latest", release)
        assert not proxy.cuts
        assert proxy.sent < release.size + 50_000  # less than twice
        pull(reference, tmp_path / "pulled")
    assert _same(tmp_path / "pulled", release)
    big = next(entry for entry in release.entries if entry.size == 120_000)
    assert server.blobs[f"sha256:{big.sha256}"]


def test_a_network_that_stays_away_leaves_the_old_release_and_the_next_publisher_sends_the_rest(
    server: Server, make_release: MakeRelease, tmp_path: Path
) -> None:
    old, new = make_release("old"), make_release("new", seed=1, files=4, size=60_000)
    direct = _registry(server.server_port)
    publish(direct, "tiny", "latest", old)
    with cutting_proxy(server.server_port) as proxy:
        proxy.cuts = [150_000 + 1000 * number for number in range(200)]
        with pytest.raises(InputError, match="the same command goes on"):
            publish(_registry(proxy.port), "tiny", "latest", new)
    assert direct.tags("tiny") == {"latest": old.digest}
    finished = sum(len(server.blobs.get(f"sha256:{entry.sha256}", b"")) for entry in new.entries)
    assert 0 < finished < new.size
    reference, sent = publish(direct, "tiny", "latest", new)
    assert sent == new.size - finished
    pull(reference, tmp_path / "pulled")
    assert _same(tmp_path / "pulled", new)


def test_a_download_cut_in_the_middle_goes_on(server: Server, make_release: MakeRelease, tmp_path: Path) -> None:
    release = make_release(size=200_000)
    publish(_registry(server.server_port), "tiny", "latest", release)
    with cutting_proxy(server.server_port) as proxy:
        proxy.cuts_back = [60_000, 120_000]
        pull(parse_reference(f"oci:127.0.0.1:{proxy.port}/tiny"), tmp_path / "pulled")
        assert not proxy.cuts_back and proxy.received < release.size + 60_000
    assert _same(tmp_path / "pulled", release)


def test_damage_on_the_server_is_refused_by_name(server: Server, make_release: MakeRelease, tmp_path: Path) -> None:
    release = make_release(size=50_000)
    reference, _ = publish(_registry(server.server_port), "tiny", "latest", release)
    key = next(f"sha256:{entry.sha256}" for entry in release.entries if entry.name == "model-0.safetensors")
    whole = server.blobs[key]
    for damaged in (b"x" + whole[1:], whole[:-1], whole + b"x"):
        server.blobs[key] = damaged
        with pytest.raises(Damaged, match=r"model-0\.safetensors is damaged"):
            pull(reference, tmp_path / "pulled")
        assert not (tmp_path / "pulled").exists()
        assert "model-0.safetensors" in reference_problems(reference, tmp_path)[0]
    del server.blobs[key]
    with pytest.raises(Damaged, match=r"model-0\.safetensors"):
        pull(reference, tmp_path / "pulled")
    server.blobs[release.digest] = release.manifest.replace(b"tiny", b"tinx")
    with pytest.raises(Damaged, match=r"release\.json"):
        pull(reference, tmp_path / "pulled")


def test_a_changed_file_is_not_published(server: Server, make_release: MakeRelease, tmp_path: Path) -> None:
    release = make_release(size=50_000)
    (tmp_path / "artifact" / "model-0.safetensors").write_bytes(b"y" * 50_000)
    registry = _registry(server.server_port)
    with pytest.raises(Damaged, match="is not the file that was listed"):
        publish(registry, "tiny", "latest", release)
    assert registry.tags("tiny") == {} and not server.uploads


@pytest.mark.parametrize("compares", [True, False])
def test_a_tag_moved_meanwhile_is_a_conflict(server: Server, make_release: MakeRelease, compares: bool) -> None:
    first, second = make_release("first"), make_release("second", seed=1)
    registry = _registry(server.server_port)
    publish(registry, "tiny", "other", first)
    publish(registry, "tiny", "other2", second)
    registry.set_tag("tiny", "latest", first.digest, None)
    with pytest.raises(Conflict, match="was moved meanwhile"):
        registry.set_tag("tiny", "latest", second.digest, None)
    registry.set_tag("tiny", "latest", first.digest, None)  # as it is: no conflict
    server.compares = compares

    def overtake(name: str, tag: str) -> None:
        server.before_put = None
        server.manifests[name, tag] = server.manifests[name, f"release-{first.digest[7:]}"]

    server.manifests.pop(("tiny", "latest"))
    server.before_put = overtake
    if compares:  # somebody else is faster between looking and moving
        with pytest.raises(Conflict, match="at the same time"):
            registry.set_tag("tiny", "latest", second.digest, None)
        assert registry.tags("tiny")["latest"] == first.digest
    else:
        registry.set_tag("tiny", "latest", second.digest, None)
        assert registry.tags("tiny")["latest"] == second.digest


def test_an_image_of_another_kind_is_left_alone(server: Server, make_release: MakeRelease, tmp_path: Path) -> None:
    server.manifests["tiny", "latest"] = b'{"layers": []}'
    registry = _registry(server.server_port)
    assert registry.tags("tiny") == {}
    with pytest.raises(Damaged, match="is no release of this project"):
        pull(registry.reference("tiny", "latest"), tmp_path / "pulled")
    with pytest.raises(Conflict, match="another kind"):
        publish(registry, "tiny", "latest", make_release())
    assert server.manifests["tiny", "latest"] == b'{"layers": []}'


def test_logging_in_and_what_errors_tell(make_release: MakeRelease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with oci_server(token="t0ken-of-the-server") as server:
        registry, release = _registry(server.server_port), make_release()
        with pytest.raises(InputError, match="refuses access") as caught:
            publish(registry, "tiny", "latest", release)
        assert "t0ken" not in str(caught.value)
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
        (tmp_path / "config.json").write_text(json.dumps({"auths": {registry.location: {"auth": "bWU6cHc="}}}))
        reference, _ = publish(_registry(server.server_port), "tiny", "latest", release)
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "none"))
        monkeypatch.setenv("OCI_USERNAME", "me")
        monkeypatch.setenv("OCI_PASSWORD", "planted-pass-word")
        pull(reference, tmp_path / "pulled")
        assert not any("planted" in path for _, path in server.log)


@pytest.mark.parametrize("location", ["me:pass-word@host", "host/x", "", "host:port", "ho st", "http://host", "-x"])
def test_what_is_no_host_is_refused_without_telling_a_password(location: str) -> None:
    with pytest.raises(InputError, match="HOST or HOST:PORT") as caught:
        connect("oci", location)
    assert "pass-word" not in str(caught.value)


def test_where_plain_http_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCI_PLAIN_HTTP", "inside:5000")
    bases = {
        host: oci_client.Client(host).base.partition(":")[0]
        for host in ("127.0.0.1:5", "inside:5000", "inside", "127.0.0.1.x.org")
    }
    assert list(bases.values()) == ["http", "http", "https", "https"]


def test_small_blobs_take_two_requests(server: Server) -> None:
    _registry(server.server_port).push("tiny", [Entry.of_data("a", b"a", "report"), Entry.of_data("b", b"", "report")])
    assert [method for method, _ in server.log] == ["HEAD", "POST", "PUT"] * 2
