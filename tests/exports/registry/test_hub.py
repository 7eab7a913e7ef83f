"""The Hugging Face Hub as huggingface_hub speaks to it: what is sent, moved, resumed and refused."""

from __future__ import annotations

import hashlib
import logging
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import _commit_api, constants
from huggingface_hub.utils import close_session

from exports.registry import connect
from exports.registry.base import Conflict, Damaged, Entry, NotFound
from exports.registry.hub import HubRegistry
from exports.registry.names import parse_reference
from exports.registry.release import Release
from exports.registry.transfer import directory_problems, publish, pull, reference_problems
from quantize.errors import InputError
from tests.exports.registry.hub_server import Server, hub_server
from tests.exports.registry.network import cutting_proxy

MakeRelease = Callable[..., Release]
TOKEN = "hf_planted0token1of2this3test4"


@pytest.fixture(autouse=True)
def alone_and_quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No token, cache or waiting of this machine's; large files go by Git LFS."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    # The library waits for seconds before it tries again.
    monkeypatch.setattr("huggingface_hub.utils._http.time", types.SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr("huggingface_hub.file_download.time", types.SimpleNamespace(sleep=lambda seconds: None))
    yield
    close_session()


@pytest.fixture
def server() -> Iterator[Server]:
    with hub_server() as made:
        yield made


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], HubRegistry]:
    """``at(port)``: the registry of the Hub there."""

    def make(port: int) -> HubRegistry:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        made = connect("hub", "")
        assert isinstance(made, HubRegistry)
        return made

    return make


At = Callable[[int], HubRegistry]


def _same(folder: Path, release: Release) -> bool:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items() if name != "release.json"} == {
        entry.name: entry.sha256 for entry in release.entries
    } and found["release.json"] == release.manifest


def _weights(release: Release) -> list[Entry]:
    return [entry for entry in release.entries if entry.name.endswith(".safetensors")]


def test_published_is_pulled_by_tag_and_digest(
    server: Server, at: At, make_release: MakeRelease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, registry = make_release(files=2, size=50_000), at(server.server_port)
    reference, sent = publish(registry, "me/Tiny", "v1", release)
    assert str(reference) == f"hub:me/Tiny:v1@{release.digest}" and sent == server.stored == 100_000
    repository = server.repositories["me/Tiny"]
    assert repository.private and set(repository.branches) == {"main", "v1"}
    assert set(repository.tags) == {f"release-{release.digest[7:]}"}
    for number, text in enumerate(["hub:me/Tiny:v1", f"hub:me/Tiny@{release.digest}"]):
        pull(parse_reference(text), tmp_path / str(number))
        assert _same(tmp_path / str(number), release) and directory_problems(tmp_path / str(number)) == []
    assert reference_problems(reference, tmp_path) == []
    assert registry.tags("me/Tiny") == {"v1": release.digest}
    with pytest.raises(InputError, match="needs a token"):
        registry.names()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert registry.names() == ["me/Tiny"]
    with pytest.raises(NotFound, match="its tags: v1"):
        pull(parse_reference("hub:me/Tiny:v2"), tmp_path / "none")
    with pytest.raises(NotFound, match="no release"):
        pull(parse_reference(f"hub:me/Tiny@sha256:{'0' * 64}"), tmp_path / "none")
    before = len([1 for method, path in server.log if "/commit/" in path])
    assert publish(registry, "me/Tiny", "v1", release) == (reference, 0)
    assert len([1 for method, path in server.log if "/commit/" in path]) == before


def test_latest_is_main_and_moves_with_its_files(server: Server, at: At, make_release: MakeRelease, tmp_path: Path) -> None:
    first, second, registry = make_release("first", files=3), make_release("second", seed=1), at(server.server_port)
    publish(registry, "me/tiny", "latest", first)
    repository = server.repositories["me/tiny"]
    repository.commit("main", {**repository.commits[repository.branches["main"]], "notes.txt": b"of its owner"})
    publish(registry, "me/tiny", "latest", second)
    publish(registry, "me/tiny", "v1", first)
    publish(registry, "me/tiny", "v1", second)
    for branch, extra in (("main", {"notes.txt"}), ("v1", set[str]())):
        files = repository.commits[repository.branches[branch]]
        assert set(files) == {entry.name for entry in second.entries} | {"release.json", ".gitattributes"} | extra
        weights = next(entry for entry in second.entries if entry.name == "model-0.safetensors")
        assert files["model-0.safetensors"] == (weights.sha256, weights.size)
        assert files["release.json"] == second.manifest
    assert registry.tags("me/tiny") == {"latest": second.digest, "v1": second.digest}
    pull(parse_reference(f"hub:me/tiny@{first.digest}"), tmp_path / "first-again")
    assert _same(tmp_path / "first-again", first)
    pull(parse_reference("hub:me/tiny"), tmp_path / "latest")
    assert _same(tmp_path / "latest", second)
    assert server.stored == sum(entry.size for release in (first, second) for entry in _weights(release))


@pytest.mark.parametrize("before", [30_000, 75_000, 130_000])
def test_an_upload_that_breaks_off_goes_on(
    server: Server, at: At, make_release: MakeRelease, tmp_path: Path, before: int
) -> None:
    release = make_release(size=120_000)
    with cutting_proxy(server.server_port) as proxy:
        proxy.cuts = [before]
        publish(at(proxy.port), "me/tiny", "latest", release)
        assert not proxy.cuts and server.stored < release.size + 25_000  # a part at most is sent again
    at(server.server_port)
    pull(parse_reference("hub:me/tiny"), tmp_path / "pulled")
    assert _same(tmp_path / "pulled", release)


def test_a_network_that_stays_away_leaves_the_old_release_and_the_next_publisher_sends_the_rest(
    server: Server, at: At, make_release: MakeRelease, tmp_path: Path
) -> None:
    old, new = make_release("old"), make_release("new", seed=1, files=16, size=60_000)
    publish(at(server.server_port), "me/tiny", "latest", old)
    with cutting_proxy(server.server_port) as proxy:
        proxy.cuts = [600_000 + 1000 * number for number in range(900)]
        with pytest.raises(InputError, match="the same command goes on"):
            publish(at(proxy.port), "me/tiny", "latest", new)
    registry = at(server.server_port)
    assert registry.tags("me/tiny") == {"latest": old.digest}
    finished = sum(entry.size for entry in _weights(new) if registry.has("me/tiny", entry))
    assert 0 < finished < 960_000
    server.stored = 0
    reference, sent = publish(registry, "me/tiny", "latest", new)
    assert sent == server.stored == 960_000 - finished
    pull(reference, tmp_path / "pulled")
    assert _same(tmp_path / "pulled", new)


def test_cut_at_any_request_it_shows_the_old_release_or_the_new_one(
    server: Server, at: At, make_release: MakeRelease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's side of a publisher that is killed: after any number of requests there are no more."""
    old, new = make_release("old"), make_release("new", seed=1, size=30_000)
    publish(at(server.server_port), "me/tiny", "latest", old)
    shown = set[str]()
    for allowed in range(100):
        server.log.clear()
        registry = at(server.server_port)
        request = registry.hub.api._build_hf_headers  # every call of the API asks for its headers

        def counted(*arguments: object, allowed: int = allowed, request: Callable[..., object] = request, **options: object):  # type: ignore[no-untyped-def]
            if len(server.log) >= allowed:
                raise KeyboardInterrupt
            return request(*arguments, **options)

        monkeypatch.setattr(registry.hub.api, "_build_hf_headers", counted)
        try:
            publish(registry, "me/tiny", "latest", new)
            finished = True
        except KeyboardInterrupt:
            finished = False
        shown.add(at(server.server_port).tags("me/tiny")["latest"])
        assert shown <= {old.digest, new.digest}
        pull(parse_reference("hub:me/tiny"), tmp_path / f"pulled-{allowed}")
        if finished:
            break
    assert finished and shown == {old.digest, new.digest} and allowed > 5
    assert not any(branch.startswith("staging-") for branch in server.repositories["me/tiny"].branches)


def test_a_download_cut_in_the_middle_goes_on(
    server: Server, at: At, make_release: MakeRelease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    release = make_release(size=200_000)
    publish(at(server.server_port), "me/tiny", "latest", release)
    with cutting_proxy(server.server_port) as proxy:
        at(proxy.port)
        proxy.cuts_back = [60_000, 120_000]
        pull(parse_reference("hub:me/tiny"), tmp_path / "pulled")
        assert not proxy.cuts_back and proxy.received < release.size + 100_000
    assert _same(tmp_path / "pulled", release)


def test_damage_on_the_hub_is_refused_by_name(server: Server, at: At, make_release: MakeRelease, tmp_path: Path) -> None:
    release = make_release(size=50_000)
    reference, _ = publish(at(server.server_port), "me/tiny", "latest", release)
    repository, key = server.repositories["me/tiny"], _weights(release)[0].sha256
    whole = server.blobs[key]
    for damaged in (b"x" + whole[1:], b"y" * 50_000):
        server.blobs[key] = damaged
        with pytest.raises(Damaged, match=r"model-0\.safetensors is damaged"):
            pull(reference, tmp_path / "pulled")
        assert not (tmp_path / "pulled").exists()
        assert "model-0.safetensors" in reference_problems(reference, tmp_path)[0]
    server.blobs[key] = whole
    files = repository.commits[repository.tags[f"release-{release.digest[7:]}"]]
    kept = dict(files)
    for name, data in (("model-0.safetensors", b"small"), ("config.json", b"{}"), ("README.md", b"# artifacT\n")):
        files[name] = data
        with pytest.raises(Damaged, match=name.replace(".", r"\.")):
            pull(reference, tmp_path / "pulled")
        del files[name]
        with pytest.raises(Damaged, match=rf"lacks {name}"):
            pull(reference, tmp_path / "pulled")
        files.update(kept)
    files["release.json"] = release.manifest.replace(b"tiny", b"tinx")
    with pytest.raises(Damaged, match=r"release\.json"):
        pull(reference, tmp_path / "pulled")


def test_a_changed_file_is_not_published(server: Server, at: At, make_release: MakeRelease, tmp_path: Path) -> None:
    release = make_release(size=50_000)
    (tmp_path / "artifact" / "model-0.safetensors").write_bytes(b"y" * 50_000)
    with pytest.raises(Damaged, match="is not the file that was listed"):
        publish(at(server.server_port), "me/tiny", "latest", release)
    assert server.repositories == {} and server.stored == 0


@pytest.mark.parametrize("tag", ["latest", "v1"])
def test_a_tag_moved_meanwhile_is_a_conflict(server: Server, at: At, make_release: MakeRelease, tag: str) -> None:
    releases = [make_release(f"r{number}", seed=number) for number in range(3)]
    registry = at(server.server_port)
    publish(registry, "me/tiny", "a", releases[0])
    publish(registry, "me/tiny", "b", releases[1])
    publish(registry, "me/tiny", tag, releases[2])
    with pytest.raises(Conflict, match="was moved meanwhile"):
        registry.set_tag("me/tiny", tag, releases[0].digest, releases[1].digest)
    registry.set_tag("me/tiny", tag, releases[2].digest, None)  # as it is: no conflict
    # Somebody else is faster between looking and moving.
    server.before_commit = lambda name, branch: at(server.server_port).set_tag(name, tag, releases[1].digest)
    with pytest.raises(Conflict, match="was moved meanwhile"):
        registry.set_tag("me/tiny", tag, releases[0].digest, releases[2].digest)
    assert registry.tags("me/tiny")[tag] == releases[1].digest
    server.before_commit = lambda name, branch: at(server.server_port).set_tag(name, tag, releases[2].digest)
    registry.set_tag("me/tiny", tag, releases[0].digest)  # whatever it says
    assert registry.tags("me/tiny")[tag] == releases[0].digest


@pytest.mark.parametrize("tag", ["latest", "v1"])
def test_of_two_publishers_one_wins_whole(server: Server, at: At, make_release: MakeRelease, tmp_path: Path, tag: str) -> None:
    releases = [make_release(f"r{number}", seed=number, size=30_000) for number in range(2)]
    registries = [at(server.server_port) for _ in releases]
    for registry, release in zip(registries, releases, strict=True):
        registry.push("me/tiny", release.entries)
        registry.put("me/tiny", release.manifest, release.entries)

    def move(number: int) -> str:
        try:
            registries[number].set_tag("me/tiny", tag, releases[number].digest, None)
            return "won"
        except Conflict:
            return "told"

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(move, range(2))) == ["told", "won"]
    reference = registries[0].reference("me/tiny", tag)
    pull(reference, tmp_path / "pulled")
    assert any(_same(tmp_path / "pulled", release) for release in releases)


def test_the_same_release_by_two_publishers_is_no_conflict(server: Server, at: At, make_release: MakeRelease) -> None:
    release = make_release(size=30_000)
    registries = [at(server.server_port) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        made = list(pool.map(lambda registry: publish(registry, "me/tiny", "v1", release)[0], registries))
    assert {str(reference) for reference in made} == {f"hub:me/tiny:v1@{release.digest}"}
    assert set(server.repositories["me/tiny"].branches) == {"main", "v1"}


def test_what_is_no_release_is_left_alone(server: Server, at: At, make_release: MakeRelease) -> None:
    registry, release = at(server.server_port), make_release()
    publish(registry, "me/tiny", "v1", release)
    repository = server.repositories["me/tiny"]
    held = {**repository.commits[repository.branches["main"]], "pytorch_model.bin": b"of somebody else"}
    repository.commit("main", dict(held))
    with pytest.raises(InputError, match=r"holds files that are no release, such as pytorch_model\.bin"):
        publish(registry, "me/tiny", "latest", release)
    assert repository.commits[repository.branches["main"]] == held
    repository.tags["v2"] = repository.branches["main"]
    with pytest.raises(Conflict, match="is a git tag"):
        publish(registry, "me/tiny", "v2", release)
    repository.tags["v3"] = repository.tags[f"release-{release.digest[7:]}"]
    assert registry.tags("me/tiny") == {"v1": release.digest, "v3": release.digest}


def test_what_the_hub_did_not_take_is_no_release(
    server: Server, at: At, make_release: MakeRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, release = at(server.server_port), make_release()
    monkeypatch.setattr("huggingface_hub._commit_api._send_commit", _without("tokenizer.json"))
    with pytest.raises(InputError, match=r"did not take tokenizer\.json .* as they are; a \.gitignore"):
        publish(registry, "me/tiny", "latest", release)
    assert server.repositories["me/tiny"].tags == {} and registry.tags("me/tiny") == {}


def _without(name: str) -> Callable[..., object]:
    send = _commit_api._send_commit

    def sent(*, operations: list[Any], **options: Any) -> object:
        return send(operations=[each for each in operations if each.path_in_repo != name], **options)

    return sent


def test_tokens_are_used_and_told_nobody(
    at: At, make_release: MakeRelease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    release = make_release(size=50_000)
    caplog.set_level(logging.DEBUG)
    with hub_server(token=TOKEN) as server:
        with pytest.raises(InputError, match="set HF_TOKEN") as caught:
            publish(at(server.server_port), "me/tiny", "latest", release)
        monkeypatch.setenv("HF_TOKEN", TOKEN[:-1] + "X")
        with pytest.raises(InputError, match=r"status 401.*set HF_TOKEN") as wrong:
            publish(at(server.server_port), "me/tiny", "latest", release)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        reference, _ = publish(at(server.server_port), "me/tiny", "latest", release)
        pull(reference, tmp_path / "pulled")
        server.readonly = True
        with pytest.raises(InputError, match=r"status 403: You have no right") as forbidden:
            publish(at(server.server_port), "me/tiny", "v2", release)
        assert server.leaks == [] and any(path.startswith("/cdn/") for _, path in server.log)
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(NotFound, match="or it is private and HF_TOKEN may not see it"):
            pull(parse_reference("hub:me/tiny"), tmp_path / "none")
    said = caplog.text + "".join(str(each.value) for each in (caught, wrong, forbidden))
    assert "planted" not in said and "X-Signature" not in "".join(str(each.value) for each in (caught, wrong, forbidden))
    assert not any(b"planted" in path.read_bytes() for path in (tmp_path / "pulled").rglob("*") if path.is_file())


def test_failures_tell_no_signed_address(
    server: Server, at: At, make_release: MakeRelease, caplog: pytest.LogCaptureFixture
) -> None:
    registry = at(server.server_port)
    with cutting_proxy(server.server_port) as proxy:
        proxy.cuts = [40_000 + 500 * number for number in range(2000)]
        with pytest.raises(InputError) as caught:
            publish(at(proxy.port), "me/tiny", "latest", make_release(size=200_000))
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]
    assert "X-Signature" not in "".join([str(caught.value), *warned])
    with pytest.raises(InputError, match="cannot be reached"):
        at(proxy.port).tags("me/tiny")
    assert registry.tags("me/other") == {}


@pytest.mark.parametrize("tag", ["main", "release-x", "staging-1", "a" * 40, "v1.", "v1..2", "v1.lock"])
def test_tags_that_can_be_no_branch_are_refused(server: Server, at: At, make_release: MakeRelease, tag: str) -> None:
    with pytest.raises(InputError, match="is not allowed"):
        publish(at(server.server_port), "me/tiny", tag, make_release())
    assert server.log == []


def test_names_and_locations_that_cannot_be(at: At, make_release: MakeRelease, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="OWNER/NAME"):
        publish(at(9), "tiny", "latest", make_release())
    with pytest.raises(InputError, match="hub has no location"):
        connect("hub", "https://other")
    monkeypatch.setenv("HF_ENDPOINT", "https://me:pass-word@host")
    with pytest.raises(InputError, match="HF_ENDPOINT") as caught:
        connect("hub", "")
    assert "pass-word" not in str(caught.value)
