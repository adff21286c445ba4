"""Packages that only some datasets need."""

from __future__ import annotations

import importlib
from typing import Any

from xprompt_jax.errors import UserError


def need(package: str, what: str) -> Any:
    """The package, imported.

    Raises:
      UserError: it is not installed; says how to get it.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{what} need {package}: pip install 'xprompt-jax[data]'") from None
