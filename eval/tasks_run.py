"""lm-eval, asked through its own API: names of tasks to figures, in whatever model runs them.

Tasks are found by name among the built-in ones (``eval/builtin_tasks``), in the user's folders of YAML files, and among
lm-eval's own, whose data come from the hub. Nothing is printed, and copies that the datasets package makes of local files are
thrown away.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import glob
import hashlib
import inspect
import json
import logging
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from eval.tasks_scores import Scores, entry
from quantize.errors import InputError, one_line

BUILTIN = Path(__file__).with_name("builtin_tasks")
# What lm-eval itself sets them to.
_RANDOM_SEED, _OTHER_SEED = 0, 1234
# The datasets package's readers of local files.
_FILE_READERS = {"json", "csv", "parquet", "arrow", "text", "xml"}
# Of a task's settings, those that say where its data lie and not what they are: the items are hashed themselves.
_PLACES = ("config_source", "data_files", "data_dir", "cache_dir")


def run_tasks(
    lm: Any, names: Sequence[str], *, task_dirs: Sequence[Path] = (), limit: int | None = None, consumer: str = ""
) -> dict[str, dict[str, Any]]:
    """Run tasks, groups and tags of tasks in a model.

    Args:
        lm: lm-eval's interface to it.
        names: what to run, each once.
        task_dirs: folders of task YAML files; a name found there is taken before lm-eval's own. Functions that such files name
            are Python code of the folder's owner, and are run.
        limit: items of each task, the first ones; None for all.
        consumer: program and version behind ``lm``, for the record.

    Returns:
        For each name its entry (:mod:`eval.tasks_scores`). A name that stands for several tasks pools their items.

    Raises:
        InputError: a name is unknown, its files are wrong, its data cannot be had, it has no metric that is a mean over items,
            or it would run code that the model writes.
    """
    import lm_eval
    import torch

    _quiet()
    with tempfile.TemporaryDirectory(prefix="tasks-") as scratch, _without_bars():
        chosen = _load(names, task_dirs, Path(scratch))
        # A task that several names stand for is run once.
        leaves = {leaf: task for tasks in chosen.values() for leaf, task in tasks.items()}
        random.seed(_RANDOM_SEED)
        np.random.seed(_OTHER_SEED)
        torch.manual_seed(_OTHER_SEED)
        for task in leaves.values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_OTHER_SEED)
        try:
            results = lm_eval.evaluate(lm, {"tasks": leaves}, limit=limit, bootstrap_iters=0, log_samples=True)
        except ValueError as error:
            if "unsafe" not in str(error):
                raise
            raise InputError(
                f"eval.tasks: {one_line(error)[:80]}: such a task runs code that the model writes; leave it out"
            ) from error
    common = {"limit": limit, "consumer": consumer, "lm_eval": metadata.version("lm_eval")}
    return {name: _entry(name, list(tasks), results, common) for name, tasks in chosen.items()}


def is_offline(name: str) -> bool:
    """Whether a task is one of the built-in ones, which need neither files nor a network."""
    return name in ("builtin", "builtin_grammar", "builtin_cloze")


def check_known(names: Sequence[str], task_dirs: Sequence[Path] = ()) -> None:
    """Refuse names that stand for no task, without loading any data.

    Raises:
        InputError: a name is unknown or there twice, or a folder is missing.
    """
    _quiet()
    _manager(names, task_dirs)


def check_names(names: Sequence[str]) -> None:
    """Refuse an empty or repeated list of names.

    Raises:
        InputError: it is one.
    """
    if not names:
        raise InputError("no task is named; say builtin")
    for name in names:
        if names.count(name) > 1 or not name.strip():
            raise InputError(f"eval.tasks names {name!r} {names.count(name)} times; name each task once, such as builtin")


def _load(names: Sequence[str], task_dirs: Sequence[Path], scratch: Path) -> dict[str, dict[str, Any]]:
    """For each name, lm-eval's tasks by their names."""
    manager, chosen = _manager(names, task_dirs), {}
    for name in names:
        with _local_data(scratch, task_dirs):
            try:
                chosen[name] = dict(manager.load([name])["tasks"])
            except InputError:
                raise
            except Exception as error:  # a task's own Python code, the hub and the datasets package raise all kinds
                raise InputError(
                    f"eval.tasks: {name} cannot be loaded ({type(error).__name__}: {one_line(error)}); its data come from "
                    "where its YAML file says, most from the Hugging Face hub: check the network and the file, or use "
                    "builtin, which needs neither"
                ) from error
    return chosen


def _manager(names: Sequence[str], task_dirs: Sequence[Path]) -> Any:
    """lm-eval's index of tasks, in which all names are."""
    from lm_eval.tasks import TaskManager

    check_names(names)
    for folder in task_dirs:
        if not folder.is_dir():
            raise InputError(f"eval.task_dir={folder} is no folder; give one with lm-eval's task YAML files")
    folders = [BUILTIN, *task_dirs]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        # Thousands of files: read only where a name asks for them.
        manager = TaskManager(include_path=folders)
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, 3) or ["builtin"]
            raise InputError(
                f"eval.tasks: {name} is unknown to eval.task_dir and to lm-eval; do you mean {' or '.join(close)}?"
            )
    return manager


def _entry(name: str, leaves: list[str], results: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    scores = {leaf: _scores(leaf, results) for leaf in leaves}
    shared = [metric for metric in scores[leaves[0]] if all(metric in scores[leaf] for leaf in leaves)]
    if not shared:
        raise InputError(f"eval.tasks: {name} has no metric that is a mean over items; name its tasks one by one, or others")
    better = {metric: _better(leaves[0], metric, results) for metric in shared}
    pooled = {metric: (np.concatenate([scores[leaf][metric] for leaf in leaves]), better[metric]) for metric in shared}
    return entry(
        pooled,
        {leaf: scores[leaf][shared[0]] for leaf in leaves} if len(leaves) > 1 else {},
        definition=_sha256([_settings(results["configs"][leaf]) for leaf in leaves]),
        items=_sha256([[sample["arguments"], sample["target"]] for leaf in leaves for sample in _samples(leaf, results)]),
        versions={leaf: str(results["versions"][leaf]) for leaf in leaves},
        num_fewshot=max(results["n-shot"][leaf] for leaf in leaves),
        **common,
    )


def _scores(leaf: str, results: Mapping[str, Any]) -> dict[str, Scores]:
    """Every item's score by each metric that is the mean of them; lm-eval's key is ``METRIC,FILTER``."""
    found = {}
    for key, value in results["results"][leaf].items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr"):
            continue
        values = [sample.get(metric) for sample in results["samples"][leaf] if sample["filter"] == filter_name]
        if not values or not all(isinstance(each, (int, float, np.number)) for each in values):
            continue
        array = np.array(values, np.float64)
        if np.isfinite(array).all() and np.isclose(array.mean(), value, rtol=1e-9, atol=1e-12):
            found[metric if filter_name == "none" else f"{metric},{filter_name}"] = array
    return found


def _samples(leaf: str, results: Mapping[str, Any]) -> list[Any]:
    """A task's items, each once: every filter of its answers lists them again."""
    samples = results["samples"][leaf]
    return [sample for sample in samples if sample["filter"] == samples[0]["filter"]]


def _better(leaf: str, metric: str, results: Mapping[str, Any]) -> bool:
    return results["higher_is_better"][leaf].get(metric.partition(",")[0]) is not False


def _settings(value: Any) -> Any:
    """A task's settings without the places of its files."""
    if isinstance(value, Mapping):
        return {str(key): _settings(each) for key, each in value.items() if key not in _PLACES}
    return [_settings(each) for each in value] if isinstance(value, (list, tuple)) else value


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_described).encode()).hexdigest()


def _described(value: Any) -> Any:
    """What JSON cannot hold, without addresses in memory: functions by their source, other things by their fields."""
    if isinstance(value, np.generic):
        return value.item()
    if callable(value):
        with contextlib.suppress(TypeError, OSError):
            return inspect.getsource(value)
        return getattr(value, "__qualname__", type(value).__name__)
    fields = getattr(value, "__dict__", None)
    return [type(value).__name__, _settings(fields) if fields else ""]


def _quiet() -> None:
    # It greets, warns of what is meant, and says which seeds it sets; what goes wrong it raises.
    for name in ("lm_eval", "lm-eval", "datasets", "evaluate"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """No bars of tqdm's, which lm-eval draws on any standard error."""
    from tqdm import tqdm

    original = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(original, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = original


@contextlib.contextmanager
def _local_data(scratch: Path, task_dirs: Sequence[Path]) -> Iterator[None]:
    """Have ``datasets.load_dataset`` keep its copies of local files in ``scratch``, and find files beside a task's YAML too.

    Relative paths are relative to the current directory for lm-eval; a folder of tasks that brings its data works from
    anywhere.
    """
    import datasets

    original = datasets.load_dataset

    @functools.wraps(original)
    def load(path: str, *arguments: Any, **options: Any) -> Any:
        if path in _FILE_READERS:
            options.setdefault("cache_dir", str(scratch))
            options["data_files"] = _found(options.get("data_files"), task_dirs)
        return original(path, *arguments, **options)

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = original


def _found(files: Any, folders: Sequence[Path]) -> Any:
    """``data_files`` of the datasets package (a name, several, or some for each split), relative names found."""
    if isinstance(files, Mapping):
        return {split: _found(each, folders) for split, each in files.items()}
    if isinstance(files, (list, tuple)):
        return [_found(each, folders) for each in files]
    if not isinstance(files, str) or "://" in files:
        return files
    if Path(files).is_absolute() or glob.glob(files):  # noqa: PTH207
        return files
    for folder in folders:
        if glob.glob(str(folder / files)):  # noqa: PTH207
            return str(folder / files)
    places = " and ".join(str(folder.resolve()) for folder in (Path(), *folders))
    raise InputError(f"eval.tasks: data file {files} does not exist; a relative name is looked for in {places}")
