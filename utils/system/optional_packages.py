"""Refuses, before any work, a task whose optional packages are not installed."""

import importlib.util
from collections.abc import Sequence

from utils.system.errors import UserError


def require(packages: Sequence[str], purpose: str, install: str) -> None:
    """Refuses to go on when a package that `purpose` needs is not installed.

    Args:
        packages: names as they are imported.
        purpose: what needs them, such as "--to onnx".
        install: what pip takes, such as "-r requirements-export.txt".

    Raises:
        UserError: names the missing packages and the command that installs them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{purpose} needs {', '.join(missing)}: pip install {install}")
