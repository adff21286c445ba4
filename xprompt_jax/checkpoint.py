"""Checkpoints: the only importer of Orbax.

A run's folder:  checkpoints/<step>/   the whole training state, written in the background, renamed when complete
A model's folder: params/, vqgan/      flat dictionaries of arrays (convert/native.py)

Both are restored by the shapes and shardings of the target, so a checkpoint moves to any other mesh.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from xprompt_jax.errors import UserError
from xprompt_jax.mesh import all_agree

State = TypeVar("State")

log = logging.getLogger(__name__)

# Orbax and its friends report every step of every save on the root logger.
for _name in ("absl", "orbax"):
    logging.getLogger(_name).setLevel(logging.WARNING)


class Checkpoints:
    """The checkpoints of one run; the newest `keep` stay, and the `keep_best` with the lowest held-out loss.

    Args:
      read_only: look at a run that may be going on: nothing is cleaned up.
    """

    def __init__(self, folder: str | Path, *, keep: int = 3, keep_best: int = 0, read_only: bool = False):
        self.folder = Path(folder).absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"{self.folder}: cannot write: {e.strerror}; choose another --workdir") from None
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda scores: scores["eval/loss"], reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
        )
        policy = policies.AnyPreservationPolicy([policies.LatestN(keep), best]) if keep_best else policies.LatestN(keep)
        self._checkpointer = ocp.training.Checkpointer(str(self.folder), preservation_policy=policy, cleanup_tmp_directories=not read_only)

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        newest = self._checkpointer.latest
        return None if newest is None else int(newest.step)

    def save(self, step: int, state: Any, scores: Mapping[str, float] | None = None) -> None:
        """Starts to write a state (a pytree of arrays) in the background; waits for the save before it.

        Args:
          scores: of this state, "eval/loss" among them, where it was evaluated.

        Raises:
          UserError: the disk is full or cannot be written.
        """
        with _writing(self.folder):
            self._checkpointer.wait()
            self._checkpointer.save_async(step, state, force=True, overwrite=True, metrics=dict(scores) if scores else None)

    def restore(self, step: int, like: State) -> State:
        """Loads a step into the shapes, types and shardings of `like` (a pytree of ShapeDtypeStruct)."""
        return self._checkpointer.load(step, jax.tree.map(_placed, like))

    def steps(self) -> list[int]:
        """All complete steps, the oldest first."""
        return sorted(int(c.step) for c in self._checkpointer.checkpoints)

    def restore_part(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """Some fields of the saved state, by name; the others are not read.

        Raises:
          UserError: the checkpoint is damaged, or of another shape.
        """
        partial = ocp.Context()
        partial.pytree.loading.partial_load = True
        try:
            with partial:
                return self._checkpointer.load(step, jax.tree.map(_placed, dict(like)))
        except Exception as e:  # Orbax and TensorStore raise whatever the damage looks like to them
            raise UserError(f"{self.folder}: checkpoint {step} cannot be read ({type(e).__name__}); give another --step") from None

    def restore_newest(self, like: State) -> tuple[int, State] | None:
        """(step, state) of the newest checkpoint that can be read on every process; None where there is none at all.

        A damaged one (a disk that lied, a copy that was cut short) is moved aside to <step>.damaged, with a warning.

        Raises:
          UserError: there are checkpoints, and none of them can be read.
        """
        steps = sorted((int(c.step) for c in self._checkpointer.checkpoints), reverse=True)
        damaged: list[int] = []
        first_error = ""
        for step in steps:
            state = None
            try:
                state = self.restore(step, like)
            except Exception as e:  # Orbax and TensorStore raise whatever the damage looks like to them
                first_error = first_error or f"{type(e).__name__}: {e}".splitlines()[0][:200]
            if all_agree(state is not None) and state is not None:
                self._move_aside(damaged)
                return step, state
            damaged.append(step)
        if steps:
            raise UserError(f"{self.folder}: none of the checkpoints {steps} can be read ({first_error}); "
                            "restore them from a copy, or start again in another --workdir")  # fmt: skip
        return None

    def _move_aside(self, steps: list[int]) -> None:
        for step in steps:
            log.warning("%s: checkpoint %d is damaged: moved aside to %d.damaged; going on from an older one", self.folder, step, step)
            if jax.process_index() == 0:
                (self.folder / str(step)).rename(self.folder / f"{step}.damaged")
        all_agree(True)  # nobody looks before it is done
        if steps:
            self._checkpointer.reload()

    def wait(self) -> None:
        """Returns when nothing is being written any more.

        Raises:
          UserError: the disk is full or cannot be written.
        """
        with _writing(self.folder):
            self._checkpointer.wait()

    def close(self) -> None:
        """Waits, then lets go of the folder."""
        self.wait()
        self._checkpointer.close()


def save_arrays(folder: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a flat dictionary of arrays; `folder` must not exist yet. All processes of a run call it, with the same arrays."""
    with _writing(folder):
        ocp.save(str(Path(folder).absolute()), dict(arrays))


def load_arrays(folder: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Reads what `save_arrays` wrote, in the files' types.

    Args:
      shapes: of the arrays to read; others in the folder are passed over.

    Raises:
      UserError: the folder is no checkpoint, is damaged, or has other arrays than `shapes` says.
    """
    folder = Path(folder).absolute()
    if not ocp.is_orbax_checkpoint(str(folder)):
        raise UserError(f"{folder}: not a complete checkpoint; copy or convert the model again")
    try:
        stored = ocp.metadata(str(folder)).metadata
        for name, shape in shapes.items():
            if name not in stored:
                raise UserError(f"{folder}: no parameter {name}; the weights do not belong to this config.json")
            if tuple(stored[name].shape) != tuple(shape):
                raise UserError(f"{folder}: {name} has shape {tuple(stored[name].shape)}, config.json asks for {tuple(shape)}")
        like = {name: np.empty(stored[name].shape, stored[name].dtype) if name in shapes else ocp.PLACEHOLDER for name in stored}
        return {name: value for name, value in ocp.load(str(folder), like).items() if name in shapes}
    except UserError:
        raise
    except Exception as e:  # Orbax and TensorStore raise whatever the damage looks like to them
        raise UserError(f"{folder}: damaged ({type(e).__name__}); copy or convert the model again") from None


def _placed(target: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The target on the first device where it names no sharding."""
    sharding = target.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=sharding)


@contextlib.contextmanager
def _writing(folder: str | Path) -> Iterator[None]:
    """Turns what the disk says into one line, without Orbax's own reports of it."""
    reports = logging.getLogger("absl")
    level = reports.level
    reports.setLevel(logging.CRITICAL)
    try:
        yield
    except (OSError, ValueError) as e:
        # TensorStore tells the system's error in the text of a ValueError.
        told = re.search(r"os_error_code='(\d+)'", str(e))
        if not told and not isinstance(e, OSError):
            raise
        reason = os.strerror(int(told[1])) if told else e.strerror or e  # type: ignore[union-attr]
        raise UserError(f"{folder}: cannot write the checkpoint: {reason}; free space or choose another place") from None
    finally:
        reports.setLevel(level)
