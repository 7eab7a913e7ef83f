"""The command line: ``python -m quantize recipe=NAME [key=value ...]``.

Exit codes: 0 done, 2 bad input (one line on standard error), 3 gate failed, 1 a defect of this project.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from exports.registry.secrets import redact
from quantize.checks import validate
from quantize.config import LOG_LEVELS, register_configs
from quantize.errors import GateError, InputError
from quantize.files import disk_error
from quantize.logs import quiet_libraries, setup_logging

_RECIPES = str(Path(__file__).resolve().parent.parent / "recipes")
_failures: list[BaseException] = []


@hydra.main(version_base="1.3", config_path=_RECIPES, config_name="config")
def _task(composed: DictConfig) -> None:
    try:
        setup_logging(str(composed.log_level) if composed.log_level in LOG_LEVELS else "info")
        quiet_libraries()
        config = validate(composed)
        from quantize.pipeline import run_pipeline  # transformers: seconds that a wrong key need not cost

        run_pipeline(config)
    except Exception as error:
        with contextlib.suppress(OSError):
            Path(composed.output_dir).rmdir()  # Hydra made it; an empty one is no use to anybody
        # Raised from here, Hydra would print a line of its own first; main raises it again.
        _failures.append(error)


def main() -> int:
    """Run the command line; returns the exit code."""
    register_configs()
    _failures.clear()
    # Hydra would turn every exception into exit code 1 and a page of advice.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    shows_job = "--cfg=job" in sys.argv or ("job" in sys.argv and not {"--cfg", "-c"}.isdisjoint(sys.argv))
    if shows_job and "--resolve" not in sys.argv:
        sys.argv.append("--resolve")
    debug = any(argument.lower() == "debug=true" for argument in sys.argv)
    try:
        _task()
        if _failures:
            raise _failures[0]
    except (InputError, HydraException, OmegaConfBaseException) as error:
        return _fail(explain(error), 2, debug)
    except GateError as error:
        return _fail(str(error), 3, debug=False)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on where this one stopped", 130, debug=False)
    except FileExistsError as error:  # Hydra makes output_dir before anything here runs
        return _fail(f"output_dir={error.filename} is a file, not a directory; choose another output_dir", 2, debug)
    except Exception as error:
        trouble = disk_error(Path(getattr(error, "filename", None) or "output_dir"), error)
        if trouble is not None:
            return _fail(str(trouble), 2, debug)
        return _fail(f"defect: {type(error).__name__}: {error}; please report it (debug=true shows where)", 1, debug)
    return 0


def explain(error: Exception) -> str:
    """One line for a bad input; for an unknown or ill-typed key it names the key and what is allowed there."""
    if isinstance(error, InputError):
        return str(error)
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    text = " ".join(str(error).split()).split(" Set the environment variable")[0]
    if isinstance(cause, OmegaConfBaseException) and cause.full_key:
        allowed = _allowed(cause.object_type)
        reason = " ".join(str(cause.msg or cause).split()).split(" full_key:")[0]
        return f"{cause.full_key}: {reason}" + (f"; allowed here: {allowed}" if "not in" in reason and allowed else "")
    return text


def _allowed(object_type: Any) -> str:
    if dataclasses.is_dataclass(object_type):
        return ", ".join(field.name for field in dataclasses.fields(object_type))
    return ""


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        logging.getLogger("quantize").exception("")
    print(f"error: {redact(' '.join(message.split()))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
