"""Releases on the Hugging Face Hub, or on a Hub of one's own that ``HF_ENDPOINT`` names.

A name is a model repository, made private. A release is a commit that has exactly its files, under the git tag
``release-HEX``, which never moves. Tags that move are branches, ``latest`` the branch ``main``, so that
``from_pretrained(NAME, revision=TAG)`` loads what the tag says. A branch moves by a commit that names its parent, and the Hub
refuses it where somebody else was faster (``parentCommit``, status 412); a git tag could only be deleted and made anew, and
would be gone in between.

Large files (Git LFS or Xet) are sent by :meth:`HubRegistry.push`, and not again by the next publisher; small texts travel in
the commit.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationCopy, CommitOperationDelete, RepoFile

from exports.registry.base import ANY, MANIFEST_BYTES, Conflict, Damaged, Entry, NotFound, Registry, check_expected
from exports.registry.hub_client import Hub, addition
from exports.registry.names import DEFAULT_TAG, Reference, check_digest, check_name
from exports.registry.release import CARD, parse_release
from quantize.artifact import RELEASE
from quantize.errors import InputError

MAIN = "main"
_OWN, _STAGING = "release-", "staging-"
_ATTRIBUTES = ".gitattributes"  # the Hub's own file: which names are large files
_NO_BRANCH = re.compile(r"main|(?:release|staging)-.*|[0-9a-f]{40}|.*\.\..*|.*\.|.*\.lock")
_ATTEMPTS = 5  # of moving a tag, against others who move it


def connect(scheme: str, location: str) -> HubRegistry:
    """The Hub; nothing is sent yet.

    Raises:
        InputError: a location is given, or ``HF_ENDPOINT`` is no address.
    """
    if location:
        raise InputError(f"hub has no location, and {location!r} is given; HF_ENDPOINT names another Hub than huggingface.co")
    return HubRegistry(scheme)


@dataclass(frozen=True)
class _Refs:
    """Commits: of releases by digest, of branches and of other git tags by name."""

    releases: dict[str, str]
    branches: dict[str, str]
    tags: dict[str, str]


class HubRegistry(Registry):
    """Releases in model repositories."""

    def __init__(self, scheme: str) -> None:
        self.scheme, self.location, self.hub = scheme, "", Hub()
        self._commits: dict[tuple[str, str], str] = {}  # of releases, by name and digest; they never move
        self._digests: dict[tuple[str, str], str | None] = {}  # of the release.json in a commit
        self._trees: dict[tuple[str, str], dict[str, RepoFile]] = {}

    # Reading.

    def names(self) -> list[str]:
        """The models of the token's owner that have a release."""
        with self.hub.telling("the list of your models"):
            owner = str(self.hub.api.whoami()["name"])
            found = [model.id for model in self.hub.api.list_models(author=owner)]
        return sorted(name for name in found if (refs := self._refs(name)) and refs.releases)

    def tags(self, name: str) -> dict[str, str]:
        """The release of every branch and git tag that has one; ``latest`` is what ``main`` has."""
        refs = self._refs(name)
        return {} if refs is None else self._said(name, refs)

    def resolve(self, reference: Reference) -> str:
        """The digest a reference stands for; that a private repository hides itself from strangers is told."""
        try:
            return super().resolve(reference)
        except NotFound as error:
            if "has no tags" not in str(error):
                raise
            raise NotFound(f"{error} at {self.hub.endpoint}, or it is private and HF_TOKEN may not see it") from None

    def manifest(self, name: str, digest: str) -> bytes:
        """A release's ``release.json``, whose hash has been checked."""
        data = self.hub.read(_repository(name), self._commit(name, digest), RELEASE, MANIFEST_BYTES)
        if data is None:
            raise NotFound(f"{self.hub.endpoint} has lost {RELEASE} of {name}@{digest}; publish it again")
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
            raise Damaged(f"{RELEASE} of {name}@{digest} is damaged at {self.hub.endpoint}; publish it again")
        return data

    def fetch(self, name: str, digest: str, entry: Entry, target: Path) -> None:
        """Write one file to ``target``; what the Hub says of another size or hash is not downloaded."""
        commit = self._commit(name, digest)
        found = self._tree(name, commit).get(entry.name)
        if found is None:
            raise NotFound(f"{self.hub.endpoint} lacks {entry.name} of {name}@{digest}; publish it again")
        if found.size != entry.size or (found.lfs is not None and found.lfs.sha256 != entry.sha256):
            raise Damaged(f"{entry.name} is damaged: {self.hub.endpoint} has {found.size} bytes of another file")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".hub-") as folder:
            path = self.hub.download(_repository(name), commit, entry.name, Path(folder))
            held = Entry(entry.name, entry.sha256, entry.size, entry.role, path=path)
            try:
                for _ in held.chunks():
                    pass
            except Damaged:
                raise Damaged(
                    f"{entry.name} is damaged: {self.hub.endpoint} sent other bytes than sha256 {entry.sha256}"
                ) from None
            path.replace(target)

    # Publishing.

    def check_name(self, name: str) -> None:
        """Refuse a name without an owner."""
        _repository(name)

    def check_tag(self, tag: str) -> None:
        """Refuse a tag that can be no branch, or that is kept for releases."""
        if _NO_BRANCH.fullmatch(tag):
            raise InputError(
                f"the tag {tag!r} is not allowed on the Hub, where tags are branches, release-... and staging-... kept, and "
                f"main is called {DEFAULT_TAG}; use a name such as v1.0"
            )

    def has(self, name: str, entry: Entry) -> bool:
        """Whether the repository's large-file store has it; small texts are inside commits, and never there before."""
        try:
            return entry.sha256 not in self.hub.lacking(_repository(name), [entry])
        except NotFound:
            return False

    def push(self, name: str, entries: Sequence[Entry]) -> int:
        """Make the repository, private where it is new, and send the large files it lacks; bytes of those sent."""
        for entry in entries:
            for _ in entry.chunks():
                pass
        with self.hub.telling(name):
            self.hub.api.create_repo(_repository(name), private=True, exist_ok=True)
        lacking = self.hub.lacking(name, entries)
        additions = [addition(entry) for entry in {e.sha256: e for e in entries if e.sha256 in lacking and e.size}.values()]
        with self.hub.telling(f"the files of {name}"):
            self.hub.api.preupload_lfs_files(name, additions=additions, revision=MAIN, free_memory=False)
        return sum(each.upload_info.size for each in additions if each._upload_mode == "lfs")

    def put(self, name: str, manifest: bytes, entries: Sequence[Entry]) -> str:
        """Commit the release on a branch of its own, check what the Hub made of it, and give it its git tag."""
        hex_ = hashlib.sha256(manifest).hexdigest()
        digest, staging = f"sha256:{hex_}", f"{_STAGING}{hex_}"
        listed = [*entries, Entry.of_data(RELEASE, manifest, "manifest")]
        refs = self._refs(name)
        if refs is None:
            raise NotFound(f"{self.hub.endpoint} has no {name}; publish it again")
        if digest not in refs.releases:
            # Publishers of the same release do the same here; whoever comes late finds it done.
            with contextlib.suppress(Conflict, NotFound):
                commit = self._staged(name, staging, refs, listed)
                with self.hub.telling(f"{name}:{_OWN}{hex_}"):
                    self.hub.api.create_tag(name, tag=f"{_OWN}{hex_}", revision=commit)
            refs = self._refs(name)
            if refs is None or digest not in refs.releases:
                raise NotFound(f"{self.hub.endpoint} lacks a file of {name}, or somebody took it away; publish it again")
        if staging in refs.branches:
            with contextlib.suppress(NotFound), self.hub.telling(f"{name}:{staging}"):
                self.hub.api.delete_branch(name, branch=staging)
        return digest

    def set_tag(self, name: str, tag: str, digest: str, expected: str | None = ANY) -> None:
        """Make the tag's branch at the release, or move it by a commit whose parent is what was looked at."""
        self.check_tag(tag)
        for left in range(_ATTEMPTS - 1, -1, -1):
            refs = self._refs(name)
            if refs is None or digest not in refs.releases:
                raise NotFound(f"{self.hub.endpoint} has no release {digest} of {name}; publish it again")
            found = self._said(name, refs).get(tag)
            if found == digest:
                return
            check_expected(f"{name}:{tag}", expected, found)
            try:
                self._move(name, MAIN if tag == DEFAULT_TAG else tag, refs, refs.releases[digest], digest)
                return
            except _Overtaken as error:  # look again: perhaps by a publisher of the same release
                if not left:
                    raise Conflict(str(error)) from None

    def _staged(self, name: str, staging: str, refs: _Refs, entries: Sequence[Entry]) -> str:
        """A commit that has these files and no others, but for the Hub's own."""
        head = refs.branches.get(staging)
        with self.hub.telling(f"{name}:{staging}"):
            if head is None:
                head = refs.branches[MAIN]
                self.hub.api.create_branch(name, branch=staging, revision=head)
        others = set(self._tree(name, head)) - {entry.name for entry in entries} - {_ATTRIBUTES}
        operations: list[Any] = [*map(addition, entries), *map(CommitOperationDelete, sorted(others))]
        with self.hub.telling(f"{name}:{staging}"):
            message = f"Release {staging.removeprefix(_STAGING)}"
            made = self.hub.api.create_commit(name, operations, commit_message=message, revision=staging, parent_commit=head)
        commit = str(made.oid)
        tree = self._tree(name, commit)
        wrong = [
            entry.name
            for entry in entries
            if (held := tree.get(entry.name)) is None
            or held.size != entry.size
            or (held.lfs is not None and held.lfs.sha256 != entry.sha256)
        ]
        if wrong:
            raise InputError(
                f"{self.hub.endpoint} did not take {', '.join(wrong[:10])} of {name} as they are; a .gitignore in the "
                "repository does that: remove it there, then publish again"
            )
        return commit

    def _move(self, name: str, branch: str, refs: _Refs, commit: str, digest: str) -> None:
        """Let a branch have a release's files in place of those of the release it has."""
        if branch in refs.tags:
            raise Conflict(f"{name}:{branch} is a git tag at {self.hub.endpoint}, which does not move; choose another tag")
        head = refs.branches.get(branch)
        try:
            with self.hub.telling(f"{name}:{branch}"):
                if head is None:
                    self.hub.api.create_branch(name, branch=branch, revision=commit)
                    return
            there, new = set(self._tree(name, head)), set(self._tree(name, commit)) - {_ATTRIBUTES}
            gone = (there & self._own_files(name, branch, head, there)) - new
            copies = [CommitOperationCopy(each, each, src_revision=commit) for each in sorted(new)]
            with self.hub.telling(f"{name}:{branch}"):
                self.hub.api.create_commit(
                    name,
                    [*copies, *map(CommitOperationDelete, sorted(gone))],
                    commit_message=f"Release {digest}",
                    revision=branch,
                    parent_commit=head,
                )
        except Conflict as error:
            raise _Overtaken(str(error)) from None

    def _own_files(self, name: str, branch: str, head: str, there: set[str]) -> set[str]:
        """The files of the release that a branch has: only these may go.

        Raises:
            InputError: it holds something that is no release, which nobody asked to replace.
        """
        data = self.hub.read(name, head, RELEASE, MANIFEST_BYTES)
        if data is not None:
            with contextlib.suppress(Damaged):
                return {*(entry.name for entry in parse_release(data, name).entries), RELEASE}
        if data is not None or there - {_ATTRIBUTES, CARD}:
            raise InputError(
                f"the branch {branch} of {name} at {self.hub.endpoint} holds files that are no release, such as "
                f"{min(there - {_ATTRIBUTES})}; they are left alone: choose another name, or another tag"
            )
        return set()

    # The Hub's ways.

    def _refs(self, name: str) -> _Refs | None:
        """Branches and tags of a repository; None where there is none."""
        try:
            with self.hub.telling(name):
                listed = self.hub.api.list_repo_refs(_repository(name))
        except NotFound:
            return None
        tags = {ref.name: ref.target_commit for ref in listed.tags}
        releases = {
            f"sha256:{tag.removeprefix(_OWN)}": tags[tag] for tag in tags if re.fullmatch(rf"{_OWN}[0-9a-f]{{64}}", tag)
        }
        branches = {ref.name: ref.target_commit for ref in listed.branches}
        return _Refs(releases, branches, {tag: commit for tag, commit in tags.items() if not tag.startswith(_OWN)})

    def _said(self, name: str, refs: _Refs) -> dict[str, str]:
        known = {commit: digest for digest, commit in refs.releases.items()}
        found = {}
        for tag, commit in {**refs.tags, **refs.branches}.items():
            if not tag.startswith(_STAGING) and (digest := known.get(commit) or self._digest_at(name, commit)):
                found[DEFAULT_TAG if tag == MAIN else tag] = digest
        return found

    def _commit(self, name: str, digest: str) -> str:
        if (name, digest) not in self._commits:
            refs = self._refs(name)
            if refs is None or check_digest(digest) not in refs.releases:
                raise NotFound(f"{self.hub.endpoint} has no release {digest} of {name}")
            self._commits[name, digest] = refs.releases[digest]
        return self._commits[name, digest]

    def _digest_at(self, name: str, commit: str) -> str | None:
        if (name, commit) not in self._digests:
            data = self.hub.read(name, commit, RELEASE, MANIFEST_BYTES)
            self._digests[name, commit] = None if data is None else f"sha256:{hashlib.sha256(data).hexdigest()}"
        return self._digests[name, commit]

    def _tree(self, name: str, commit: str) -> dict[str, RepoFile]:
        if (name, commit) not in self._trees:
            self._trees[name, commit] = self.hub.tree(_repository(name), commit)
        return self._trees[name, commit]


class _Overtaken(Exception):
    """Between looking at a branch and moving it, somebody else moved it."""


def _repository(name: str) -> str:
    if "/" not in check_name(name, "hub"):
        raise InputError(f"the Hub's names are OWNER/NAME, and {name!r} has no owner; use one such as me/{name}")
    return name
