"""A team's repository that keeps a recipe, and a machine that its CI runs on: this one, with what pip and gh get recorded."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]
CI = PROJECT / "docs" / "ci"

RECIPE = """# @package _global_
model: {{path: {model}}}
calibration: {{num_samples: 4, seq_len: 32}}
eval: {{windows: 2, seq_len: 64, text: {text}, tasks: []}}
gate: {{ppl_ratio: {ppl_ratio}, size_ratio: 1}}
variants:
  fp16: {{solver: {{name: none}}, container: safetensors}}
  int8: {{solver: {{name: rtn, bits: 8, group_size: -1, symmetric: true}}, container: compressed-tensors}}
"""
# Installing is recorded; all else is Python's.
PYTHON = """#!/bin/sh
if [ "$1 $2 $3" = "-m pip install" ]; then
  shift 3
  printf '%s\\n' "$@" >> {records}/pip
  exit 0
fi
exec {python} "$@"
"""
# Says which comment is there (the file `comment`), and records the rest with the text of the file that is sent.
GH = """#!{python}
import json, pathlib, sys
records = pathlib.Path({records!r})
arguments = sys.argv[1:]
if "--jq" in arguments:
    print((records / "comment").read_text() if (records / "comment").exists() else "", end="")
    sys.exit()
field = arguments[arguments.index("--field") + 1]
name, _, file = field.partition("=@")
call = {{"method": arguments[arguments.index("--method") + 1], "path": arguments[3], name: pathlib.Path(file).read_text()}}
with (records / "gh").open("a") as log:
    log.write(json.dumps(call) + "\\n")
"""


@dataclass(frozen=True)
class Team:
    """The repository, what ran in place of pip and gh, and how a job's environment is made."""

    folder: Path
    records: Path
    model: Path

    @property
    def output(self) -> Path:
        return self.folder / "artifacts" / "tiny"

    def write_recipe(self, ppl_ratio: float) -> None:
        """A recipe whose gate takes that much perplexity."""
        text = self.folder / "text.txt"
        if not text.exists():  # a text that was written again would be measured again
            text.write_text(pydoc_data.topics.topics["assignment"])
        file = self.folder / "recipes" / "recipe" / "tiny.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(RECIPE.format(model=self.model, text=text, ppl_ratio=ppl_ratio))

    def environment(self, **variables: str) -> dict[str, str]:
        """What the steps get: no network, this project, one thread; ``variables`` on top."""
        kept = {key: os.environ[key] for key in ("HOME", "LANG", "TMPDIR") if key in os.environ}
        path = os.pathsep.join([str(self.records / "bin"), os.environ["PATH"]])
        offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        return {**kept, **offline, "PATH": path, "PYTHONPATH": str(PROJECT), **variables}

    def calls(self) -> list[dict[str, Any]]:
        """What ``gh`` was asked to send, oldest first."""
        log = self.records / "gh"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Team:
    """The repository with its recipe, nothing run yet."""
    team = Team(tmp_path_factory.mktemp("team"), tmp_path_factory.mktemp("records"), tiny_llama)
    team.write_recipe(ppl_ratio=2)
    programs = team.records / "bin"
    programs.mkdir()
    places = {"records": str(team.records), "python": sys.executable}
    (programs / "python").write_text(PYTHON.format(**{key: shlex.quote(value) for key, value in places.items()}))
    (programs / "gh").write_text(GH.format(**places))
    for program in programs.iterdir():
        program.chmod(0o755)
    return team
