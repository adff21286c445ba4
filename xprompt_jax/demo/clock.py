"""How long each stage of the demo took."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

from xprompt_jax.evaluate.report import Table

log = logging.getLogger(__name__)


class Clock:
    """Says what is going on, and keeps the seconds of each stage."""

    def __init__(self):
        self.stages: list[tuple[str, float]] = []
        """(name, seconds), in order."""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A stage."""
        log.info("— %s", name)
        start = time.perf_counter()
        yield
        self.stages.append((name, time.perf_counter() - start))

    def total(self) -> float:
        """Seconds of all stages."""
        return sum(seconds for _, seconds in self.stages)

    def table(self) -> Table:
        """The stages, for the page."""
        return Table("Seconds", ("stage", "s"), tuple((name, f"{seconds:.1f}") for name, seconds in self.stages))
