"""A whole run from one `Config`: token store -> batches -> training -> a model folder.

The glue between data/, train/ and sample/, which do not know each other.
"""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import jax.numpy as jnp

from xprompt_jax.config import Config
from xprompt_jax.convert.native import load_tokenizers
from xprompt_jax.data.pipeline import batches
from xprompt_jax.data.tokenise import Store
from xprompt_jax.errors import UserError
from xprompt_jax.model.chameleon import abstract_model
from xprompt_jax.model.params import flatten, unflatten
from xprompt_jax.prompt import Prompter
from xprompt_jax.sample.pretrained import load
from xprompt_jax.sample.sampler import XPrompt
from xprompt_jax.tokens import Layout
from xprompt_jax.train.loop import train
from xprompt_jax.train.optim import merge
from xprompt_jax.train.state import TrainState

log = logging.getLogger(__name__)


def run_training(config: Config, workdir: str | Path, *, progress: bool = True) -> XPrompt | None:
    """Trains and exports; resumes when `workdir` holds an unfinished run.

    Returns:
      The trained model, also written to `workdir`/model; None when the run was told to stop before its end.

    Raises:
      UserError: the store, the configuration and the starting weights do not belong together.
    """
    store = Store.open(config.data.store)
    vqgan, tokenizer = load_tokenizers(Path(config.data.store) / "tokenizers")
    if vqgan.config != config.model.vq:
        raise UserError(f"{config.data.store} was made by another VQGAN than model.vq describes; tokenize again or change the config")
    if tokenizer.vocab.size > config.model.vocab_size:
        raise UserError(f"model.vocab_size {config.model.vocab_size} is below the tokenizer's {tokenizer.vocab.size} words; raise it")
    prompter = Prompter(tokenizer, Layout(config.model.layout, tokenizer.vocab, config.model.vq.downsample))
    host = jax.process_index(), jax.process_count()
    source = lambda split: batches(store, prompter, config.data, config.model.num_xp_tokens, split=split, host=host)
    held_out = any(pair.split == "eval" for pair in store.pairs) and config.train.eval_every > 0

    initial = None
    if config.train.init_from and not (Path(workdir) / "checkpoints").exists():
        start = load(config.train.init_from, dtype=jnp.float32, num_xp_tokens=config.model.num_xp_tokens)
        if start.config != config.model:
            raise UserError(f"{config.train.init_from} has another architecture than `model` in the config; use its config.json's values")
        initial = flatten(start.decoder)
    state = train(config, workdir, source("train"), eval_data=source("eval") if held_out else None, initial=initial, progress=progress)
    if int(state.step) < config.train.steps:
        return None
    model = XPrompt(decoder_of(config, state), vqgan, tokenizer)
    model.save_pretrained(Path(workdir) / "model")
    log.info("model written to %s", Path(workdir) / "model")
    return model


def decoder_of(config: Config, state: TrainState):
    """The decoder of a training state: the moving average where there is one."""
    return unflatten(abstract_model(config.model), merge(state.ema or state.params, state.frozen))
