"""How close drawing comes to what the device's memory allows, and what compiled prompts, int8 and windows are worth there.

    python tools/bench_decode.py                                       # an H200, say: the 7B's shape in bfloat16, beside Hugging Face
    python tools/bench_decode.py --layers 2 --codes 32 --batches 1     # its first two layers alone: a CPU can do that

Random weights of the shape, made on the device; one example pair, guidance of two rows (without and with the example and its instruction).
One pass reads every weight, but of the head only the columns of the image codes, and the keys and values of every row so far:

    floor of a pass = (bytes of the weights + filled slots of all rows x bytes of a slot) / bandwidth

Bandwidth is what the device reaches here in reading an array, the best of a sum, a product with a vector and a copy, or what --bandwidth
says. A line for each precision (weights, cache), each batch, with the example kept in its context or compiled, and each window; windows
above 1 tell what a pass costs, as random weights cannot tell how many codes it yields: it pays from `break_even` codes a pass on.
Hugging Face's `generate` has the example in its context and random weights of its own in the same shape and type.

Every precision and contender runs in a process of its own; seconds are the fastest of --repeats, compiled before, image tokenizer left
out. Writes benchmarks/results/decode_<device>.json.
"""

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path

import numpy as np
from _bench import at_least, fastest, run_alone, save
from _huggingface import compile_options, guided_draw

from xprompt_jax.config import PRESETS, ModelConfig

INSTRUCTION, SCALE = "remove the rain", 2.0
PRECISIONS = ("float/float", "float/int8", "int8/float", "int8/int8")
THEIRS = ("eager", "compiled")
SHARE_GOAL, COMPILED_GOAL = 0.8, 1.6


def main() -> None:
    """Parses the flags; runs the contenders, or (with --one) is one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(PRESETS), default="7b")
    parser.add_argument("--layers", type=at_least(1), help="fewer than the model has, where memory or time does not suffice")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--batches", type=at_least(1), nargs="+", default=[1, 16])
    parser.add_argument("--windows", type=at_least(1), nargs="+", default=[8, 16, 32], help="besides one code a pass")
    parser.add_argument("--codes", type=at_least(1), help="of each image that are drawn; all of them if not given")
    parser.add_argument("--precisions", nargs="*", choices=PRECISIONS, default=list(PRECISIONS), help="weights/cache")
    parser.add_argument("--theirs", nargs="*", choices=THEIRS, default=list(THEIRS))
    parser.add_argument("--bandwidth", type=float, help="of the device's memory, GB/s, in place of what is measured")
    parser.add_argument("--repeats", type=at_least(1), default=2)
    parser.add_argument("--one", choices=(*PRECISIONS, *THEIRS, "bandwidth"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if args.bandwidth is not None and not 0 < args.bandwidth < float("inf"):
        parser.error(f"--bandwidth {args.bandwidth}: give GB/s above 0")
    if args.one:
        print(json.dumps(one(args)))
        return

    shape = ["--model", args.model, *(["--layers", args.layers] if args.layers else []), *(["--dtype", args.dtype] if args.dtype else [])]
    work = ["--repeats", args.repeats, *(["--codes", args.codes] if args.codes else []), "--batches", *args.batches]
    work += ["--windows", *args.windows]
    alone = lambda name: run_alone("--one", name, *shape, *work)
    device = alone("bandwidth")
    if "failed" in device:
        parser.error(f"the device cannot be measured: {device['failed']}")
    bandwidth = args.bandwidth or max(device["gb_per_second"].values())
    lines, failed = [], {}
    for name in (*args.precisions, *args.theirs):
        found = alone(name)
        if "failed" in found:
            failed[name] = found["failed"]
        lines += [with_floor(line, bandwidth) for line in found.get("lines", [])]
        print(json.dumps(failed.get(name) or lines[-len(found["lines"]) :], indent=1), flush=True)
    told = compare(lines)
    print(json.dumps(told, indent=1))
    save(args.out / f"decode_{device['platform']}.json", {
        "benchmark": "decode", "model": args.model, "layers": args.layers or PRESETS[args.model].num_layers, "device": device["device"],
        "dtype": device["dtype"], "gb_per_second": device["gb_per_second"] | ({"given": args.bandwidth} if args.bandwidth else {}),
        "lines": lines, "failed": failed, "beside_the_goals": told,
    })  # fmt: skip


def with_floor(line: dict, bandwidth: float) -> dict:
    """A line with the least seconds that its bytes take at `bandwidth` GB/s, and the share of the bandwidth that was reached."""
    if "bytes_a_pass" not in line:
        return line
    floor = line["bytes_a_pass"] / bandwidth / 1e9
    return line | {"floor_seconds_a_pass": round(floor, 6), "share_of_bandwidth": round(floor / line["seconds_a_pass"], 3)}


def compare(lines: list[dict]) -> dict:
    """What the lines say about each other, and beside the goals."""
    find = lambda **asked: next((line for line in lines if asked.items() <= line.items()), None)
    told: dict = {}
    batches = sorted({line["batch"] for line in lines})
    for batch in batches:
        ours = functools.partial(find, batch=batch, precision="float/float")
        compiled, kept = ours(example="compiled", window=1), ours(example="kept", window=1)
        if compiled and batch == 1:
            told["share of the bandwidth, batch 1, one by one"] = {"is": compiled["share_of_bandwidth"], "goal": SHARE_GOAL}
        if compiled and kept:
            times = {"is": round(kept["seconds_an_image"] / compiled["seconds_an_image"], 2)}
            told[f"compiled prompt over example in context, batch {batch}"] = times | ({"goal": COMPILED_GOAL} if batch == 16 else {})
        for line in lines:
            if line["batch"] == batch and line.get("window", 1) > 1 and (plain := find(**{**keys(line), "window": 1})):
                name = f"break_even, {line['precision']}, batch {batch}, window {line['window']}"
                told[name] = {"codes a pass": round(line["seconds_a_pass"] / plain["seconds_a_pass"], 2)}
        for theirs in THEIRS:
            if kept and (line := find(contender=theirs, batch=batch)):
                told[f"example in context, one by one, over {theirs}, batch {batch}"] = {
                    "times": round(line["seconds_an_image"] / kept["seconds_an_image"], 2)
                }
    return told


def keys(line: dict) -> dict:
    """What a line is of, but for the window."""
    return {name: line[name] for name in ("precision", "batch", "example")}


def one(args: argparse.Namespace) -> dict:
    """One contender, in this process."""
    config = PRESETS[args.model]
    config = dataclasses.replace(config, num_layers=args.layers or config.num_layers)
    if args.one in THEIRS:
        return measure_theirs(config, args)
    import jax

    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if args.one == "bandwidth":
        device = jax.devices()[0]
        return {"platform": device.platform, "device": device.device_kind, "dtype": dtype, "gb_per_second": bandwidths(dtype)}
    return {"lines": list(measure_ours(config, dtype, args))}


def bandwidths(dtype: str) -> dict[str, float]:
    """GB/s of reading a large array in three ways."""
    import jax
    import jax.numpy as jnp

    size = (2**28 if jax.default_backend() == "cpu" else 2**32) // jnp.dtype(dtype).itemsize
    array, vector = jnp.ones((size // 4096, 4096), dtype), jnp.ones(4096, dtype)
    ways = {
        "sum": (jax.jit(lambda a, v: jnp.sum(a, dtype=jnp.float32)), 1), "product": (jax.jit(lambda a, v: a @ v), 1),
        "copy": (jax.jit(lambda a, v: a + 1), 2),
    }  # fmt: skip
    found = {}
    for name, (way, times) in ways.items():
        call = lambda way=way: jax.block_until_ready(way(array, vector))
        call()
        found[name] = round(times * array.nbytes / fastest(call, 10) / 1e9, 2)
    return found


def random_decoder(config: ModelConfig, dtype: str, *, int8: bool):
    """Weights with the layers apart, made and rounded one after the other: never more memory than the model and one matrix."""
    import jax
    import jax.numpy as jnp

    from xprompt_jax.model.chameleon import Chameleon, unstacked
    from xprompt_jax.model.params import flatten, unflatten
    from xprompt_jax.model.quantize import quantized_parameter

    like = jax.eval_shape(lambda: unstacked(Chameleon(config, jax.random.key(0), jnp.dtype(dtype))))

    @functools.partial(jax.jit, static_argnames=("shape", "norm"))
    def make(key: jax.Array, *, shape: tuple[int, ...], norm: bool) -> jax.Array:
        return jnp.ones(shape, dtype) if norm else jax.random.normal(key, shape, dtype) * config.dim**-0.5

    params = {}
    for i, (name, leaf) in enumerate(flatten(like).items()):
        value = make(jax.random.key(i), shape=leaf.shape, norm="norm" in name)
        params[name] = quantized_parameter(name, value) if int8 else value
    return unflatten(like, params)


def prompts_of(config: ModelConfig, prompter, count: int):
    """The example in tokens; and the prompts of `count` images without it, int32 [tokens] each, bare and with the instruction."""
    rng, grid = np.random.default_rng(0), (config.vq.grid, config.vq.grid)
    codes = rng.integers(config.vq.num_codes, size=(2 + count, *grid)).astype(np.int32)
    example = prompter.example(INSTRUCTION, codes[0], codes[1])
    return example, [prompter.task("", c) for c in codes[2:]], [prompter.task(INSTRUCTION, c) for c in codes[2:]], codes[2:]


def measure_ours(config: ModelConfig, dtype: str, args: argparse.Namespace):
    """A line for each batch, way of showing the example, and window."""
    import jax

    from xprompt_jax import Guidance, XPrompt
    from xprompt_jax.config import ComputeConfig
    from xprompt_jax.model.vqgan import VQGAN
    from xprompt_jax.tokens import train_tokenizer

    weights, cache = args.one.split("/")
    words = train_tokenizer([INSTRUCTION] * 4, num_codes=config.vq.num_codes, vocab_size=config.vocab_size)
    decoder = random_decoder(config, dtype, int8=weights == "int8")
    # The tokenizer's weights are never used: codes go in and come out.
    vqgan = jax.eval_shape(lambda: VQGAN(config.vq, jax.random.key(0)))
    model = XPrompt(decoder, vqgan, words, compute=ComputeConfig(dtype=dtype), cache=cache)
    model.fingerprint = "random"  # nothing here is kept
    example, bare, full, codes = prompts_of(config, model.prompter, max(args.batches))
    task = model._compile_tokens([example])
    scales = np.array(list(Guidance(task=SCALE, text=SCALE).weights().values()), np.float32)
    read = sum(leaf.nbytes for leaf in jax.tree.leaves((model.layers_apart.blocks, model.image_head)))
    for batch in args.batches:
        ways = {
            "compiled": [(model._no_example, p) for p in bare[:batch]] + [(task, p) for p in full[:batch]],
            "kept": [(None, p) for p in bare[:batch]] + [(None, np.concatenate([example, p])) for p in full[:batch]],
        }
        for way, rows in ways.items():
            for window in (1, *args.windows) if way == "compiled" else (1,):
                found = time_drawing(model, rows, codes[:batch], scales, window, args)
                slot = 2 * config.num_layers * config.num_kv_heads * found.pop("bytes_a_token_and_head")
                yield {
                    "contender": "ours", "precision": args.one, "example": way, "batch": batch, "window": window, **found,
                    "seconds_an_image": round(found["seconds"] / batch, 4), "images_a_second": round(batch / found["seconds"], 3),
                    "bytes_a_pass": int(read + slot * found["mean_filled_slots"]), "of_which_weights": read,
                }  # fmt: skip


def time_drawing(model, rows, guess: np.ndarray, scales: np.ndarray, window: int, args: argparse.Namespace) -> dict:
    """Prefill and drawing as `sample.draw` does them, timed apart."""
    import jax
    import jax.numpy as jnp

    from xprompt_jax.sample.draw import image_keys
    from xprompt_jax.sample.logits import Sampling
    from xprompt_jax.sample.prefill import prefill
    from xprompt_jax.sample.speculative import decode_image, start
    from xprompt_jax.tokens import CODE

    vocab, layout, grid = model.tokenizer.vocab, model.prompter.layout, model.config.vq.grid
    template = layout.template(grid, grid)
    until = np.nonzero(template == CODE)[0][(args.codes or grid * grid) - 1]
    pad = lambda ids: np.pad(ids, [(0, 0)] * (ids.ndim - 1) + [(0, window)], constant_values=vocab.eoi)
    ids, keys = pad(np.stack([layout.encode(codes) for codes in guess])), image_keys(0, range(len(guess)))
    filling, drawing = [], []
    for _ in range(1 + args.repeats):
        clock = time.perf_counter()
        cache = jax.block_until_ready(prefill(
            model.layers_apart, model.config, [c for c, _ in rows], [p for _, p in rows], vocab.bos, room=len(template) + window,
            dtype=model.compute.dtype, cache_dtype=model.cache_dtype,
        ))  # fmt: skip
        filling.append(time.perf_counter() - clock)
        length, slots = np.asarray(cache.length), cache.k[0].shape[2]
        buffer = jax.tree.leaves((cache.k[0], cache.v[0]))
        token_bytes = sum(leaf.nbytes for leaf in buffer) / 2 / (len(length) * slots * model.config.num_kv_heads)
        state = start(cache, jnp.asarray(ids), vocab.image_start, vocab.num_codes, window, speculative=False)
        clock = time.perf_counter()
        state = jax.block_until_ready(decode_image(
            model.layers_apart, model.image_head, np.int32(vocab.image_start), state, pad(template), np.int32(until), keys, scales,
            Sampling(), window=window, dtype=model.compute.dtype,
        ))  # fmt: skip
        drawing.append(time.perf_counter() - clock)
    passes = int(state.passes)
    prefill_seconds, seconds = min(filling[1:]), min(drawing[1:])
    return {
        "prefill_seconds": round(prefill_seconds, 4), "seconds": round(prefill_seconds + seconds, 4), "passes": passes,
        "seconds_a_pass": round(seconds / passes, 6), "slots": slots, "bytes_a_token_and_head": token_bytes,
        "mean_filled_slots": float(length.sum() + len(length) * until / 2),
    }  # fmt: skip


def measure_theirs(config: ModelConfig, args: argparse.Namespace) -> dict:
    """Hugging Face's `generate`, on a GPU where torch sees one."""
    import torch
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    from xprompt_jax.config import VQConfig
    from xprompt_jax.convert.huggingface import write_config
    from xprompt_jax.prompt import Prompter
    from xprompt_jax.tokens import Layout, train_tokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype or ("float32" if device == "cpu" else "bfloat16"))
    words = train_tokenizer([INSTRUCTION] * 4, num_codes=config.vq.num_codes, vocab_size=config.vocab_size)
    vocab = words.vocab
    # No word is an image's, or its head would mask it; the image tokenizer is the smallest that Hugging Face accepts.
    small = VQConfig(channels=32, channel_multipliers=(1,), num_res_blocks=1, latent_channels=32, embed_dim=8, num_codes=8)
    settings = write_config(dataclasses.replace(config, vq=small), {"<s>": 0, "<pad>": 1, "</s>": 2}, str(dtype).removeprefix("torch."))
    settings["attn_implementation"] = "sdpa"
    torch.set_default_dtype(dtype)
    with torch.device(device):
        theirs = ChameleonForConditionalGeneration(ChameleonConfig(**settings)).eval()
    example, bare, full, _ = prompts_of(config, Prompter(words, Layout("plain", vocab, config.vq.downsample)), max(args.batches))
    start = lambda *parts: np.array([vocab.bos, *np.concatenate(parts), vocab.boi])
    rows = [start(p) for p in bare], [start(example, p) for p in full]
    options = compile_options() if args.one == "compiled" else {}
    draw = guided_draw(theirs, *rows, vocab, args.codes or config.vq.grid**2, SCALE, **options)
    lines = []
    for batch in args.batches:
        draw(batch)  # compiles
        seconds = fastest(functools.partial(draw, batch), args.repeats)
        told = {"seconds": round(seconds, 4), "seconds_an_image": round(seconds / batch, 4), "images_a_second": round(batch / seconds, 3)}
        lines.append({"contender": args.one, "device": device, "example": "kept", "batch": batch, **told})
    return {"lines": lines}


if __name__ == "__main__":
    main()
