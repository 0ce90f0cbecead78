"""Import a Python file of the user: a task, an estimator, or a loss, named `FILE.py[:NAME]`."""

import hashlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def is_file_name(name: str) -> bool:
    """Return whether a name is `FILE.py` or `FILE.py:NAME`."""
    return ".py" in name


def split_name(name: str) -> tuple[Path, str]:
    """Return the file of `FILE.py:NAME`, and the name in it, empty where there is none."""
    file, _, wanted = name.partition(":")
    return Path(file), wanted


def import_file(path: Path, *, said: str) -> ModuleType:
    """Import a file under a name that follows from its path: the same in every process.

    Args:
        said: the setting, as `task.name=my_task.py`, for errors.

    Raises:
        ValueError: the file is missing, or its import fails.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{said}: {path} does not exist; give the path of a Python file")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    name = f"agrpo_own_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses need the module here
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{said}: importing {path} raised {type(error).__name__}: {error}"
        ) from error
    return module


def find_function(name: str, *, said: str) -> Any:
    """Return the function that `FILE.py:FUNCTION` names.

    Raises:
        ValueError: no such file or function.
    """
    path, wanted = split_name(name)
    module = import_file(path, said=said)
    found = getattr(module, wanted, None) if wanted else None
    if not callable(found):
        own = [key for key, value in vars(module).items() if _is_own(value, module)]
        raise ValueError(
            f"{said}: {path} has no function {wanted or '(none was named)'}; name one as "
            f"{path}:FUNCTION; it has {', '.join(own) or 'none'}"
        )
    return found


def _is_own(value: Any, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__
