"""The files of every evaluation: run.json before the first image is drawn, result.json after the last score.

run.json holds what the images depend on. A run that was killed goes on from the images that its folder holds, if it is started with
the same settings; with others it is refused, so that no folder mixes images of two settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path

FORMAT = "xprompt-eval-3"
RESULTS = ("result.json", "results.jsonl", "scores.csv", "table4.csv", "index.html", "grid.png")
"""What is said of a run's images once they are scored."""
LIBRARIES = ("xprompt-jax", "jax", "jaxlib", "flax", "numpy", "pillow")


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part `index` of `count` of a run: the queries (prompts, images) whose number leaves that remainder."""

    index: int = 0
    count: int = 1

    def has(self, number: int) -> bool:
        """Whether a query is of this part."""
        return number % self.count == self.index

    @classmethod
    def parse(cls, text: str) -> Shard:
        """ "i/n", i from 0; "" is the whole.

        Raises:
          UserError: anything else.
        """
        if not text:
            return WHOLE
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)  # Python reads no number of 5000 digits
        if not match or int(match[1]) >= int(match[2]):
            raise UserError(f"--shard {text[:40]}: write part/parts, counted from 0: 0/4, 1/4, 2/4 and 3/4 make a whole")
        return cls(int(match[1]), int(match[2]))


WHOLE = Shard()


def start(
    out: Path, settings: Mapping[str, Any], *, images: Callable[[], Iterable[Path]], overwrite: bool = False,
    where: Mapping[str, str | None] | None = None, shard: Shard = WHOLE,
) -> None:  # fmt: skip
    """Says that `out` belongs to a run of these settings.

    Args:
      settings: JSON values that the images depend on.
      where: places of files, told in run.json; they may change if what lies there does not.
      images: the image files that `out` holds.
      overwrite: removes them and what was said of them, and forgets the settings of before; what is not ours is never removed.
      shard: of the run; its other parts count on these settings before there is an image.

    Raises:
      UserError: `out` holds images of other settings, or of unknown ones; or it cannot be written.
    """
    path, settings = out / "run.json", json.loads(json.dumps({"format": FORMAT, **settings}))
    # In this order: of several processes that start at once, another may be writing both.
    drawn = any(True for _ in images())
    if drawn and not path.exists():
        raise UserError(f"{out}: holds images that are not of `xprompt eval` (there is no run.json); choose another --out")
    old = read_json(path) if path.exists() and not overwrite else {}
    if old and (drawn or shard.count > 1):
        for name in dict.fromkeys([*settings, *old]):
            if name != "where" and old.get(name) != settings.get(name):
                was, now = json.dumps(old.get(name)), json.dumps(settings.get(name))
                raise UserError(f"{out}: its images were drawn with {name} {was}, not {now}; choose another --out, or give --overwrite")
    elif path.exists():
        forget(out)
    if overwrite:
        for image in images():
            image.unlink(missing_ok=True)
    write_json(path, {**settings, "where": where or {}})


def forget(out: Path) -> None:
    """Removes what was said of images that are drawn anew: after a kill it would be taken for the new ones' scores."""
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file of ours.

    Raises:
      UserError: no such file, or of something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path}: cannot read: {e.strerror}; give the --out folder of a finished `xprompt eval`") from None
    except ValueError:
        value = None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(f"{path}: not of this version's `xprompt eval` (format {FORMAT}); run it again into another folder")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all, in ASCII: a file's name need not be UTF-8. What is not finite becomes null."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(finite(value), indent=1, allow_nan=False), encoding="utf-8")


def finite(value: Any) -> Any:
    """JSON has no infinities: what is not finite becomes null (the PSNR of equal images, a score of nothing)."""
    if isinstance(value, Mapping):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def fingerprint(*parts: str | bytes) -> str:
    """16 hex digits over texts and bytes, each hashed on its own."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part).digest())
    return digest.hexdigest()[:16]


def file_fingerprint(path: Any) -> str:
    """Of a file's bytes.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return fingerprint(Path(path).read_bytes())
    except (OSError, ValueError) as e:  # no file has a zero byte, or half a letter, in its name
        raise UserError(f"{path}: cannot read: {getattr(e, 'strerror', None) or e}; correct the path") from None


def versions() -> dict[str, str]:
    """Of the interpreter and of the libraries that decide numbers."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            import xprompt_jax

            found[name] = xprompt_jax.__version__
    return found
