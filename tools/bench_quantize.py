"""What int8 weights and an int8 cache cost in quality, and save in bytes, beside float32 and bfloat16.

    python tools/bench_quantize.py --model DIR --store DIR        # a model and a token store that it can read

Each precision compiles examples and reads held-out queries and their true output images through the cache, as drawing does. Told are, for
the laws of the image codes over all codes:

    kl            mean KL(float32 || this), nats a token
    top1          share of tokens whose likeliest code is float32's
    loss          mean -log p of the true code, nats a token, and loss_change: minus float32's
    weight_bytes  of the decoder; cache_bytes of one image with its prompt and one example
    tokens_a_second  of drawing a batch one token at a time, image tokenizer left out, the fastest of --repeats, in turns

Tokens a second are of this machine: a CPU widens every int8 weight in memory before it multiplies, and many emulate bfloat16, so there is
nothing to gain on one. Writes benchmarks/results/quantize.json.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from xprompt_jax import XPrompt
from xprompt_jax.config import ComputeConfig
from xprompt_jax.data.store import Store
from xprompt_jax.data.table import Pair
from xprompt_jax.errors import UserError
from xprompt_jax.model.chameleon import extend, project_logits
from xprompt_jax.sample.draw import draw
from xprompt_jax.sample.logits import Sampling
from xprompt_jax.sample.prefill import prefill

# (compute, weights, cache); the first is what the others are held against.
PRECISIONS = [
    (compute, weights, cache) for compute in ("float32", "bfloat16") for weights in ("float", "int8") for cache in ("float", "int8")
]


def main() -> None:
    """Parses the flags, measures, writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a trained model folder")
    parser.add_argument("--store", type=Path, required=True, help="a token store of its image tokenizer, with held-out pairs")
    parser.add_argument("--queries", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8, help="images drawn at once for the speed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quantize.json"))
    args = parser.parse_args()

    models = {
        "{} compute, {} weights, {} cache".format(*p): XPrompt.from_pretrained(
            args.model, compute=ComputeConfig(dtype=p[0]), weights=p[1], cache=p[2]
        )
        for p in PRECISIONS
    }
    store = Store.open(args.store, vqgan=next(iter(models.values())).vqgan)
    episodes = held_out(store, args.queries)
    table: dict[str, dict] = {}
    reference = None
    for name, model in models.items():
        laws, targets, cache_bytes = read_held_out(model, store, episodes)
        reference = laws if reference is None else reference
        taken = np.take_along_axis(laws, targets[..., None], axis=-1)
        table[name] = {
            "kl": float(np.mean(np.sum(np.exp(reference) * (reference - laws), axis=-1))),
            "top1": float(np.mean(laws.argmax(-1) == reference.argmax(-1))),
            "loss": float(-taken.mean()),
            "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.layers_apart)),
            "cache_bytes": cache_bytes,
        }
        table[name]["loss_change"] = table[name]["loss"] - next(iter(table.values()))["loss"]
        print(name, json.dumps(table[name]), flush=True)
    for name, speed in measure_speed(models, store, episodes[: args.batch], args.repeats).items():
        table[name]["tokens_a_second"] = round(speed, 1)
    result = {
        "benchmark": "quantize",
        "table": {name: {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()} for name, row in table.items()},
        "model": {"config": json.loads((args.model / "config.json").read_text()), "fingerprint": next(iter(models.values())).fingerprint},
        "queries": len(episodes),
        "tokens": int(targets.size),
        "batch": args.batch,
        "device": jax.devices()[0].device_kind,
        "cpus_allowed": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("jax", "flax")},
        "command": shlex.join(["python", *sys.argv]),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["table"], indent=1))
    print(args.out)


def held_out(store: Store, count: int) -> list[tuple[Pair, Pair]]:
    """Queries that no training saw, spread over all of them, each with an example: the next held-out pair of its group."""
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in store.pairs:
        if pair.split != "train":
            groups[pair.group].append(pair)
    episodes = [(pairs[i - 1], pair) for pairs in groups.values() if len(pairs) > 1 for i, pair in enumerate(pairs)]
    if not episodes:
        raise UserError("the store has no held-out group of two pairs; tokenize with an evaluation split")
    return [episodes[i] for i in np.unique(np.linspace(0, len(episodes) - 1, count).astype(int))]


def prompts_of(model: XPrompt, store: Store, episodes: list[tuple[Pair, Pair]]):
    """Compiled examples and task tokens."""
    p = model.prompter
    examples = [p.example(e.instruction, store.codes[e.input], store.codes[e.output]) for e, _ in episodes]
    contexts = [model._compile_tokens([example]) for example in examples]
    return contexts, [p.task(q.instruction, store.codes[q.input]) for _, q in episodes]


def read_held_out(model: XPrompt, store: Store, episodes: list[tuple[Pair, Pair]], rows: int = 16):
    """float32 [tokens, codes] log laws of the image codes, int32 [tokens] true codes, and bytes of one image's cache."""
    vocab, layout = model.tokenizer.vocab, model.prompter.layout
    contexts, prompts = prompts_of(model, store, episodes)
    answers = np.stack([layout.encode(store.codes[q.output].astype(np.int32)) for _, q in episodes])

    @jax.jit
    def look(decoder, head, cache, ids):
        x = decoder.embed[...][ids].astype(model.compute.dtype)
        h, _ = extend(decoder.blocks, x, cache, jnp.zeros_like(cache.length), model.config.rope_theta)
        return jax.nn.log_softmax(project_logits(decoder.final(h), head))

    laws = []
    for first in range(0, len(episodes), rows):
        some = [min(i, len(episodes) - 1) for i in range(first, first + rows)]
        cache = prefill(
            model.layers_apart, model.config, [contexts[i] for i in some], [prompts[i] for i in some], vocab.bos, room=answers.shape[1],
            dtype=model.compute.dtype, cache_dtype=model.cache_dtype,
        )  # fmt: skip
        laws.append(np.asarray(look(model.layers_apart, model.image_head, cache, answers[some])))
    found = np.concatenate(laws)[: len(episodes), :-1]
    codes = answers[:, 1:] - vocab.image_start
    is_code = (codes >= 0) & (codes < vocab.num_codes)
    return found[is_code], codes[is_code], sum(leaf.nbytes for leaf in jax.tree.leaves((cache.k, cache.v))) // rows


def measure_speed(models: dict[str, XPrompt], store: Store, episodes: list[tuple[Pair, Pair]], repeats: int) -> dict[str, float]:
    """Codes a second of each model, in turns, so that what else the machine does meets all of them."""
    fastest = dict.fromkeys(models, 0.0)
    for turn in range(repeats + 1):  # the first compiles
        for name, model in models.items():
            contexts, prompts = prompts_of(model, store, episodes)
            start = time.perf_counter()
            *_, codes = draw(
                model, {"full": list(zip(contexts, prompts, strict=True))}, None, {"full": 1.0}, seed=0, num_images=1,
                decoding="sequential", window=1, sampling=Sampling(), progress=False, partial=False,
            )  # fmt: skip
            if turn:
                fastest[name] = max(fastest[name], codes.size / (time.perf_counter() - start))
    return fastest


if __name__ == "__main__":
    main()
