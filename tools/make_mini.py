"""Makes the small model: the one command that its card names.

    python tools/make_mini.py --config configs/mini_cpu.py --out runs/mini_cpu

    scenes and free photographs -> VQGAN and BPE tokenizer of its own -> token store -> training -> OUT/run/model

Every setting of the configuration is a flag, as for `xprompt train` (--train.steps 300 --data.mode causal). Each stage leaves its
folder in OUT, and a second call goes on from there; training itself resumes from its checkpoints. The data are
`xprompt_jax/data/levels.py`: nothing that the benchmark asks is among them, unless --full asks for the arm that has seen everything.
Rendered scenes are ours; the photographs are the public-domain and CC0 ones inside scikit-image's wheel.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _bench import at_least

from xprompt_jax.commands.train import load_config
from xprompt_jax.config import Config, ModelConfig
from xprompt_jax.convert.formats import open_source
from xprompt_jax.convert.native import load_tokenizers, save_tokenizers
from xprompt_jax.convert.weights import load_vqgan, tokenizer_of
from xprompt_jax.data.free import free_photographs
from xprompt_jax.data.levels import training_pairs
from xprompt_jax.data.pipeline import GENERIC_INSTRUCTIONS
from xprompt_jax.data.sources import Record
from xprompt_jax.data.tokenise import tokenize
from xprompt_jax.errors import UserError
from xprompt_jax.model.chameleon import Chameleon, abstract_model
from xprompt_jax.model.params import flatten, unflatten
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.prompt import DESCRIBE_QUESTION
from xprompt_jax.runner import check_tokenizers, run_training
from xprompt_jax.sample.sampler import XPrompt
from xprompt_jax.tokens import IMAGE_START, Tokenizer, train_tokenizer
from xprompt_jax.train.vqgan import train_vqgan

log = logging.getLogger("make_mini")

EVAL_GROUPS = 4
"""At least so many groups are set aside; a hundredth, where that is more."""


def main() -> None:
    """Parses the flags and runs the stages that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, default=Path("configs/mini_cpu.py"))
    parser.add_argument("--out", type=Path, default=Path("runs/mini_cpu"))
    parser.add_argument(
        "--groups", type=at_least(1 + EVAL_GROUPS), default=7000, help="draws of a sub-task's parameters; a few are not trained on"
    )
    parser.add_argument("--pairs-per-group", type=at_least(2), default=4, help="an example and tasks")
    parser.add_argument("--vq-steps", type=at_least(1), default=1600)
    parser.add_argument("--vq-batch", type=at_least(1), default=16)
    parser.add_argument("--tasks", nargs="+", help="sub-tasks to train on, of those of xprompt_jax/data/tasks.py; all without it")
    parser.add_argument("--full", action="store_true", help="hold nothing out: the benchmark's arm of full training")
    parser.add_argument("--tokenizers", help="folder of finished tokenizers, or a model that has them; those of train.init_from otherwise")
    parser.add_argument("--run", default="run", help="name of the training's folder in OUT")
    parser.add_argument("--plain-start", action="store_true", help="random code embeddings, in place of the codebook's")
    args, settings = parser.parse_known_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    config = load_config(args.config)
    store = args.out / "tokens"
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, store=str(store)))
    if args.full:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, holdouts=()))
    config = tyro.cli(Config, default=config, args=settings)

    if not store.exists():
        make_store(args, config, store)
    if not config.train.init_from:
        start = args.out / ("start_plain" if args.plain_start else "start") / f"{config.train.seed}_{config.model.num_xp_tokens}"
        if not start.exists():
            vqgan, tokenizer = load_tokenizers(store / "tokenizers")
            check_tokenizers(config.model, vqgan, tokenizer, store)
            decoder = Chameleon(config.model, jax.random.key(config.train.seed))
            if not args.plain_start:
                decoder = know_colours(decoder, np.asarray(flatten(vqgan)["quantize.embedding.weight"]), config.train.seed)
            XPrompt(decoder, vqgan, tokenizer).save_pretrained(start)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(start)))
    elif open_source(config.train.init_from).config.num_xp_tokens < config.model.num_xp_tokens:
        known = XPrompt.from_pretrained(config.train.init_from, dtype=jnp.float32)
        start = args.out / "start" / f"{known.fingerprint}_{config.train.seed}_{config.model.num_xp_tokens}"
        if not start.exists():
            XPrompt(more_xp(known.decoder, config.model, config.train.seed), known.vqgan, known.tokenizer).save_pretrained(start)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(start)))
    clock = time.perf_counter()
    run_training(config, args.out / args.run)
    log.info("training took %.0f s", time.perf_counter() - clock)


def make_store(args: argparse.Namespace, config: Config, store: Path) -> None:
    """Renders, trains the tokenizers unless they are given, and tokenises."""
    size = config.model.vq.image_size
    began = time.perf_counter()
    known = args.tokenizers or config.train.init_from
    ready = None
    if known:  # what is wrong is told before the work
        ready = tokenizers_of(known)
        check_tokenizers(config.model, *ready, known)
    photos = free_photographs(size)
    records = list(training_pairs(
        groups=args.groups, pairs_per_group=args.pairs_per_group, size=size, seed=config.data.seed, photos=photos, tasks=args.tasks,
        full=args.full,
    ))  # fmt: skip
    # The last hundredth of the groups shows while training whether it goes well; the benchmark asks other pairs.
    last = {r.group for r in records[-max(len(records) // 100, EVAL_GROUPS * args.pairs_per_group) :]}
    records = [dataclasses.replace(r, split="eval" if r.group in last else "train") for r in records]
    log.info("%d pairs in %.0f s", len(records), time.perf_counter() - began)
    tokenizers = args.out / "tokenizers"
    if not ready and not tokenizers.exists():
        training = [r for r in records if r.split == "train"]
        rng = np.random.default_rng(config.data.seed)
        chosen = [training[i] for i in rng.permutation(len(training))[:12_000]]
        images = np.stack([image for r in chosen for image in (r.input, r.output)])
        vqgan = train_vqgan(
            config.model.vq, images, steps=args.vq_steps, batch=args.vq_batch, learning_rate=3e-3, seed=config.train.seed
        )  # fmt: skip
        tokenizer = train_tokenizer(texts(training), num_codes=config.model.vq.num_codes, vocab_size=config.model.vocab_size)
        save_tokenizers(tokenizers, vqgan, tokenizer)
    vqgan, tokenizer = ready or load_tokenizers(tokenizers)
    tokenize(records, vqgan, tokenizer, store, total=len(records))
    log.info("store made in %.0f s", time.perf_counter() - began)


def tokenizers_of(place: str) -> tuple[VQGAN, Tokenizer]:
    """Those of a folder that `save_tokenizers` wrote, or of any model that `from_pretrained` reads."""
    if (Path(place) / "vqgan.json").exists():
        return load_tokenizers(place)
    source = open_source(place)
    return load_vqgan(source), tokenizer_of(source)


def know_colours(decoder: Chameleon, codebook: np.ndarray, seed: int) -> Chameleon:
    """Code words and head columns start as random projections of the codebook: like codes start alike.

    Args:
      codebook: float [num_codes, C] of the VQGAN.
    """
    params, key = flatten(decoder), jax.random.key(seed)
    white = (codebook - codebook.mean(0)) / codebook.std(0)
    rows = slice(IMAGE_START, IMAGE_START + len(codebook))

    def project(key: jax.Array, like: jax.Array) -> jax.Array:
        """[num_codes, D] of the standard deviation of `like`."""
        mixed = jnp.asarray(white) @ jax.random.normal(key, (white.shape[1], like.shape[1]))
        return mixed * (jnp.std(like) / jnp.std(mixed))

    keys = jax.random.split(key)
    params["embed"] = params["embed"].at[rows].set(project(keys[0], params["embed"][rows]))
    params["head"] = params["head"].at[:, rows].set(project(keys[1], params["head"][:, rows].T).T)
    return unflatten(decoder, params)


def more_xp(decoder: Chameleon, config: ModelConfig, seed: int) -> Chameleon:
    """Its XP tokens again and again until there are as many as `config` asks: they start as what is known to carry a task.

    Rows that say the same stand at places of their own; noise of a tenth of their spread besides lets them part.
    """
    params = flatten(decoder)
    xp = params["xp"]
    again = jnp.tile(xp, (-(-config.num_xp_tokens // len(xp)), 1))[: config.num_xp_tokens]
    noise = 0.1 * jnp.std(xp) * jax.random.normal(jax.random.key(seed), again.shape, xp.dtype)
    params["xp"] = again + noise.at[: len(xp)].set(0.0)
    return unflatten(abstract_model(config), params)


def texts(records: list[Record]):
    """All words that the model meets."""
    yield from GENERIC_INSTRUCTIONS
    yield DESCRIBE_QUESTION
    for r in records:
        yield from (r.instruction, r.reverse_instruction, r.description, r.reverse_description, r.caption)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"make_mini: {e}", file=sys.stderr)
        sys.exit(2)
