"""Tasks: the figures are lm-eval's, every run of a task says what it asked, and only like is compared with like."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from eval import tasks, tasks_transformers
from eval.consumers.transformers_model import CONSUMER, TransformersArtifact
from eval.tasks_run import BUILTIN, run_tasks
from eval.tasks_scores import compare, entry, figure, pack_scores, sentence, unpack_scores
from eval.tasks_transformers import ArtifactLM
from quantize.artifact import read_evaluation, record_evaluation
from quantize.errors import InputError

YAML = """
task: {name}
tag: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{prompt}"
doc_to_choice: "{{{{[right, wrong]}}}}"
doc_to_target: 0
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: {version}}}
"""
MakeTask = Callable[..., Path]


class FakeLM(LM):  # type: ignore[misc]
    """Finds a text the likelier the fewer letters it has, and knows the words in ``known``."""

    def __init__(self, *known: str) -> None:
        super().__init__()
        self.known = known

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        texts = [request.args[1].strip() for request in requests]
        return [(0.0 if text in self.known else -float(len(text)), False) for text in texts]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [-float(len(request.args[0])) for request in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [self.known[0] if self.known else "" for _ in requests]


@pytest.fixture
def make_task(tmp_path: Path) -> MakeTask:
    """``make_task(name, ...)``: a folder with the YAML file of a task of 12 items, and its data beside it."""
    folder = tmp_path / "own"
    folder.mkdir()
    rows = [{"question": f"Number {i}", "right": "a" * (1 + i % 4), "wrong": "bb"} for i in range(12)]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name: str = "own_task", data: str = "items.jsonl", prompt: str = "{{question}}", version: str = "1.0") -> Path:
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, data=data, prompt=prompt, version=version))
        return folder

    return make


@pytest.fixture
def loaded(tiny_llama: Path) -> TransformersArtifact:
    """The tiny model as it is judged."""
    found = CONSUMER.for_evaluation(CONSUMER.load(tiny_llama, "cpu"))
    assert isinstance(found, TransformersArtifact)
    return found


@pytest.fixture
def only_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lm-eval's own tasks: thousands of files that take long to read."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path, **_: TaskManager(None, include_path, False))


@contextlib.contextmanager
def changes_nothing(folder: Path) -> Iterator[None]:
    def files() -> list[Path]:
        return sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)  # Python's own, made when it likes

    before = files()
    yield
    assert files() == before


# Scores.


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_right_and_wrong_survive_packing(answers: list[bool]) -> None:
    scores = np.array(answers, np.float64)
    assert (unpack_scores(pack_scores(scores)) == scores).all()
    assert len(pack_scores(scores)) < 24 + len(answers) / 4


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_other_scores_survive_packing(values: list[float]) -> None:
    scores = np.array(values, np.float64)
    assert (unpack_scores(pack_scores(scores)) == scores).all()


@pytest.mark.parametrize("text", ["", "bits:", "bits:AAA", "bits:!!!!", "bits:CAAAAA==", "float32:AAA=", "text:AAAA"])
def test_damaged_scores_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="damaged"):
        unpack_scores(text)


# Running.


def test_figures_are_lm_evals(make_task: MakeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_task()
    found = run_tasks(FakeLM("aaaa"), ["own_task"], task_dirs=[folder])["own_task"]
    monkeypatch.chdir(folder)
    results = lm_eval.simple_evaluate(
        FakeLM("aaaa"), tasks=["own_task"], task_manager=TaskManager(include_path=folder, include_defaults=False)
    )
    theirs = results["results"]["own_task"]
    for metric in ("acc", "acc_norm"):
        assert found["metrics"][metric]["value"] == pytest.approx(theirs[f"{metric},none"])
        assert found["metrics"][metric]["stderr"] == pytest.approx(theirs[f"{metric}_stderr,none"])
    samples = [sample["acc"] for sample in results["samples"]["own_task"]]
    assert unpack_scores(found["metrics"]["acc"]["scores"]).tolist() == samples
    assert (found["metric"], found["samples"], found["parts"]) == ("acc", 12, {})
    assert found["value"] == found["metrics"]["acc"]["value"] and 0 < found["value"] < 1


def test_a_group_pools_its_items() -> None:
    with changes_nothing(BUILTIN):
        found = run_tasks(FakeLM(), ["builtin"], limit=30, consumer="fake 1.0")["builtin"]
    parts = found["parts"]
    assert parts.keys() == {"builtin_grammar", "builtin_cloze"}
    assert [part["samples"] for part in parts.values()] == [30, 30] and found["samples"] == 60
    assert found["value"] == pytest.approx(np.mean([part["value"] for part in parts.values()]))
    assert (found["limit"], found["consumer"], found["num_fewshot"]) == (30, "fake 1.0", 0)
    assert found["versions"] == {"builtin_grammar": "1.0", "builtin_cloze": "1.0"}


def test_a_tag_pools_too_and_no_task_is_run_twice(make_task: MakeTask) -> None:
    make_task("own_a")
    folder = make_task("own_b", prompt="Say {{question}}")
    found = run_tasks(FakeLM(), ["own", "own_a"], task_dirs=[folder])
    assert found["own"]["parts"].keys() == {"own_a", "own_b"}
    assert found["own"]["parts"]["own_a"] == {key: found["own_a"][key] for key in ("value", "stderr", "samples")}


def test_nothing_is_printed_or_left_behind(
    make_task: MakeTask, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folder = make_task()
    loader, started = datasets.load_dataset, set(tmp_path.iterdir())
    run_tasks(FakeLM(), ["own_task", "builtin"], task_dirs=[folder], limit=4)
    assert capfd.readouterr() == ("", "")
    assert set(tmp_path.iterdir()) == started
    assert datasets.load_dataset is loader


def test_a_definition_is_its_settings_and_items_are_its_questions(make_task: MakeTask) -> None:
    def run(limit: int | None = None, **settings: str) -> tuple[str, str]:
        found = run_tasks(FakeLM(), ["own_task"], task_dirs=[make_task(**settings)], limit=limit)["own_task"]
        return found["definition"], found["items"]

    base = run()
    assert run() == base
    assert run(data=os.path.relpath(make_task() / "items.jsonl")) == base  # the same data by another name
    reworded, reversioned, shortened = run(prompt="Q: {{question}}"), run(version="2.0"), run(limit=5)
    assert reworded[0] != base[0] and reworded[1] != base[1]
    assert reversioned[0] != base[0] and reversioned[1] == base[1]
    assert shortened[0] == base[0] and shortened[1] != base[1]


@pytest.mark.parametrize(
    ("names", "data", "message"),
    [
        (["own_tusk"], "items.jsonl", r"own_tusk is unknown .* do you mean own_task"),
        (["own_task", "own_task"], "items.jsonl", "2 times"),
        ([], "items.jsonl", "say builtin"),
        (["own_task"], "missing.jsonl", r"missing\.jsonl does not exist; a relative name is looked for in .*own"),
    ],
)
@pytest.mark.usefixtures("only_own")
def test_what_cannot_be_run_is_named(make_task: MakeTask, names: list[str], data: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_tasks(FakeLM(), names, task_dirs=[make_task(data=data)])


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"eval\.task_dir=.*nowhere is no folder"):
        run_tasks(FakeLM(), ["builtin"], task_dirs=[tmp_path / "nowhere"])


def test_a_task_without_means_is_refused(make_task: MakeTask) -> None:
    folder = make_task()
    (folder / "own_task.yaml").write_text(
        "task: own_task\ndataset_path: json\ndataset_kwargs: {data_files: {test: items.jsonl}}\n"
        "output_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\ndoc_to_target: '{{question}}'\n"
        "metric_list:\n  - {metric: word_perplexity}\n"
    )
    with pytest.raises(InputError, match="no metric that is a mean"):
        run_tasks(FakeLM(), ["own_task"], task_dirs=[folder])


def test_code_that_a_model_writes_is_not_run(make_task: MakeTask) -> None:
    folder = make_task()
    with (folder / "own_task.yaml").open("a") as stream:
        stream.write("unsafe_code: true\n")
    with pytest.raises(InputError, match="code that the model writes"):
        run_tasks(FakeLM(), ["own_task"], task_dirs=[folder])


def test_texts_that_are_generated_are_judged(make_task: MakeTask) -> None:
    folder = make_task()
    (folder / "own_task.yaml").write_text(
        "task: own_task\ndataset_path: json\ndataset_kwargs: {data_files: {test: items.jsonl}}\n"
        "output_type: generate_until\ntest_split: test\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{right}}'\n"
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )
    found = run_tasks(FakeLM("aaa"), ["own_task"], task_dirs=[folder])["own_task"]
    assert (found["metric"], found["value"]) == ("exact_match", 0.25)


# Comparing.


def made(values: list[float], better: bool = True, **described: Any) -> dict[str, Any]:
    scores = np.array(values, np.float64)
    return entry({"acc": (scores, better)}, {}, **{"definition": "d" * 64, "items": "i" * 64, **described})


def test_flips_are_counted_either_way() -> None:
    reference, variant = made([1, 1, 1, 0, 0, 1] * 10), made([1, 0, 1, 1, 0, 0] * 10)
    found = compare(variant, reference, name="t")
    assert (found["flips_lost"], found["flips_won"], found["samples"]) == (20, 10, 60)
    assert found["difference"] == pytest.approx(-10 / 60) and found["reference"] == pytest.approx(40 / 60)
    assert found["low"] < found["difference"] < found["high"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_where_less_is_better_more_is_lost() -> None:
    found = compare(made([2.5, 1.5, 0.5], better=False), made([1.5, 1.5, 1.5], better=False), name="t")
    assert (found["flips_lost"], found["flips_won"]) == (1, 1)
    found = compare(made([2.5, 1.5], better=False), made([1.5, 1.5], better=False), name="t")
    assert (found["flips_lost"], found["flips_won"]) == (1, 0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (made([1, 0], definition="e" * 64), "another definition"),
        (made([1, 0], items="j" * 64), r"other items \(2; here 2\)"),
        (made([1, 0, 1]), "2 scores here, 3 in the reference"),
        ({"definition": "d" * 64, "items": "i" * 64}, "metrics"),
    ],
)
def test_unlike_figures_are_not_compared(other: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(made([1, 0]), other, name="t")


def test_a_sentence_says_what_matters() -> None:
    found = made([1, 0, 1, 1] * 25)
    assert sentence("t", found) == "t: acc 0.7500 +- 0.0435 on 100 items"
    same = {**found, "difference": compare(found, found, name="t")}
    assert sentence("t", same).endswith("difference +0.0000 [+0.0000, +0.0000], within noise; 0 lost, 0 won")
    worse = {**found, "difference": compare(found, made([1] * 100), name="t")}
    assert "p = 0.0001; 25 lost, 0 won" in sentence("t", worse)
    assert figure(np.array([1.0]))["stderr"] is None


# In transformers.


@pytest.mark.parametrize("budget", [4 * 300, 4 * 300 * 64, 2**27])
def test_batches_change_no_answer(loaded: TransformersArtifact, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_transformers, "_LOGITS_BYTES", budget)
    words = ["Statements", "that", "assign", "names", "to", "values", "are", "found", "in", "class", "bodies"]
    pairs = [(" ".join(words[: 1 + i % 7]), " " + " ".join(words[i % 5 : 1 + i % 5 + i % 3])) for i in range(40)]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    expected = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1).loglikelihood(
        requests, disable_tqdm=True
    )
    lm, shapes = ArtifactLM(loaded), []
    call = lm._model_call

    def seen(inputs: torch.Tensor, **options: Any) -> Any:
        shapes.append(tuple(inputs.shape))
        return call(inputs, **options)

    lm._model_call = seen
    found = lm.loglikelihood(requests)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-4)
    allowed = budget // (4 * 300)
    assert all(rows == 1 or rows * length <= allowed for rows, length in shapes), shapes


def test_rolling_texts_and_generation_run_in_batches_of_windows(loaded: TransformersArtifact) -> None:
    lm = ArtifactLM(loaded)
    text = "Statements assign values to names. " * 4
    found = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    ids = torch.tensor(loaded.tokenizer(text)["input_ids"])
    before = torch.cat([torch.tensor([loaded.tokenizer.bos_token_id]), ids[:-1]])
    logprobs = torch.log_softmax(loaded.logits(before[None])[0].float(), -1)
    assert found[0] == pytest.approx(logprobs.gather(1, ids[:, None]).sum().item(), rel=1e-4)
    settings = {"until": ["\n\n"], "max_gen_toks": 4}
    assert isinstance(
        lm.generate_until([Instance("generate_until", {}, ("Statements", settings), 0)], disable_tqdm=True)[0], str
    )


# The command.


def test_the_command(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    arguments = [str(tiny_llama), "--limit", "12", "--json"]
    with changes_nothing(tiny_llama):
        assert tasks.main([*arguments, str(first)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(first.read_text())
    found = printed["tasks"]["builtin"]
    assert found["samples"] == 24 and found["consumer"].startswith("transformers ") and "difference" not in found
    assert printed["artifact"] == tiny_llama.name and len(printed["artifact_fingerprint"]) == 64

    assert tasks.main([*arguments, str(second), "--reference", str(first)]) == 0
    again = json.loads(capsys.readouterr().out)["tasks"]["builtin"]
    assert again["metrics"] == found["metrics"]
    assert again["difference"]["within_noise"] and again["difference"]["flips_lost"] == 0
    assert math.isclose(again["difference"]["p_value"], 1)

    copy = shutil.copytree(tiny_llama, tmp_path / "copy")
    record_evaluation(copy, {"ppl": 12.5, "tasks": {"other": {"value": 0.5}}})
    assert tasks.main([str(copy), "--limit", "3", "--record"]) == 0
    capsys.readouterr()
    recorded = read_evaluation(copy)
    assert recorded is not None and recorded["ppl"] == 12.5
    assert recorded["tasks"].keys() == {"other", "builtin"} and recorded["tasks"]["builtin"]["samples"] == 6

    assert tasks.main([str(tiny_llama), "--limit", "11", "--reference", str(first)]) == 2
    assert "other items" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "bultin"], "do you mean builtin"),
        (["--limit", "0"], "leaves no items"),
        (["--consumer", "llamacpp"], "no GGUF file"),
        (["--reference", "none.json"], "does not exist"),
    ],
)
@pytest.mark.usefixtures("only_own")
def test_bad_input_ends_with_2(
    tiny_llama: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tasks.main([str(tiny_llama), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err


def test_a_reference_without_tasks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text('{"ppl": 12.5, "tasks": {}}')
    with pytest.raises(InputError, match="no figures of tasks"):
        tasks.read_reference(tmp_path / "evaluation.json")


def test_gguf_files_are_llama_cpps_where_it_is_built(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QUANTIZE_LLAMACPP", str(tmp_path))
    assert tasks.consumer_of(tiny_gguf.parent) == "transformers"
    (tmp_path / "llama-server").write_text("#!/bin/sh\n")
    (tmp_path / "llama-server").chmod(0o755)
    assert tasks.consumer_of(tiny_gguf.parent) == "llamacpp"
    assert tasks.consumer_of(tiny_gguf.parent, "transformers") == "transformers"
    with pytest.raises(InputError, match="use auto, transformers"):
        tasks.consumer_of(tiny_gguf.parent, "ollama")
