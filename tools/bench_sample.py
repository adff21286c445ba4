"""Drawing images beside Hugging Face's `generate`: same weights, same example, same sampling, one after the other on this machine.

    python tools/bench_sample.py                                 # the mini's shape, random weights
    python tools/bench_sample.py --model mini --photos PHOTOS    # and a trained model, on photographs: its parallel decoding pays

One example pair, guidance of two rows (without and with the example and its instruction, scale 2), temperature 1, no top-k, image codes
alone. Float32, every contender in a process of its own, compiled and warm, torch with one thread or all, whichever is faster:

    eager       ChameleonForConditionalGeneration.generate, sdpa attention, dynamic cache
    compiled    the same with cache_implementation="static" and torch.compile of every decoding step, as transformers does it on a GPU
    ours        XPrompt.generate: one by one with the example given (compiled on the way), the same from codes to codes, the same with a
                compiled prompt, then parallel

Hugging Face gets the example in its context, and guidance as two rows of one batch (_huggingface.py). Its time has no image tokenizer in
it, as ours has not in the row "codes to codes"; in the others it has, from pixels to pixels. First logits must agree. Prints seconds an
image, the fastest of --repeats; writes benchmarks/results/sample.json.
"""

import argparse
import functools
import json
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np
from _bench import fastest, run_alone, save
from _huggingface import compile_options, guided_draw

from xprompt_jax.config import PRESETS

INSTRUCTION, SCALE, TRAINED = "remove the rain", 2.0, "trained"
PARALLEL, ONE_BY_ONE, CODES = "jacobi, compiled prompt", "one by one", "one by one, codes to codes"
# (ours, batch, theirs): at least as many times as fast.
GOALS = {
    (PARALLEL, "batch 1", "eager"): 3.0, (ONE_BY_ONE, "batch 1", "eager"): 1.5, (ONE_BY_ONE, "batch 8", "eager"): 2.0,
    (CODES, "batch 1", "eager"): 1.5, (CODES, "batch 8", "eager"): 2.0,
    (ONE_BY_ONE, "batch 1", "compiled"): 1.0, (ONE_BY_ONE, "batch 8", "compiled"): 1.0,
}  # fmt: skip
TOKENS_A_PASS = 2.0  # of parallel decoding, on a trained model


def main() -> None:
    """Parses the flags; runs the contenders, or (with --one) is one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a trained model, measured as well")
    parser.add_argument("--photos", type=Path, help="photographs to take noise from with it, in place of scenes to paint the depth of")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sample.json"))
    args = parser.parse_args()
    if args.one:
        print(json.dumps(CONTENDERS[args.one[0]](args.one[1], args.photos, args.batches, args.repeats)))
        return

    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        save_mini(Path(folder) / "mini")
        models = {"mini, random weights": str(Path(folder) / "mini")} | ({TRAINED: args.model} if args.model else {})
        for name, path in models.items():
            flags = ["--repeats", args.repeats, "--batches", *args.batches, *(["--photos", args.photos] if args.photos else [])]
            tables[name] = {contender: run_alone("--one", contender, path, *flags) for contender in args.contenders}
            check_logits(tables[name])
            print(name, json.dumps(tables[name], indent=1), flush=True)
    told = compare(tables)
    print(json.dumps(told, indent=1))
    save(args.out, {
        "benchmark": "sample",
        "seconds_per_image": tables,
        "beside_the_goals": told,
        "trained_model": args.model or "none given; random weights are nearly flat, which flatters parallel decoding",
    })  # fmt: skip


def check_logits(table: dict) -> None:
    """The contenders must compute the same before their speed means anything."""
    found = [np.array(row.pop("first_logits")) for row in table.values() if "first_logits" in row]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=2e-3, rtol=1e-3)


def compare(tables: dict) -> dict:
    """Every goal beside what was measured."""
    told = {}
    for name, table in tables.items():
        for (mode, batch, theirs), goal in GOALS.items():
            slow, fast = table.get(theirs, {}).get(batch), table.get("ours", {}).get(mode, {}).get(batch)
            if slow and fast:
                told[f"{name}: {mode}, {batch}, over {theirs}"] = {"times": round(slow / fast, 2), "goal": goal}
        if name == TRAINED and "ours" in table:
            tokens = table["ours"]["tokens_per_image"]
            for mode, passes in table["ours"]["passes_per_image"].items():
                told[f"{name}: tokens a pass, {mode}"] = {"times": round(tokens / passes, 2), "goal": TOKENS_A_PASS}
    return told


def save_mini(folder: Path) -> None:
    """Random weights of the mini's shape."""
    import jax

    from xprompt_jax.convert.native import save_folder
    from xprompt_jax.convert.weights import reader_of
    from xprompt_jax.model.chameleon import Chameleon
    from xprompt_jax.model.vqgan import VQGAN
    from xprompt_jax.tokens import train_tokenizer

    config = PRESETS["mini"]
    words = train_tokenizer([INSTRUCTION] * 4, num_codes=config.vq.num_codes, vocab_size=config.vocab_size)
    save_folder(folder, config, reader_of(Chameleon(config, jax.random.key(0)), VQGAN(config.vq, jax.random.key(1))), words)


def pictures(size: int, count: int, photos: Path | None) -> list[np.ndarray]:
    """An example's input and output, then `count` inputs: photographs with noise, or scenes whose depth is to be painted."""
    from xprompt_jax.data.pairs import photo_source
    from xprompt_jax.data.sources import photographs, world_pairs
    from xprompt_jax.data.tasks import TASKS, make_pairs

    if photos is None:
        pairs = list(world_pairs(groups=1, pairs_per_group=count + 1, size=size, seed=77, tasks=["depth"], zoom=1.5, plain=True))
    else:
        noise = TASKS["denoise"].sample_parameters(np.random.default_rng(77))
        pairs = make_pairs("denoise", noise, [photo_source(photo) for photo in photographs(photos, size)[: count + 1]], 77)
    return [pairs[0].input, pairs[0].output, *(pair.input for pair in pairs[1:])]


def load(folder: str, photos: Path | None, count: int):
    """The model, the pictures, and their prompts in tokens: with the example, and without it."""
    from xprompt_jax import XPrompt
    from xprompt_jax.config import ComputeConfig

    model = XPrompt.from_pretrained(folder, compute=ComputeConfig(dtype="float32"))
    shown = pictures(model.config.vq.image_size, count, photos)
    codes, p, v = model.encode_images(shown), model.prompter, model.tokenizer.vocab
    example = p.example(INSTRUCTION, codes[0], codes[1])
    full = [np.array([v.bos, *example, *p.task(INSTRUCTION, c), v.boi]) for c in codes[2:]]
    bare = [np.array([v.bos, *p.task("", c), v.boi]) for c in codes[2:]]
    return model, shown, full, bare


def measure_ours(folder: str, photos: Path | None, batches: list[int], repeats: int) -> dict:
    """`XPrompt.generate` from pixels to pixels."""
    from xprompt_jax import Example, Guidance

    model, shown, full, _ = load(folder, photos, max(batches))
    pair = [Example(shown[0], shown[1], INSTRUCTION)]
    guidance = Guidance(task=SCALE, text=SCALE)  # the branches "image" and "full": two rows
    task = model.compile(pair)
    modes = {
        "one by one": (pair, "sequential"), "one by one, compiled prompt": (task, "sequential"),
        "jacobi, compiled prompt": (task, "jacobi"), "speculative, compiled prompt": (task, "speculative"),
    }  # fmt: skip
    grid = model.config.vq.grid
    told: dict = {"first_logits": np.asarray(model.logits(full[0][None])[0, -1]).tolist(), "tokens_per_image": grid * grid}

    def seconds(prompt, decoding: str, shown: list[np.ndarray]) -> dict[str, float]:
        """An image, at each batch."""
        found = {}
        for batch in batches:
            draw = functools.partial(model.generate, prompt, shown[2 : 2 + batch], guidance=guidance, decoding=decoding)
            draw()  # compiles
            found[f"batch {batch}"] = round(fastest(draw, repeats) / batch, 4)
        return found

    told |= {name: seconds(prompt, decoding, shown) for name, (prompt, decoding) in modes.items()}
    codes, decode = list(model.encode_images(shown)), model._decode
    model._decode = lambda _, codes: np.zeros((1, 8, 8, 3), np.float32)  # a thumbnail's and a drawing's pixels
    told[CODES] = seconds([Example(codes[0], codes[1], INSTRUCTION)], "sequential", codes)
    model._decode = decode
    told["passes_per_image"] = {d: count_passes(model, task, shown[2:], guidance, d) for d in ("jacobi", "speculative")}
    return told


def count_passes(model, task, inputs, guidance, decoding: str, window: int = 16) -> float:
    """Mean passes of images drawn alone."""
    from xprompt_jax.sample import draw as module

    passes, decode_image = [], module.decode_image

    def counting(*args, **options):
        state = decode_image(*args, **options)
        passes.append(int(state.passes))
        return state

    module.decode_image = counting
    try:
        for image in inputs:
            model.generate(task, [image], guidance=guidance, decoding=decoding, window=window)
    finally:
        module.decode_image = decode_image
    return statistics.mean(passes)


def measure_eager(folder: str, photos: Path | None, batches: list[int], repeats: int) -> dict:
    """Hugging Face's generate as it comes."""
    return measure_torch(folder, photos, batches, repeats)


def measure_compiled(folder: str, photos: Path | None, batches: list[int], repeats: int) -> dict:
    """With a static cache, and each step compiled."""
    return measure_torch(folder, photos, batches, repeats, **compile_options())


def measure_torch(folder: str, photos: Path | None, batches: list[int], repeats: int, **options) -> dict:
    """`generate` on prompts in tokens."""
    import torch

    from xprompt_jax.convert.formats import open_source
    from xprompt_jax.convert.verify import torch_decoder

    model, _, full, bare = load(folder, photos, max(batches))
    theirs = torch_decoder(open_source(folder))
    theirs.set_attn_implementation("sdpa")
    draw = guided_draw(theirs, bare, full, model.tokenizer.vocab, model.config.vq.grid**2, SCALE, **options)

    with torch.no_grad():
        told: dict = {"first_logits": theirs(input_ids=torch.tensor(full[0][None])).logits[0, -1].tolist()}
    told["threads"] = {}
    for batch in batches:
        draw(batch)  # compiles
        by_threads = {}
        for threads in sorted({1, len(os.sched_getaffinity(0))}):  # small steps on a busy machine are faster on one
            torch.set_num_threads(threads)
            by_threads[threads] = fastest(functools.partial(draw, batch), repeats) / batch
        told["threads"][f"batch {batch}"] = min(by_threads, key=by_threads.__getitem__)
        told[f"batch {batch}"] = round(min(by_threads.values()), 4)
    return told


CONTENDERS = {"eager": measure_eager, "compiled": measure_compiled, "ours": measure_ours}


if __name__ == "__main__":
    main()
