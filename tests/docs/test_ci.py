"""docs/ci: every step of the workflow and of the GitLab snippet is run here, and what each leaves is looked at."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from packaging.requirements import Requirement

from eval.ci_local import Outcome, exit_code, holds, read_job, run_job
from exports.registry.local import connect
from exports.registry.names import parse_reference
from exports.registry.transfer import pull
from quantize.errors import InputError
from tests.docs.conftest import CI, PROJECT, Team

WORKFLOW = CI / "github-actions.yml"
QUANTIZE = "quantize @ git+https://git.example/team/quantize@v0.1.0"
MEASURING = ("install", "build", "evaluate")
Run = Callable[..., dict[str, int | None]]


@pytest.fixture(scope="module")
def run(team: Team) -> Run:
    """``run(event, without, workflow=WORKFLOW)``: the job ``quantize`` in the team's repository; each step's exit code."""

    def go(event: str, without: tuple[str, ...] = (), workflow: Path = WORKFLOW) -> dict[str, int | None]:
        context = {
            "matrix.recipe": "tiny",
            "vars.QUANTIZE": QUANTIZE,
            "github.sha": "0123abcd",
            "github.token": "none",
            "github.event_name": event,
            "github.repository": "team/recipes",
            "github.event.pull_request.head.repo.full_name": "team/recipes",
            "github.event.pull_request.number": "7",
        }
        outcomes = run_job(workflow, "quantize", context, team.environment(), without, team.folder)
        return {outcome.name: outcome.code for outcome in outcomes}

    return go


@pytest.fixture(scope="module")
def checked(run: Run) -> dict[str, int | None]:
    """What a pull request's steps ended with."""
    return run("pull_request")


def check_table(text: str) -> None:
    """A comment must show the gate's verdict and a row of figures for each variant."""
    assert text.startswith("<!-- quantize: tiny -->\n")
    rows = [line.split("|")[1].split()[0] for line in text.splitlines() if re.match(r"\| \S+( ★)? \| \d", line)]
    assert {"fp16", "int8"} <= set(rows), text
    assert "ppl\\_ratio" in text or "ppl_ratio" in text, text
    assert "![" not in text


def check_junit(folder: Path, failures: int) -> None:
    """The gate's JUnit must have its checks, that many of them failed."""
    suites = ElementTree.parse(folder / "gate.xml").getroot()
    names = [str(case.get("name")) for case in suites.iterfind("testsuite/testcase")]
    assert any("ppl_ratio" in name for name in names) and any("size_ratio" in name for name in names), names
    assert len(suites.findall("testsuite/testcase/failure")) == failures


def test_a_pull_request_is_built_measured_gated_and_told(team: Team, checked: dict[str, int | None]) -> None:
    assert checked == dict.fromkeys((*MEASURING, "gate", "table", "comment"), 0) | {"publish": None}
    check_junit(team.output, failures=0)
    call = team.calls()[0]
    assert (call["method"], call["path"]) == ("POST", "repos/team/recipes/issues/7/comments")
    check_table(call["body"])
    assert not (team.folder / "artifacts" / "registry").exists()


def test_what_is_installed_is_what_the_project_offers(team: Team, checked: dict[str, int | None]) -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    installed = [
        Requirement(word) for word in (team.records / "pip").read_text().split("\n") if word[:1].isalpha() and "://" not in word
    ]
    offered = {Requirement(each).name: Requirement(each) for each in project["dependencies"]}
    assert [offered.get(each.name) for each in installed] == installed and installed, installed
    assert QUANTIZE in (team.records / "pip").read_text().splitlines()
    for file in (WORKFLOW, CI / "gitlab-ci.yml"):
        assert str(offered["torch"]) in {str(Requirement(word)) for word in re.findall(r"'(torch[^']*)'", file.read_text())}
    examples = re.findall(r"`(quantize @ [^`]*)`", (CI / "README.md").read_text())
    assert examples
    for example in examples:
        requirement = Requirement(example)
        assert requirement.name == project["name"] and requirement.url and requirement.url.endswith(f"@v{project['version']}")
        assert requirement.extras <= set(project["optional-dependencies"])


def test_a_second_push_brings_the_comment_up_to_date(team: Team, run: Run, checked: dict[str, int | None]) -> None:
    (team.records / "comment").write_text("99")
    run("pull_request", (*MEASURING, "gate"))
    (team.records / "comment").unlink()
    call = team.calls()[-1]
    assert (call["method"], call["path"]) == ("PATCH", "repos/team/recipes/issues/comments/99")
    check_table(call["body"])


def test_a_merge_publishes_under_its_tag(team: Team, run: Run, checked: dict[str, int | None], tmp_path: Path) -> None:
    outcomes = run("push", (*MEASURING, "gate"))
    assert outcomes == dict.fromkeys((*MEASURING, "gate", "comment")) | {"table": 0, "publish": 0}
    check_registry(team, "main-0123abcd", tmp_path)


def check_registry(team: Team, tag: str, folder: Path) -> None:
    """Both variants must be there under the tag and come back as they were measured."""
    location = team.folder / "artifacts" / "registry"
    assert connect("local", str(location)).tags("tiny-int8").keys() == {tag}
    for variant in ("fp16", "int8"):
        pull(parse_reference(f"local:{location}//tiny-{variant}:{tag}"), folder / variant)
        made = team.output / "variants" / variant / "model.safetensors"
        assert (folder / variant / made.name).read_bytes() == made.read_bytes()


def _published(team: Team) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in (team.folder / "artifacts" / "registry").rglob("*") if file.is_file()}


def test_a_failed_gate_ends_with_3_and_publishes_nothing(team: Team, run: Run, checked: dict[str, int | None]) -> None:
    published = _published(team)
    team.write_recipe(ppl_ratio=0.5)
    try:
        outcomes = run("push", MEASURING)
    finally:
        team.write_recipe(ppl_ratio=2)
    assert outcomes == dict.fromkeys((*MEASURING, "comment", "publish")) | {"gate": 3, "table": 0}
    assert exit_code([Outcome(*outcome) for outcome in outcomes.items()]) == 3
    check_junit(team.output, failures=1)
    text = (team.output / "comment.md").read_text()
    check_table(text)
    assert "failed" in text
    assert _published(team) == published


@pytest.mark.parametrize(
    ("right", "wrong", "without"),
    [
        ('"$OUTPUT_DIR/report.md"; else', "/dev/null; else", (*MEASURING, "gate")),
        ('cat "$OUTPUT_DIR/gate.md"', "true", (*MEASURING, "gate")),
        ("""sed '/^!\\[/d'""", "cat", (*MEASURING, "gate")),
        ('body=@"$OUTPUT_DIR/comment.md"', "body=@/dev/null", (*MEASURING, "gate")),
        pytest.param("stages=[gate,report]", "stages=[report]", MEASURING, marks=pytest.mark.slow),
    ],
)
def test_a_broken_step_is_found(
    right: str, wrong: str, without: tuple[str, ...], team: Team, run: Run, checked: dict[str, int | None], tmp_path: Path
) -> None:
    text = WORKFLOW.read_text()
    assert right in text
    (tmp_path / "broken.yml").write_text(text.replace(right, wrong))
    if "gate" not in without:
        (team.output / "gate.xml").unlink()
    run("pull_request", without, tmp_path / "broken.yml")
    with pytest.raises((AssertionError, OSError)):
        check_table(team.calls()[-1]["body"])
        check_junit(team.output, failures=0)


def test_without_a_name_of_what_to_install_the_job_says_so(team: Team) -> None:
    _, steps = read_job(WORKFLOW, "quantize")
    install = next(step.run for step in steps if step.name == "install")
    assert install is not None
    ended = subprocess.run(["bash", "-ec", install], env=team.environment(), capture_output=True, text=True, check=False)
    assert ended.returncode and "set the variable QUANTIZE" in ended.stderr


def _git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(
    ("change", "recipes"),
    [
        ({"recipes/recipe/b.yaml": "2"}, '["b"]'),
        ({"recipes/recipe/b.yaml": None}, "[]"),
        ({"recipes/recipe/c.yaml": "1", "recipes/recipe/a.yaml": "2", "README": "1"}, '["a", "c"]'),
        ({"recipes/solver/mine.yaml": "1", "recipes/recipe/b.yaml": None}, '["a"]'),
    ],
)
def test_the_recipes_that_a_change_touches_are_built(
    change: dict[str, str | None], recipes: str, team: Team, tmp_path: Path
) -> None:
    repository = tmp_path / "repository"
    (repository / "recipes" / "recipe").mkdir(parents=True)
    for name in "ab":
        (repository / "recipes" / "recipe" / f"{name}.yaml").write_text("1")
    for words in (("init", "-q"), ("add", "."), ("commit", "-qm", "before")):
        _git(repository, *words)
    before = _git(repository, "rev-parse", "HEAD")
    for name, text in change.items():
        file = repository / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text) if text is not None else file.unlink()
    _git(repository, "add", "-A")
    _git(repository, "commit", "-qm", "after")
    context = {"github.event.pull_request.base.sha": "", "github.event.before": before}
    environment = team.environment(GITHUB_OUTPUT=str(tmp_path / "output"))
    assert exit_code(run_job(WORKFLOW, "changed", context, environment, directory=repository)) == 0
    assert (tmp_path / "output").read_text() == f"recipes={recipes}\n"


def test_actions_are_pinned_and_expressions_stay_out_of_the_shell() -> None:
    text = WORKFLOW.read_text()
    steps = [step for job in yaml.safe_load(text)["jobs"] for step in read_job(WORKFLOW, job)[1]]
    used = re.findall(r"uses: (.*)", text)
    assert len(used) == sum(step.run is None for step in steps)
    for action in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
    # What a pull request's author wrote could become part of a command.
    assert not any("${{" in step.run for step in steps if step.run is not None)


@pytest.mark.parametrize(
    ("condition", "failed", "expected"),
    [
        ("", False, True),
        ("", True, False),
        ("${{ !cancelled() }}", True, True),
        ("${{ failure() }}", False, False),
        ("${{ a == 'x' }}", True, False),
        ("!cancelled() && a == 'x' && b == a", True, False),
    ],
)
def test_conditions(condition: str, failed: bool, expected: bool) -> None:
    assert holds(condition, {"a": "x", "b": ""}, failed) is expected


@pytest.mark.parametrize("condition", ["contains(a, 'x')", "a", "c == 'x'"])
def test_what_is_not_understood_is_refused(condition: str) -> None:
    with pytest.raises(InputError, match=r"understood|unknown"):
        holds(condition, {"a": "x"}, False)


def test_a_step_that_is_not_there_cannot_be_left_out(run: Run) -> None:
    with pytest.raises(InputError, match="has no step biuld; its steps are install, build"):
        run("push", ("biuld",))
