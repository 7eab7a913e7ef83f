"""Releases in the model registry of an MLflow server.

A name is a registered model, in an experiment of the same name. A release is a run with the artifact's parameters and
metrics, its files below ``release/``, and a model version whose tag ``quantize.release`` has the digest. Tags are the model's
aliases (``champion``, ``candidate``); ``latest`` is the newest version, as everywhere in MLflow.

What MLflow cannot do: an alias is not compared before it is moved, so only publishers on one machine exclude each other, by a
lock; and files are kept for each run, so that a release takes its full size again. MLflow's own names have no ``/``, and its
aliases are not called ``latest`` or ``v1``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from exports.registry.base import ANY, MANIFEST_BYTES, Damaged, Entry, NotFound, Registry, check_expected
from exports.registry.locking import exclusive
from exports.registry.names import DEFAULT_TAG, check_digest, check_name
from quantize.artifact import RELEASE
from quantize.errors import InputError

FOLDER = "release"
_RELEASE, _CONTENT, _SENT = "quantize.release", "quantize.content", "quantize.sent."
_ALIAS = re.compile(r"(?!v\d+$)[\w-]+", re.IGNORECASE | re.ASCII)
_URI = re.compile(r"https?://[^/@\s]+(?:/[^@\s]*)?")
_ATTEMPTS, _PAUSE = 3, 0.5
_PARAMETERS = ("container", "bits", "bits_per_weight", "size_bytes", "quality", "seed", "fingerprint")


def connect(scheme: str, location: str) -> MlflowRegistry:
    """The registry of the server at an ``http`` or ``https`` address; nothing is sent yet.

    Raises:
        InputError: the address has another form, or the package mlflow is missing.
    """
    if not _URI.fullmatch(location):
        raise InputError(
            "an MLflow server is http://HOST:PORT or https://HOST, without a password in it; "
            "credentials belong into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        )
    return MlflowRegistry(scheme, location)


class MlflowRegistry(Registry):
    """Releases as versions of registered models."""

    def __init__(self, scheme: str, location: str) -> None:
        self.scheme, self.location = scheme, location
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nobody asked for it
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
        except ImportError as error:
            raise InputError("MLflow is not installed; install it with `pip install 'quantize[publish]'`") from error
        self.client: Any = MlflowClient(tracking_uri=location, registry_uri=location)
        self._failure = MlflowException
        self._runs: dict[tuple[str, str], str] = {}  # of releases: a version's run never changes
        logging.getLogger("mlflow").setLevel(logging.WARNING)

    # Reading.

    def names(self) -> list[str]:
        """The registered models that have a release."""
        with self._telling("the list of models"):
            found = self._pages(self.client.search_registered_models)
        return sorted(model.name for model in found if self._versions(model.name))

    def tags(self, name: str) -> dict[str, str]:
        """The release of every alias, and of the newest version as ``latest``."""
        versions = self._versions(name)
        if not versions:
            return {}
        with self._telling(name):
            aliases = self.client.get_registered_model(name).aliases
        found = {alias: versions[number] for alias, each in sorted(aliases.items()) if (number := int(each)) in versions}
        return {**found, DEFAULT_TAG: versions[max(versions)]}

    def manifest(self, name: str, digest: str) -> bytes:
        """A release's ``release.json``, whose hash has been checked."""
        with tempfile.TemporaryDirectory() as folder:
            path = self._download(self._run_of(name, digest), RELEASE, Path(folder))
            if path is None:
                raise NotFound(f"{self.location} has lost {RELEASE} of {name}@{digest}; publish it again")
            data = path.read_bytes() if path.stat().st_size <= MANIFEST_BYTES else b""
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
            raise Damaged(f"{RELEASE} of {name}@{digest} is damaged at {self.location}; publish it again")
        return data

    def fetch(self, name: str, digest: str, entry: Entry, target: Path) -> None:
        """Write one file to ``target``."""
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".mlflow-") as folder:
            path = self._download(self._run_of(name, digest), entry.name, Path(folder))
            if path is None:
                raise NotFound(f"{self.location} lacks {entry.name} of {name}@{digest}; publish it again")
            held = Entry(entry.name, entry.sha256, entry.size, entry.role, path=path)
            try:
                for _ in held.chunks():
                    pass
            except Damaged as error:
                raise Damaged(
                    f"{entry.name} is damaged: {self.location} sent other bytes than sha256 {entry.sha256}"
                ) from error
            path.replace(target)

    # Publishing.

    def check_tag(self, tag: str) -> None:
        """Refuse a tag that can be no alias."""
        if tag != DEFAULT_TAG and not _ALIAS.fullmatch(tag):
            raise InputError(f"MLflow allows no alias {tag!r}; use letters, digits, '-', '_', such as champion or candidate")

    def has(self, name: str, entry: Entry) -> bool:
        """Whether a run of this name has the file."""
        with self._telling(name):
            experiment = self.client.get_experiment_by_name(_model(name))
            if experiment is None:
                return False
            words = f"tags.`{_sent(entry)}` = '{entry.sha256}'"
            return bool(self.client.search_runs([experiment.experiment_id], filter_string=words, max_results=1))

    def push(self, name: str, entries: Sequence[Entry]) -> int:
        """Send the files which the run of this content lacks; a file counts as there once its tag in the run says so."""
        with self._telling(name):
            run = self._content_run(name, entries, create=True)
            sizes, sent = self._sizes(run), 0
            for entry in entries:
                for _ in entry.chunks():
                    pass
                if run.data.tags.get(_sent(entry)) != entry.sha256 or sizes.get(entry.name) != entry.size:
                    self._upload(run.info.run_id, entry)
                    self.client.set_tag(run.info.run_id, _sent(entry), entry.sha256)
                    sent += entry.size
        return sent

    def put(self, name: str, manifest: bytes, entries: Sequence[Entry]) -> str:
        """Complete the run and make it a version of the model."""
        digest = f"sha256:{hashlib.sha256(manifest).hexdigest()}"
        with self._telling(name), exclusive("mlflow", self.location, name):
            run = self._content_run(name, entries, create=False)
            sizes = self._sizes(run) if run else {}
            missing = [e.name for e in entries if run is None or sizes.get(e.name) != e.size or _sent(e) not in run.data.tags]
            if missing:
                raise NotFound(f"{self.location} lacks {', '.join(missing[:10])} of {name}; publish it again")
            if digest not in self._versions(name).values():
                self._upload(run.info.run_id, Entry.of_data(RELEASE, manifest, "manifest"))
                self._describe(run.info.run_id, entries)
                self._new_version(name, run, digest)
        return digest

    def set_tag(self, name: str, tag: str, digest: str, expected: str | None = ANY) -> None:
        """Move an alias; for ``latest``, make a new version of a release that is not the newest one."""
        self.check_tag(tag)
        with self._telling(f"{name}:{tag}"), exclusive("mlflow", self.location, name):
            versions = self._versions(name)
            if digest not in versions.values():
                raise NotFound(f"{self.location} has no release {digest} of {name}; publish it again")
            found = self.tags(name).get(tag)
            if found == digest:
                return
            check_expected(f"{name}:{tag}", expected, found)
            if tag == DEFAULT_TAG:
                self._new_version(name, self.client.get_run(self._run_of(name, digest)), digest)
            else:
                number = max(number for number, each in versions.items() if each == digest)
                self.client.set_registered_model_alias(name, tag, str(number))

    # MLflow's ways.

    def _versions(self, name: str) -> dict[int, str]:
        """The release of every version of a model."""
        with self._telling(name):
            found = self._pages(self.client.search_model_versions, filter_string=f"name='{_model(name)}'")
        digests = {int(version.version): version.tags.get(_RELEASE, "") for version in found}
        return {number: check_digest(digest) for number, digest in digests.items() if digest}

    def _run_of(self, name: str, digest: str) -> str:
        if run := self._runs.get((name, digest)):
            return run
        with self._telling(name):
            found = self._pages(self.client.search_model_versions, filter_string=f"name='{_model(name)}'")
        runs = [str(version.run_id) for version in found if version.tags.get(_RELEASE) == digest]
        if not runs:
            raise NotFound(f"{self.location} has no release {digest} of {name}")
        self._runs[name, digest] = runs[0]
        return runs[0]

    def _new_version(self, name: str, run: Any, digest: str) -> None:
        with contextlib.suppress(self._failure):  # it is there already; if not, the next request says why
            self.client.create_registered_model(name)
        tags = {_RELEASE: digest}
        self.client.create_model_version(
            name, f"{run.info.artifact_uri}/{FOLDER}", run_id=run.info.run_id, tags=tags, await_creation_for=0
        )

    def _content_run(self, name: str, entries: Sequence[Entry], create: bool) -> Any:
        """The run that has exactly these files, or shall have them: of a killed publisher it is the next one's, too."""
        experiment = self.client.get_experiment_by_name(_model(name))
        if experiment is None and not create:
            return None
        number = experiment.experiment_id if experiment else self.client.create_experiment(name)
        content = hashlib.sha256("".join(sorted(f"{e.sha256}  {e.name}\n" for e in entries)).encode()).hexdigest()
        found = self.client.search_runs([number], filter_string=f"tags.`{_CONTENT}` = '{content}'", order_by=["start_time ASC"])
        if found or not create:
            return found[0] if found else None
        return self.client.create_run(number, tags={_CONTENT: content}, run_name=name)

    def _sizes(self, run: Any) -> dict[str, int]:
        """The sizes of a run's files, by their names in the release."""
        found, folders = {}, [FOLDER]
        while folders:
            for item in self.client.list_artifacts(run.info.run_id, folders.pop()):
                if item.is_dir:
                    folders.append(item.path)
                else:
                    found[item.path.removeprefix(f"{FOLDER}/")] = int(item.file_size or 0)
        return found

    def _upload(self, run_id: str, entry: Entry) -> None:
        name = PurePosixPath(entry.name)
        folder = str(FOLDER / name.parent)
        with tempfile.TemporaryDirectory() as scratch:
            path = entry.path
            if path is None or path.name != name.name:
                path = Path(scratch) / name.name
                path.write_bytes(b"".join(entry.chunks()))
            for attempt in range(_ATTEMPTS):
                try:
                    self.client.log_artifact(run_id, str(path), folder)
                    return
                except (self._failure, OSError):
                    if attempt == _ATTEMPTS - 1:
                        raise
                    time.sleep(_PAUSE * 2**attempt)

    def _download(self, run_id: str, name: str, folder: Path) -> Path | None:
        with self._telling(name):
            if not any(item.path == f"{FOLDER}/{name}" for item in self._listed(run_id, name)):
                return None
            return Path(self.client.download_artifacts(run_id, f"{FOLDER}/{name}", str(folder)))

    def _listed(self, run_id: str, name: str) -> list[Any]:
        return list(self.client.list_artifacts(run_id, str(PurePosixPath(FOLDER, name).parent)))

    def _describe(self, run_id: str, entries: Sequence[Entry]) -> None:
        """The parameters and metrics of a run, from the artifact's manifest and figures."""
        from mlflow.entities import Metric, Param

        held = {e.role: json.loads(b"".join(e.chunks())) for e in entries if e.role in ("manifest", "evaluation")}
        manifest = held.get("manifest", {})
        parameters = {f"solver.{key}": value for key, value in (manifest.get("solver") or {}).items()}
        parameters |= {key: manifest.get(key) for key in _PARAMETERS}
        told = [Param(_key(key), str(value)) for key, value in parameters.items() if value is not None]
        figures = [Metric(_key(key), figure, 0, 0) for key, figure in _figures(held.get("evaluation", {}))]
        self.client.log_batch(run_id, metrics=figures, params=told)
        self.client.set_terminated(run_id, "FINISHED")

    def _pages(self, search: Any, **options: Any) -> list[Any]:
        found, token = [], None
        while True:
            page = search(page_token=token, **options)
            found += page
            token = page.token
            if not token:
                return found

    @contextlib.contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Failures of MLflow and of the network as errors of the user's."""
        try:
            yield
        except self._failure as error:
            raise InputError(f"{self.location} failed at {what}: {' '.join(str(error).split())[:300]}") from error
        except OSError as error:
            if type(error).__module__.startswith(("requests", "urllib3")) or isinstance(error, ConnectionError):
                raise InputError(
                    f"{self.location} cannot be reached ({type(error).__name__}); the same command goes on"
                ) from error
            raise


def _model(name: str) -> str:
    check_name(name)
    if "/" in name:
        raise InputError(f"MLflow allows no '/' in the name {name}; use {name.replace('/', '-')}")
    return name


def _sent(entry: Entry) -> str:
    return _SENT + hashlib.sha256(entry.name.encode()).hexdigest()[:32]


def _key(key: str) -> str:
    return re.sub(r"[^\w.\- /]", "_", key)[:250]


def _figures(value: dict[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    for key, each in value.items():
        if isinstance(each, dict):
            yield from _figures(each, f"{above}{key}.")
        elif isinstance(each, int | float) and not isinstance(each, bool):
            yield f"{above}{key}", float(each)
