"""`xprompt convert`: any format to any other, tensor by tensor, whole or not at all, resumable.

    OUT's folder/.OUT.converting/   the work: finished parts, and progress.json that says which they are
    OUT/                            gets its name when everything is there

A run that was killed goes on from its finished parts. Peak memory is a few tensors of one layer (or one shard's header).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from xprompt_jax.convert.adapt import Adaptation, Adapted
from xprompt_jax.convert.formats import Format
from xprompt_jax.convert.huggingface import HuggingFaceTarget
from xprompt_jax.convert.meta import MetaTarget, fewest_ranks
from xprompt_jax.convert.native import NativeTarget
from xprompt_jax.convert.torchwriter import MARK
from xprompt_jax.convert.weights import Source, Target, shapes_of
from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Options(Adaptation):
    """Where to, and what may change on the way."""

    to: Format = "xprompt"
    shards: int = 0
    """Tensor-parallel ranks of a Meta folder; 0 takes the fewest that hold the QK-norms."""


def convert(source: Source, out: str | Path, options: Options, *, progress: bool = True) -> Path:
    """Writes `source` to the new folder `out`.

    Raises:
      UserError: `out` exists, the disk has not enough room, or a tensor of the source is missing or damaged; nothing stays behind.
    """
    out = Path(out)
    if out.exists():
        raise UserError(f"--out {out}: exists; choose another folder or remove it")
    work = out.with_name(f".{out.name}.converting")
    source = Adapted(source, options)
    done = _resume(work, source, options)
    try:
        _write(work, source, options, done, progress=progress)
    except (UserError, OSError) as e:
        shutil.rmtree(work)
        if isinstance(e, UserError):
            raise
        raise UserError(f"--out {out}: cannot write: {e.strerror}; free space or choose another place") from None
    for note in (work / "progress.json", *work.glob(f"*{MARK}")):  # in this order: without its progress a folder is begun anew
        note.unlink()
    os.replace(work, out)
    return out


def _write(work: Path, source: Adapted, options: Options, done: list[str], *, progress: bool) -> None:
    shapes = shapes_of(source.config)
    itemsize = {name: source.dtype(name).itemsize for name in shapes}
    sizes = {name: int(np.prod(shape)) * itemsize[name] for name, shape in shapes.items()}
    target = _target(work, source, options, itemsize)
    need = {part.name: sum(sizes[name] for name in part.tensors) for part in target.parts() if part.name not in done}
    _check_room(work, sum(need.values()))
    if done:
        log.info("going on with %s: %d of %d parts are there", work, len(done), len(target.parts()))
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="converting", disable=not progress) as bar:

        def read(name: str) -> np.ndarray:
            value = source.read(name)
            bar.update(sizes[name])
            return value

        for part in target.parts():
            if part.name in done:
                bar.update(sum(sizes[name] for name in part.tensors))
                continue
            _check_room(work, need[part.name])  # others write to the disk too
            target.write(part, read)
            done.append(part.name)
            _note(work, source, options, done)
        target.finish(source.tokenizer)


def _check_room(work: Path, need: int) -> None:
    free = shutil.disk_usage(work).free
    if need * 1.02 > free:
        gib = f"{need / 2**30:.2f} GiB, {free / 2**30:.2f} are free"
        raise UserError(f"--out {work.parent}: needs {gib}; make room or choose another place")


def _target(work: Path, source: Source, options: Options, itemsize: dict[str, int]) -> Target:
    if options.to == "huggingface":
        return HuggingFaceTarget(work, source.config, itemsize)
    if options.to == "meta":
        return MetaTarget(work, source.config, options.shards or fewest_ranks(source))
    return NativeTarget(work, source.config)


def _identity(source: Source, options: Options) -> dict:
    files = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in source.files()]
    return {"files": files, "options": dataclasses.asdict(options), "num_xp_tokens": source.config.num_xp_tokens}


def _resume(work: Path, source: Source, options: Options) -> list[str]:
    """Names of the parts that an earlier run has finished; what belongs to another conversion is removed."""
    try:
        noted = json.loads((work / "progress.json").read_text())
        if noted["of"] == json.loads(json.dumps(_identity(source, options))):
            return list(noted["done"])
    except (OSError, ValueError, KeyError):
        pass
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
    except OSError as e:
        raise UserError(f"--out {work.parent}: cannot write: {e.strerror}; choose another place") from None
    return []


def _note(work: Path, source: Source, options: Options, done: list[str]) -> None:
    with atomic_path(work / "progress.json") as temporary:
        temporary.write_text(json.dumps({"of": _identity(source, options), "done": done}))
