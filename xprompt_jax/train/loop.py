"""The training loop, to be read top to bottom.

    mesh -> state (new, or the newest checkpoint) -> for each step: batch, step, metrics of the step before, save

Batches are a function of the step, so resuming is a seek. Metrics are read one step late, so the device never waits for
the host. SIGTERM and Ctrl-C finish the step, save and leave; the same command goes on from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from xprompt_jax.checkpoint import Checkpoints
from xprompt_jax.config import Config, load_json, to_json
from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path
from xprompt_jax.mesh import AnyProcess, make_mesh, report, shard_batch
from xprompt_jax.model.chameleon import abstract_model
from xprompt_jax.model.params import flatten, logical_axes
from xprompt_jax.train.metrics import MetricWriter, peak_flops, step_flops
from xprompt_jax.train.optim import Params, make_optimizer, split_trainable
from xprompt_jax.train.state import TrainState, abstract_state, init_state
from xprompt_jax.train.step import make_eval_step, make_train_step

log = logging.getLogger(__name__)

BatchSource = Callable[[int], Mapping[str, Mapping[str, np.ndarray]]]
"""Step -> this host's rows of every bucket."""


def train(
    config: Config, workdir: str | Path, data: BatchSource, *, eval_data: BatchSource | None = None,
    initial: Params | None = None, on_eval: Callable[[int, TrainState], None] | None = None, progress: bool = True,
) -> TrainState:  # fmt: skip
    """Trains until `config.train.steps`, from the newest checkpoint in `workdir` if there is one.

    Args:
      config: the run.
      workdir: gets config.json, metrics.jsonl, tensorboard/ and checkpoints/.
      data: training rows by step.
      eval_data: held-out rows by batch number.
      initial: decoder parameters to start from; None draws random ones. Not used when a checkpoint is there.
      on_eval: called after each evaluation, for pictures.

    Returns:
      The last state. If the run was told to stop, its `step` is below `config.train.steps`.

    Raises:
      UserError: the folder holds a run of another model, or cannot be written; the loss is not finite or jumped.
    """
    workdir = Path(workdir)
    _claim(workdir, config)
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config.optim, config.train.steps)
    model = flatten(abstract_model(config.model))
    trainable, _ = jax.eval_shape(lambda p: split_trainable(p, config), model)
    log.info("parameters:\n%s", report(model, logical_axes, mesh, {name.removesuffix(".image") for name in trainable}))

    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.train.keep)
    abstract = abstract_state(config, optimizer, mesh)
    start, state = checkpoints.restore_newest(abstract) or (0, None)
    if state is None:
        state = init_state(config, optimizer, mesh, initial)
    else:
        log.info("resumed from step %d of %s", start, workdir)

    writer = MetricWriter(workdir, resume_step=start, wandb_project=config.train.wandb_project, run_config=dataclasses.asdict(config))
    train_step = make_train_step(config, optimizer, jax.tree.map(lambda a: a.sharding, abstract))
    eval_step = make_eval_step(config)
    watch = _Watch(config, writer)
    stop = AnyProcess(mesh)
    with (
        jax.set_mesh(mesh), _stop_signals() as told_to_stop, contextlib.closing(checkpoints), contextlib.closing(writer),
        ThreadPoolExecutor(1) as ahead, tqdm(total=config.train.steps, initial=start, unit="step", disable=not progress) as bar,
    ):  # fmt: skip
        fetch = lambda step: shard_batch(data(step), mesh)
        upcoming = ahead.submit(fetch, start)
        for step in range(start, config.train.steps):
            waited = time.perf_counter()
            batches = upcoming.result()
            waited = time.perf_counter() - waited
            if step + 1 < config.train.steps:
                upcoming = ahead.submit(fetch, step + 1)

            with jax.transfer_guard("disallow"):  # nothing but the batch crosses to the device, and that is there
                state, metrics = train_step(state, batches)
            stop.post(told_to_stop())

            watch.finish_previous(bar)
            watch.started(step + 1, metrics, waited)
            done = step + 1
            if eval_data and config.train.eval_every and (done % config.train.eval_every == 0 or done == config.train.steps):
                watch.finish_previous(bar)
                _evaluate(config, done, state, eval_step, eval_data, mesh, writer)
                if on_eval:
                    on_eval(done, state)
            if done % config.train.save_every == 0 or done == config.train.steps or stop.up():
                watch.finish_previous(bar)  # a loss that is not finite must not be saved
                checkpoints.save(done, state)
            bar.update()
            if stop.up():
                log.warning("stopped at step %d of %d; the same command goes on from there (%s)", done, config.train.steps, workdir)
                break
        watch.finish_previous(bar)
    return state


class _Watch:
    """Reads each step's metrics when the next one is already running; writes them; stops a run that broke."""

    def __init__(self, config: Config, writer: MetricWriter):
        self.config, self.writer = config, writer
        self.flops, self.peak = step_flops(config), peak_flops()
        self.pending: tuple | None = None
        self.mean_loss: float | None = None
        self.time, self.steps, self.waited, self.tokens = time.perf_counter(), 0, 0.0, 0.0

    def started(self, step: int, metrics: Mapping[str, jax.Array], waited: float) -> None:
        self.pending = step, metrics, waited

    def finish_previous(self, bar: tqdm) -> None:
        if self.pending is None:
            return
        step, metrics, waited = self.pending
        self.pending = None
        values = {name: float(v) for name, v in jax.device_get(dict(metrics)).items()}
        self._check(step, values)
        self.steps, self.waited, self.tokens = self.steps + 1, self.waited + waited, self.tokens + values["tokens"]
        bar.set_postfix(loss=f"{values['loss']:.3f}", refresh=False)
        if step % self.config.train.log_every and step not in (1, self.config.train.steps):
            return
        now = time.perf_counter()
        seconds = (now - self.time) / self.steps
        values |= {
            "seconds_per_step": seconds,
            "answer_tokens_per_second": self.tokens / (now - self.time),
            "data_wait": self.waited / (now - self.time),
        }
        memory = jax.local_devices()[0].memory_stats() or {}  # a CPU has none
        if "peak_bytes_in_use" in memory:
            values["peak_device_gib"] = memory["peak_bytes_in_use"] / 2**30
        if self.peak:
            values["mfu"] = self.flops / seconds / (self.peak * jax.device_count())
        self.writer.scalars(step, values)
        self.time, self.steps, self.waited, self.tokens = now, 0, 0.0, 0.0

    def _check(self, step: int, values: Mapping[str, float]) -> None:
        loss, factor = values["loss"], self.config.train.spike_factor
        if not math.isfinite(loss) or not math.isfinite(values["grad_norm"]):
            raise UserError(f"step {step}: loss {loss}, gradient norm {values['grad_norm']}: the run has diverged and nothing after the "
                            "last checkpoint was saved; lower --optim.learning-rate or lengthen --optim.warmup-steps")  # fmt: skip
        if factor and self.mean_loss is not None and loss > factor * self.mean_loss:
            raise UserError(f"step {step}: loss {loss:.3f} is more than {factor} times its running mean {self.mean_loss:.3f}; look at "
                            "the rows of this step, or raise --train.spike-factor")  # fmt: skip
        self.mean_loss = loss if self.mean_loss is None else 0.95 * self.mean_loss + 0.05 * loss


def _evaluate(config, step, state, eval_step, eval_data, mesh, writer) -> None:
    results = [jax.device_get(eval_step(state, shard_batch(eval_data(i), mesh))) for i in range(config.train.eval_batches)]
    weights = np.array([r["tokens"] for r in results])
    mean = {f"eval/{n}": float(np.average([r[n] for r in results], weights=weights)) for n in results[0] if n != "tokens"}
    writer.scalars(step, mean)
    log.info("step %d: held-out loss %.3f, accuracy %.3f", step, mean["eval/loss"], mean["eval/accuracy"])


def _claim(workdir: Path, config: Config) -> None:
    """Writes config.json, or checks that the run that is there has the same model and data."""
    path = workdir / "config.json"
    if path.exists():
        before = load_json(Config, path)
        for part in ("model", "optim"):
            if getattr(before, part) != getattr(config, part):
                raise UserError(f"{workdir} holds a run with other {part} settings; use another --workdir, or its own config.json")
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
