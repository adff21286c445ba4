"""The training loop, to be read top to bottom.

    mesh -> state (new, or the newest checkpoint) -> for each step: batch, step, metrics of the step before, save

Batches are a function of the step, so resuming is a seek. Metrics are read one step late, so the device never waits for
the host. SIGTERM and Ctrl-C finish the step, save and leave; the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from xprompt_jax.checkpoint import Checkpoints
from xprompt_jax.config import Config, load_json, to_json
from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path
from xprompt_jax.mesh import AnyProcess, make_mesh, report, shard_batch
from xprompt_jax.train.metrics import MetricWriter, padding_fraction
from xprompt_jax.train.optim import Params, make_optimizer, parameter_axes
from xprompt_jax.train.state import TrainState, abstract_state, init_state
from xprompt_jax.train.step import make_eval_step, make_train_step, means
from xprompt_jax.train.watch import Diverged, Watch

log = logging.getLogger(__name__)

BatchSource = Callable[[int], Mapping[str, Mapping[str, np.ndarray]]]
"""Step -> this host's rows of every bucket."""

MAX_ROLLBACKS = 5
"""A run that breaks more often than this has another problem than its data."""


def train(
    config: Config, workdir: str | Path, data: BatchSource, *, eval_data: BatchSource | None = None,
    initial: Callable[[], Params] | None = None,
    names: Callable[[int], Sequence[str]] | None = None, on_eval: Callable[[int, TrainState], Any] | None = None,
    progress: bool = True,
) -> TrainState:  # fmt: skip
    """Trains until `config.train.steps`, from the newest checkpoint in `workdir` if there is one.

    Args:
      config: the run.
      workdir: gets config.json, metrics.jsonl, tensorboard/ and checkpoints/.
      data: training rows by step.
      eval_data: held-out rows by batch number.
      initial: makes the decoder parameters to start from; None draws random ones. Not called when a checkpoint is there.
      names: what the rows of a step are, for the message when it breaks.
      on_eval: called after each evaluation; a uint8 [h, w, 3] picture that it returns goes to TensorBoard.

    Returns:
      The last state. If the run was told to stop, its `step` is below `config.train.steps`.

    Raises:
      UserError: the folder holds a run of another model, or cannot be written; the loss is not finite or jumped, and
        `train.on_divergence` says stop, or there is nothing to go back to.
    """
    workdir, mesh = Path(workdir), make_mesh(config.mesh)
    optimizer = make_optimizer(config.optim, config.train.steps)
    abstract = abstract_state(config, optimizer, mesh)
    shardings = jax.tree.map(lambda a: a.sharding, abstract)
    train_step, eval_step = make_train_step(config, optimizer, shardings), make_eval_step(config, shardings)
    _claim(workdir, config)  # what the configuration cannot do was refused before
    log.info("parameters:\n%s", report(abstract.frozen | abstract.params, parameter_axes, mesh, abstract.params))

    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.train.keep, keep_best=config.train.keep_best)
    step, state = checkpoints.restore_newest(abstract) or (0, None)
    if state is None:
        state = init_state(config, optimizer, mesh, initial() if initial else None)
    else:
        log.info("resumed from step %d of %s", step, workdir)

    writer = MetricWriter(workdir, resume_step=step, wandb_project=config.train.wandb_project, run_config=dataclasses.asdict(config))
    watch, left_out, trace = Watch(config, writer, workdir, step), _LeftOut(workdir), _Trace(config, workdir)
    total, stop = config.train.steps, AnyProcess(mesh)
    with (
        jax.set_mesh(mesh), _stop_signals() as told_to_stop, contextlib.closing(checkpoints), contextlib.closing(writer),
        _Ahead(lambda step: _placed(data(left_out.index(step)), mesh), total) as ahead,
        tqdm(total=total, initial=step, unit="step", disable=not progress) as bar, trace,
    ):  # fmt: skip
        while step < total:
            batches, padding, waited = ahead.take(step)
            trace.before(step)
            with jax.transfer_guard("disallow"):  # nothing but the batch crosses to the device, and that is there
                state, metrics = train_step(state, batches)
            trace.after(step, state)
            stop.post(told_to_stop())

            done = step + 1
            evaluates = bool(eval_data and config.train.eval_every) and (done % max(config.train.eval_every, 1) == 0 or done == total)
            saves = done % config.train.save_every == 0 or done == total or stop.up()
            try:
                watch.finish_previous(bar)
                watch.started(done, metrics, waited, padding)
                if evaluates or saves:
                    watch.finish_previous(bar)  # a broken state is neither scored nor saved
            except Diverged as broken:
                step, state = _go_back(config, broken, checkpoints, abstract, left_out, names)
                ahead.forget()
                writer.go_back(step)
                watch.go_back(step)
                bar.update(step - bar.n)
                continue
            scores = None
            if evaluates and eval_data:
                scores = _evaluate(config, done, state, eval_step, eval_data, mesh, writer)
                picture = on_eval(done, state) if on_eval else None
                if picture is not None:
                    writer.image(done, "samples", picture)
            if saves:
                watch.remember(done)
                checkpoints.save(done, state, scores)
            bar.update()
            step = done
            if stop.up():
                log.warning("stopped at step %d of %d; the same command goes on from there (%s)", done, total, workdir)
                break
    return state


def _placed(batch, mesh):
    return shard_batch(batch, mesh), padding_fraction(batch)


_OF_STATE = ("name", "trainable", "lora_rank", "lora_alpha", "lora_targets", "frozen_dtype", "moment_dtype")
"""Settings of the optimizer that a state is made for; all others may change when a run goes on."""


class _Ahead:
    """Makes the next batch while a step runs."""

    def __init__(self, make: Callable[[int], tuple], total: int):
        self._make, self._total = make, total
        self._pool = ThreadPoolExecutor(1)
        self._next: tuple[int, Future] | None = None

    def take(self, step: int) -> tuple[Any, float, float]:
        """(batch, its padding, seconds waited for it); starts to make the one after it."""
        start = time.perf_counter()
        future = self._next[1] if self._next and self._next[0] == step else self._pool.submit(self._make, step)
        batch, padding = future.result()
        waited = time.perf_counter() - start
        self._next = (step + 1, self._pool.submit(self._make, step + 1)) if step + 1 < self._total else None
        return batch, padding, waited

    def forget(self) -> None:
        """The batch that is being made is not wanted any more."""
        self._next = None

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown()


class _LeftOut:
    """Rows that a run went around after it broke: WORKDIR/left_out.json, so that a resumed run does the same."""

    def __init__(self, workdir: Path):
        self._path = workdir / "left_out.json"
        self.spans: list[dict[str, int]] = []
        self._out: list[int] = []
        for span in json.loads(self._path.read_text()) if self._path.exists() else []:
            self._note(span["from"], span["steps"])

    def index(self, step: int) -> int:
        """Which rows step `step` trains on: those of its number among what is not left out."""
        for left_out in self._out:
            if left_out > step:
                break
            step += 1
        return step

    def _note(self, first: int, steps: int) -> None:
        self._out = sorted([*self._out, *map(self.index, range(first, first + steps))])
        self.spans.append({"from": first, "steps": steps})

    def add(self, first: int, steps: int) -> None:
        """From step `first` on, the next `steps` steps' rows are left out."""
        self._note(first, steps)
        if jax.process_index() == 0:
            with atomic_path(self._path) as temporary:
                temporary.write_text(json.dumps(self.spans))


def _go_back(config: Config, broken: Diverged, checkpoints: Checkpoints, abstract, left_out: _LeftOut, names) -> tuple[int, TrainState]:
    """The newest checkpoint, with the rows from there to the broken step left out; or the end of the run."""
    rows = names(left_out.index(broken.step - 1)) if names else []
    told = f"{broken}" + (f"; its rows: {', '.join(rows[:8])}{', ...' if len(rows) > 8 else ''}" if rows else "")
    if config.train.on_divergence == "stop":
        raise UserError(f"{told}. The run has diverged, and nothing after the last checkpoint was saved; lower --optim.learning-rate, "
                        "lengthen --optim.warmup-steps, or leave such rows out with --train.on-divergence roll-back")  # fmt: skip
    if len(left_out.spans) == MAX_ROLLBACKS:
        raise UserError(f"{told}. Rolled back {MAX_ROLLBACKS} times already; lower --optim.learning-rate")
    checkpoints.wait()
    found = checkpoints.restore_newest(abstract)
    if found is None:
        raise UserError(f"{told}. There is no checkpoint to go back to; lower --optim.learning-rate or --train.save-every")
    step, state = found
    left_out.add(step, broken.step - step)
    log.warning("%s; back to step %d, leaving out the rows of %d steps", told, step, broken.step - step)
    return step, state


class _Trace:
    """Writes a profile of the steps `train.profile` into WORKDIR/profile."""

    def __init__(self, config: Config, workdir: Path):
        self._first, self._last = config.train.profile or (0, 0)
        self._folder, self._on = workdir / "profile", False

    def before(self, step: int) -> None:
        if step + 1 == self._first and not self._on:  # a run that went back comes by again
            jax.profiler.start_trace(str(self._folder))
            self._on = True

    def after(self, step: int, state: TrainState) -> None:
        if self._on and step + 1 >= self._last:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._on = False
        log.info("profile written to %s", self._folder)

    def __enter__(self) -> _Trace:
        return self

    def __exit__(self, *_) -> None:
        if self._on:
            self._stop()


def _evaluate(config, step, state, eval_step, eval_data, mesh, writer) -> dict[str, float]:
    parts = [jax.device_get(eval_step(state, shard_batch(eval_data(i), mesh))) for i in range(config.train.eval_batches)]
    sums = jax.tree.map(lambda *of_batches: np.sum(of_batches, dtype=np.float64), *parts)
    mean = {f"eval/{name}": float(value) for name, value in means(config, sums).items() if name != "tokens"}
    writer.scalars(step, mean)
    log.info("step %d: held-out loss %.3f, accuracy %.3f", step, mean["eval/loss"], mean["eval/accuracy"])
    return mean


def _claim(workdir: Path, config: Config) -> None:
    """Writes config.json, or checks that a state of the run that is there is one of this configuration."""
    path, saved = workdir / "config.json", workdir / "checkpoints"
    # A start that was refused, by the starting weights say, has left no state.
    if path.exists() and saved.is_dir() and any(found.name.isdigit() for found in saved.iterdir()):
        before = load_json(Config, path)
        if before.model != config.model:
            raise UserError(f"{workdir} holds a run with other model settings; use another --workdir, or its own config.json")
        for field in dataclasses.fields(config.optim):
            then, now = (getattr(c.optim, field.name) for c in (before, config))
            if then == now:
                continue
            if field.name in _OF_STATE or (field.name == "ema_decay" and 0 in (then, now)):
                other = f"other optim settings ({field.name} {then}, not {now})"
                raise UserError(f"{workdir} holds a run with {other}; use another --workdir, or its own config.json")
            log.warning("optim.%s is %s from here on, and was %s", field.name, now, then)
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                temporary.write_text(to_json(config))
        except OSError as e:
            raise UserError(f"{workdir}: cannot write: {e.strerror}; choose another --workdir") from None


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or Ctrl-C came; they no longer end the process. A second Ctrl-C does."""
    told: list[int] = []

    def handler(number, frame):
        if told and number == signal.SIGINT:
            raise KeyboardInterrupt
        told.append(number)

    try:
        before = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: nobody sends it signals
        yield lambda: False
        return
    try:
        yield lambda: bool(told)
    finally:
        for number, old in before.items():
            signal.signal(number, old)
