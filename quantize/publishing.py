"""The publish stage: what a variant's release is called, whether it may be published, and publishing it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exports import minisign
from exports.registry import REGISTRIES, Registry, connect
from exports.registry.names import as_name, check_tag
from exports.registry.secrets import redact
from exports.registry.transfer import publish
from exports.releasing import build_release
from exports.signing import sign_release
from quantize.config import PublishConfig, RunConfig
from quantize.errors import InputError
from quantize.lineage import portable
from quantize.run import Run

log = logging.getLogger(__name__)


def check_publish(config: RunConfig) -> None:
    """Refuse a registry, a name or a tag that cannot be, before anything runs.

    Raises:
        InputError: names the key, what was found, what is allowed.
    """
    chosen = config.publish
    if chosen.registry is None:
        return
    if chosen.registry not in REGISTRIES:
        raise InputError(f"publish.registry={chosen.registry} is unknown; use {' or '.join(REGISTRIES)}, or null for none")
    if not chosen.location and chosen.registry != "hub":
        raise InputError(
            f"publish.registry={chosen.registry} needs publish.location; use a directory for local, HOST[:PORT] for oci, "
            "http://HOST:PORT for mlflow"
        )
    check_tag(chosen.tag)
    registry = _registry(chosen)
    registry.check_tag(chosen.tag)
    if chosen.name is not None:
        registry.check_name(chosen.name)
    elif chosen.registry == "hub":
        raise InputError("publish.registry=hub needs publish.name; use OWNER/NAME, such as publish.name=me/my-model")
    if "publish" in config.stages:
        signing_key(chosen)
    names: dict[str, str] = {}
    for variant in config.variants:
        other = names.setdefault(as_name(variant), variant)
        if other != variant:
            raise InputError(
                f"variants.{variant} and variants.{other} would be published under one name, {as_name(variant)}; rename one"
            )


def signing_key(config: PublishConfig) -> minisign.SecretKey | None:
    """The key that releases are signed with; None where they are not.

    Raises:
        InputError: ``publish.sign_key`` is no key's file, or its password is missing or wrong.
    """
    if config.sign_key is None:
        return None
    try:
        return minisign.read_secret_key(Path(config.sign_key), os.environ.get("MINISIGN_PASSWORD") or None)
    except InputError as error:
        raise InputError(f"publish.sign_key: {error}") from error


def release_name(run: Run, variant: str) -> str:
    """What a variant's release is called: ``publish.name``, or the model's name, then the variant's."""
    base = run.config.publish.name or as_name(portable(run.model_path).partition("@")[0].rpartition("/")[2])
    return f"{base}-{as_name(variant)}"


def is_published(run: Run, variant: str, result: Mapping[str, Any]) -> bool:
    """Whether a registry still has what a finished step published, and its tag speaks of some release.

    Of which one is not asked: somebody may have published a newer one since, and it stays.
    """
    config, name = run.config.publish, release_name(run, variant)
    registry = _registry(config)
    try:
        registry.manifest(name, result["digest"])
        return config.tag in registry.tags(name)
    except InputError:
        return False


def publish_variant(run: Run, variant: str, gate: Mapping[str, Any] | None) -> dict[str, Any]:
    """Publish one variant; what the step reports: ``reference``, ``digest``, ``bytes`` sent, ``forced``, ``signed`` (by whom).

    Args:
        run: the run, which has been reported.
        variant: its name.
        gate: the gate's result, with ``passed``; None where it has no limits.

    Raises:
        GateFailed: it failed its gate, and ``publish.force`` is false.
        InputError: a file is damaged, the tag was moved by somebody else, or the registry refuses.
    """
    config, name = run.config.publish, release_name(run, variant)
    release = build_release(
        run.artifact(variant),
        name.rpartition("/")[2],
        run=run.directory,
        checkpoint=Path(run.checkpoint.path),
        gate=gate,
        force=config.force,
    )
    if release.facts["forced"]:
        log.warning("%s failed its gate and is published all the same, as publish.force=true says", variant)
    key = signing_key(config)
    if key is not None:
        release = sign_release(release, key)
    reference, sent = publish(_registry(config), name, config.tag, release)
    said = {"digest": release.digest, "bytes": sent, "forced": release.facts["forced"], "signed": key and key.public.name}
    return {"reference": redact(str(reference)), **said}


def _registry(config: PublishConfig) -> Registry:
    return connect(str(config.registry), config.location or "")
