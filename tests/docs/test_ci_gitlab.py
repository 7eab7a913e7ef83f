"""docs/ci/gitlab-ci.yml: its commands are the workflow's, and its jobs do here what they do there."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from xml.etree import ElementTree

import pytest
import yaml

from eval.ci_local import SHELL, read_job
from exports.registry.local import connect
from tests.docs.conftest import CI, Team

GITLAB = CI / "gitlab-ci.yml"
NOTES: list[tuple[str, str | None, str]] = []


class _Loader(yaml.SafeLoader):
    """YAML with GitLab's ``!reference``, kept as a tuple."""


def _reference(loader: _Loader, node: yaml.SequenceNode) -> tuple[str, ...]:
    return tuple(loader.construct_sequence(node))


_Loader.add_constructor("!reference", _reference)


def _read(text: str) -> dict[str, Any]:
    return dict(yaml.load(text, _Loader))


def lines(snippet: dict[str, Any], job: str, part: str) -> list[str]:
    """A job's ``before_script``, ``script`` or ``after_script``, taken from what it extends where it has none."""
    own = snippet[job]
    if part not in own:
        return lines(snippet, own["extends"], part) if "extends" in own else []
    found: list[str] = []
    for line in own[part]:
        found += lines(snippet, *line) if isinstance(line, tuple) else [line]
    return found


def run(team: Team, job: str, text: str, **variables: str) -> int:
    """A job as GitLab's runner runs it: ``before_script`` and ``script`` in one shell, then ``after_script`` in another."""
    snippet = _read(text)
    environment = team.environment(RECIPE="tiny", CI_COMMIT_SHA="0123abcd", QUANTIZE="quantize", **variables)
    for key, value in snippet["variables"].items():
        environment[key] = _expand(value, environment)
    script = lines(snippet, job, "before_script") + lines(snippet, job, "script")
    ended = subprocess.run([*SHELL, "\n".join(script)], cwd=team.folder, env=environment, check=False)
    after = lines(snippet, job, "after_script")
    told = subprocess.run([*SHELL, "\n".join(after)], cwd=team.folder, env=environment, check=False)
    assert told.returncode == 0
    return ended.returncode


def _expand(value: str, environment: dict[str, str]) -> str:
    for key in sorted(environment, key=len, reverse=True):
        value = value.replace(f"${key}", environment[key])
    return value


class _Notes(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["body"][0]
        NOTES.append((self.path, self.headers["PRIVATE-TOKEN"], body))
        self.send_response(201)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *arguments: object) -> None:
        """Nothing into the test's output."""


@pytest.fixture
def server() -> Iterator[dict[str, str]]:
    """GitLab's notes on loopback; the variables that a job of a merge request has."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl, as the job does")
    NOTES.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Notes) as listening:
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{listening.server_address[1]}/api/v4"
        request = {"CI_PROJECT_ID": "5", "CI_MERGE_REQUEST_IID": "7", "COMMENT_TOKEN": "planted"}
        yield {"CI_API_V4_URL": address, **request}
        listening.shutdown()
        thread.join()


def test_the_commands_are_those_of_the_workflow() -> None:
    snippet = _read(GITLAB.read_text())
    _, steps = read_job(CI / "github-actions.yml", "quantize")
    for job, names in (("check", ("build", "evaluate", "gate")), ("release", ("build", "evaluate", "gate", "publish"))):
        theirs = [shlex.split(step.run.replace("\\\n", "")) for step in steps if step.run is not None and step.name in names]
        assert [shlex.split(line) for line in lines(snippet, job, "script")] == theirs
        install = next(step.run for step in steps if step.name == "install")
        commands = [line for line in str(install).splitlines() if not line.startswith("#")]
        assert lines(snippet, job, "before_script") == commands


def test_the_note_tells_what_is_there_after_a_failure_too(team: Team, server: dict[str, str]) -> None:
    text = GITLAB.read_text().replace("python -m quantize", "exit 3; python -m quantize")
    assert run(team, "check", text, **server) == 3
    assert NOTES == [
        ("/api/v4/projects/5/merge_requests/7/notes", "planted", "No gate: see the log.\n\nNo report: see the log.\n\n")
    ]
    team.output.joinpath("report.md").write_text("| a |\n![x](report.png)\n")
    assert run(team, "check", text, **server) == 3
    assert NOTES[-1][2] == "No gate: see the log.\n\n| a |\n\n"
    shutil.rmtree(team.output)


@pytest.mark.slow
def test_a_merge_request_is_gated_and_told_and_a_merge_published(team: Team, server: dict[str, str]) -> None:
    team.write_recipe(ppl_ratio=0.5)
    assert run(team, "check", GITLAB.read_text(), **server) == 3
    assert run(team, "release", GITLAB.read_text()) == 3
    assert not (team.folder / "artifacts" / "registry").exists()
    team.write_recipe(ppl_ratio=2)
    assert run(team, "check", GITLAB.read_text(), **server) == 0
    assert "ppl" in NOTES[-1][2] and "int8" in NOTES[-1][2]
    [junit] = team.folder.glob(_read(GITLAB.read_text())[".quantize"]["artifacts"]["reports"]["junit"])
    assert not ElementTree.parse(Path(junit)).getroot().findall("testsuite/testcase/failure")
    assert run(team, "release", GITLAB.read_text()) == 0
    registry = connect("local", str(team.folder / "artifacts" / "registry"))
    assert registry.tags("tiny-int8").keys() == {"main-0123abcd"}
