"""The steps of a job of a GitHub Actions workflow on this machine, in their order, as the workflow has them.

    RECIPES=docs/ci/recipes RECIPE=gated python -m eval.ci_local docs/ci/github-actions.yml --without install

Of each step it reads ``run``, ``env``, ``if`` and ``id``. Expressions may have names, ``==``, ``||``, ``&&`` and status
functions, which is what docs/ci needs; anything else is refused. Steps with ``uses`` are named and passed over. Variables of
the environment go before the workflow's own. Exit codes: the first failed step's, 0 where none failed, 2 bad input.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from quantize.errors import InputError

# What GitHub runs for `shell: bash`.
SHELL = ("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c")
_EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")
_STATUS = ("success()", "failure()", "always()", "cancelled()")

Context = Mapping[str, str]


@dataclass(frozen=True)
class Step:
    """One step: its ``id`` (or name), and either ``run`` or ``uses``."""

    name: str
    run: str | None
    uses: str | None
    condition: str = ""
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a step: its exit code, or None where its condition did not hold, or it was left out."""

    name: str
    code: int | None


def read_job(path: Path, job: str) -> tuple[dict[str, str], list[Step]]:
    """A job's environment (the workflow's ``env`` below its own) and its steps, expressions not yet evaluated.

    Raises:
        InputError: no such file, job, or no workflow.
    """
    try:
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        jobs = workflow["jobs"]
    except (OSError, yaml.YAMLError, TypeError, KeyError) as error:
        raise InputError(f"{path} is no workflow: {error!r}; name one like docs/ci/github-actions.yml") from error
    if job not in jobs:
        raise InputError(f"{path} has no job {job!r}; use {' or '.join(jobs)}")
    env = {**workflow.get("env", {}), **jobs[job].get("env", {})}
    return {key: str(value) for key, value in env.items()}, [_step(step) for step in jobs[job]["steps"]]


def _step(step: Mapping[str, Any]) -> Step:
    name = str(step.get("id") or step.get("name") or step.get("uses"))
    env = {key: str(value) for key, value in step.get("env", {}).items()}
    return Step(name, step.get("run"), step.get("uses"), str(step.get("if", "")), env)


def expand(text: str, context: Context) -> str:
    """``text`` with its ``${{ ... }}`` replaced; of ``a || b``, the first that is not empty.

    Raises:
        InputError: a name that ``context`` lacks.
    """

    def value(match: re.Match[str]) -> str:
        return next(filter(None, [_value(name.strip(), context) for name in match[1].split("||")]), "")

    return _EXPRESSION.sub(value, text)


def _value(name: str, context: Context) -> str:
    if len(name) > 1 and name[0] == name[-1] == "'":
        return name[1:-1]
    if name not in context:
        raise InputError(f"expression {name!r} is unknown here; known are {', '.join(sorted(context))}")
    return context[name]


def holds(condition: str, context: Context, failed: bool) -> bool:
    """Whether a step with this ``if`` runs: without a status function, only where no step before it failed.

    Raises:
        InputError: a condition that is not made of ``&&``, ``==``, ``!`` before a status function, and known names.
    """
    inner = _EXPRESSION.fullmatch(condition.strip())
    terms = [term.strip() for term in (inner[1] if inner else condition).split("&&") if term.strip()]
    status = {"success()": not failed, "failure()": failed, "always()": True, "cancelled()": False}
    answers = [] if any(name in condition for name in _STATUS) else [not failed]
    for term in terms:
        bare = term.removeprefix("!")
        if bare in status:
            answers.append(status[bare] is (bare == term))
        elif term.count("==") == 1:
            left, right = (_value(side.strip(), context) for side in term.split("=="))
            answers.append(left == right)
        else:
            raise InputError(f"condition {term!r} is not understood here; write NAME == 'VALUE', joined by &&")
    return all(answers)


def run_job(
    path: Path,
    job: str,
    context: Context,
    environment: Mapping[str, str],
    without: Collection[str] = (),
    directory: Path | None = None,
) -> list[Outcome]:
    """Run a job's steps in ``directory``; what became of each, ``uses`` left out.

    ``context`` has the values of expressions, ``environment`` all variables of the steps; ``without`` names steps to leave out.

    Raises:
        InputError: see :func:`read_job`, :func:`expand` and :func:`holds`; a name in ``without`` that no step has.
    """
    env, steps = read_job(path, job)
    known = [step.name for step in steps if step.run is not None]
    if missing := set(without) - set(known):
        raise InputError(f"job {job!r} of {path} has no step {', '.join(sorted(missing))}; its steps are {', '.join(known)}")
    outcomes: list[Outcome] = []
    for step in steps:
        if step.run is None:
            print(f"=== {step.name}: done by GitHub only", flush=True)
            continue
        failed = any(outcome.code for outcome in outcomes)
        if step.name in without or not holds(step.condition, context, failed):
            print(f"=== {step.name}: left out", flush=True)
            outcomes.append(Outcome(step.name, None))
            continue
        print(f"=== {step.name}", flush=True)
        own = {key: expand(value, context) for key, value in {**env, **step.env}.items() if key not in environment}
        finished = subprocess.run([*SHELL, step.run], env={**own, **environment}, cwd=directory, check=False)
        outcomes.append(Outcome(step.name, finished.returncode))
    return outcomes


def exit_code(outcomes: list[Outcome]) -> int:
    """The first failed step's exit code, 0 where none failed."""
    return next((outcome.code for outcome in outcomes if outcome.code), 0)


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m eval.ci_local", description="Run a workflow's steps on this machine.")
    parser.add_argument("workflow", type=Path)
    parser.add_argument("--job", default="quantize", help="default: quantize")
    parser.add_argument("--event", choices=("push", "pull_request"), default="push", help="default: push, which publishes")
    parser.add_argument("--without", nargs="*", default=[], metavar="STEP", help="steps to leave out, by id")
    options = parser.parse_args(arguments)
    # `python` and `pip` of the steps are those that run this.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    context = {
        "matrix.recipe": os.environ.get("RECIPE", "demo"),
        "vars.QUANTIZE": "",
        "github.sha": "local",
        "github.event_name": options.event,
        "github.repository": "",
        "github.event.pull_request.head.repo.full_name": "no fork's, nor this one's",
    }
    try:
        outcomes = run_job(options.workflow, options.job, context, {**os.environ, "PATH": path}, options.without)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return exit_code(outcomes)


if __name__ == "__main__":
    sys.exit(main())
