"""A whole run from one `Config`: token store -> batches -> training -> a model folder.

The glue between data/, train/ and sample/, which do not know each other.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from xprompt_jax.checkpoint import Checkpoints
from xprompt_jax.config import Config, MeshConfig, ModelConfig, load_json
from xprompt_jax.convert.native import MODEL_FOLDER, load_tokenizers
from xprompt_jax.data.images import save_png
from xprompt_jax.data.pipeline import Rows
from xprompt_jax.data.store import Store
from xprompt_jax.errors import UserError
from xprompt_jax.files import check_place
from xprompt_jax.mesh import make_mesh, row_share
from xprompt_jax.model.chameleon import abstract_model
from xprompt_jax.model.params import flatten, unflatten
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.prompt import Prompter
from xprompt_jax.sample.arguments import check_tokenizer
from xprompt_jax.sample.pretrained import load
from xprompt_jax.sample.sampler import Example, XPrompt
from xprompt_jax.tokens import Layout, Tokenizer
from xprompt_jax.train.loop import train
from xprompt_jax.train.optim import make_optimizer, merge
from xprompt_jax.train.state import TrainState, abstract_state
from xprompt_jax.train.vqgan import CODEBOOK

log = logging.getLogger(__name__)


def check_tokenizers(config: ModelConfig, vqgan: VQGAN, tokenizer: Tokenizer, place: str | Path) -> None:
    """Refuses tokenizers, found at `place`, that a model of this configuration cannot have.

    Raises:
      UserError: another VQGAN, more words than the model knows, or another number of image words than codes.
    """
    if vqgan.config != config.vq:
        raise UserError(f"{place} was made by another VQGAN than model.vq describes; tokenize again or change the config")
    if tokenizer.vocab.size > config.vocab_size:
        raise UserError(f"model.vocab_size {config.vocab_size} is below the {tokenizer.vocab.size} words of {place}; raise it")
    check_tokenizer(tokenizer.vocab, config)


def run_training(config: Config, workdir: str | Path, *, progress: bool = True) -> XPrompt | None:
    """Trains and exports; resumes when `workdir` holds an unfinished run.

    Returns:
      The trained model, also written to `workdir`/model; None when the run was told to stop before its end.

    Raises:
      UserError: the store, the configuration and the starting weights do not belong together, or `workdir`/model is something else.
    """
    check_place(Path(workdir) / "model", *MODEL_FOLDER)
    store = Store.open(config.data.store)
    vqgan, tokenizer = load_tokenizers(Path(config.data.store) / "tokenizers")
    check_tokenizers(config.model, vqgan, tokenizer, config.data.store)
    prompter = Prompter(tokenizer, Layout(config.model.layout, tokenizer.vocab, config.model.vq.downsample))
    host = row_share(make_mesh(config.mesh))
    source = lambda split: Rows(store, prompter, config.data, config.model.num_xp_tokens, split=split, host=host)
    rows = source("train")
    held_out = None
    if config.train.eval_every > 0:
        try:
            held_out = source("eval")
        except UserError as e:  # a small store may hold out too little
            log.warning("no evaluation while training: %s", e)

    draw = None
    if config.train.samples:
        if held_out is None or config.data.mode != "xprompt":
            raise UserError("train.samples draws held-out pairs through XP tokens at every evaluation: it needs train.eval_every, "
                            "held-out pairs that fit the buckets, and data.mode xprompt; set it to 0")  # fmt: skip
        if jax.process_count() > 1:
            raise UserError("train.samples draws in runs of one process only; set --train.samples 0 and use `xprompt eval`")
        draw = _sampler(config, Path(workdir), store, lambda state: XPrompt(decoder_of(config, state), vqgan, tokenizer))
    state = train(
        config, workdir, rows, eval_data=held_out, names=rows.names, on_eval=draw, progress=progress,
        initial=(lambda: _start(config, vqgan, tokenizer)) if config.train.init_from else None,
    )  # fmt: skip
    if int(state.step) < config.train.steps:
        return None
    model = XPrompt(decoder_of(config, state), vqgan, tokenizer)
    model.save_pretrained(Path(workdir) / "model")
    log.info("model written to %s", Path(workdir) / "model")
    return model


def export_checkpoint(workdir: str | Path, out: str | Path, *, step: int | None = None) -> int:
    """Writes a checkpoint of a run, which may still be going on, as a model folder; adapters merged, the moving average where there is one.

    Needs the run's token store (for the tokenizers) and the memory of the weights, whatever the mesh of the run was.

    Args:
      step: None is the newest.

    Returns:
      The step.

    Raises:
      UserError: no run, no such checkpoint, or one that cannot be read; or `out` is something else than a model folder.
    """
    workdir, out = Path(workdir), check_place(out, *MODEL_FOLDER)
    if not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir}: no checkpoints; give the folder of a run, which has some after train.save_every steps")
    config = load_json(Config, workdir / "config.json")
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    there = checkpoints.steps()
    if not there or (step is not None and step not in there):
        raise UserError(f"{workdir}: no checkpoint {'' if step is None else step}; there are {there}".replace("  ", " "))
    chosen = there[-1] if step is None else step
    mesh = make_mesh(MeshConfig())
    abstract = abstract_state(config, make_optimizer(config.optim, config.train.steps), mesh)
    parts = checkpoints.restore_part(chosen, {name: getattr(abstract, name) for name in ("params", "frozen", "ema")})
    vqgan, tokenizer = load_tokenizers(Path(config.data.store) / "tokenizers")
    decoder = unflatten(abstract_model(config.model), merge(parts["ema"] or parts["params"], parts["frozen"]))
    XPrompt(decoder, vqgan, tokenizer).save_pretrained(out)
    return chosen


def _start(config: Config, vqgan: VQGAN, tokenizer: Tokenizer) -> dict[str, jax.Array]:
    """The weights of `train.init_from`, on the run's mesh; the run's model gets the store's tokenizers, and is told where those differ."""
    name, store = config.train.init_from or "", config.data.store
    start = load(name, dtype=jnp.float32, mesh=make_mesh(config.mesh), num_xp_tokens=config.model.num_xp_tokens)
    if dataclasses.replace(start.config, layout=config.model.layout) != config.model:
        raise UserError(f"{name} has another architecture than `model` in the config; use its config.json's values")
    if start.config.layout != config.model.layout:
        log.warning("%s frames images as %s, this run as %s (--model.layout)", name, start.config.layout, config.model.layout)
    if start.tokenizer.words() != tokenizer.words():
        log.warning("%s was taught with another text tokenizer than %s has: its words mean something else here; tokenize again with "
                    "--model %s", name, store, name)  # fmt: skip
    known, used = (np.asarray(flatten(v)[CODEBOOK]) for v in (start.vqgan, vqgan))
    if not np.allclose(known, used, rtol=1e-2, atol=1e-3):
        log.warning("%s was taught with another image tokenizer than made %s: its codes mean something else here; tokenize again with "
                    "--model %s", name, store, name)  # fmt: skip
    return flatten(start.decoder)


def _sampler(config: Config, workdir: Path, store: Store, model_of: Callable[[TrainState], XPrompt]):
    """Draws the same few held-out pairs after every evaluation: rows of example, input, drawn, target as one picture."""
    pairs, rows = store.pairs, list[tuple[int, int, int]]()
    waiting, count = dict[int, int](), Counter[int]()
    held_out = np.isin(pairs.split.codes, [i for i, name in enumerate(pairs.split.names) if name == "eval"])
    for number in np.flatnonzero(held_out & (pairs.num_tokens["instruction"] > 0) & ~pairs.has_more):
        group = int(pairs.group.codes[number])
        if group not in waiting:
            waiting[group] = int(number)
        elif count[group] < config.train.samples:
            rows.append((count[group], waiting.pop(group), int(number)))
            count[group] += 1
        if len(count) == config.train.samples:
            break
    chosen = [(pairs[example], pairs[query]) for _, example, query in sorted(rows)[: config.train.samples]]  # a row of each group first
    if not chosen:
        raise UserError(f"train.samples: no group of {config.data.store} has two held-out pairs, an example and a query; set it to 0")
    code = lambda number: store.codes[number].astype(np.int32)

    def draw(step: int, state: TrainState) -> np.ndarray:
        model = model_of(state)
        tasks = [model.compile([Example(code(e.input), code(e.output), e.instruction)]) for e, _ in chosen]
        drawn = model.generate(tasks, [code(query.input) for _, query in chosen], seed=config.train.seed)
        strips = []
        for (example, query), image in zip(chosen, drawn, strict=True):
            shown = [np.asarray(p) for p in model.decode_images(np.stack([code(example.input), code(example.output), code(query.input)]))]
            target = np.asarray(model.decode_images(code(query.output)[None])[0])
            strips.append(np.concatenate([*shown, np.asarray(image), target], axis=1))
        picture = np.concatenate(strips)
        save_png(picture, workdir / "samples" / f"{step:07d}.png")
        return picture

    return draw


def decoder_of(config: Config, state: TrainState):
    """The decoder of a training state: the moving average where there is one."""
    return unflatten(abstract_model(config.model), merge(state.ema or state.params, state.frozen))
