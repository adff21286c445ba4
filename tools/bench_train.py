"""One training step beside Hugging Face's torch model: same weights, same rows, same optimizer, in turns on this machine.

    python tools/bench_train.py                       # the mini's shape, two rows of one example
    python tools/bench_train.py --examples 1 2 4 8    # what more examples cost, split and dense

Contenders, each in a process of its own, float32:

    split          our training step: examples encoded apart, the task sees their XP keys, no mask
    split, remat   the same with one compiled layer in a loop, whose backward pass makes again what is cheap to make (remat = names)
    dense          the same model with the XP mask as a matrix (our oracle)
    torch          Hugging Face's ChameleonForConditionalGeneration with the same 4-D mask (sdpa), fused AdamW

All of them compute the head and the loss on the answer's tokens alone, which Hugging Face's own loss does not. First losses must agree.
Prints medians over turns and peak resident memory; writes benchmarks/results/train_<device>.json.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from _bench import run_alone, save

from xprompt_jax.config import PRESETS, BucketConfig, ComputeConfig, Config, DataConfig, OptimConfig, TrainConfig

CONTENDERS = ("split", "split, remat", "dense", "torch")


def main() -> None:
    """Parses the flags; runs the contenders in turns, or (with --one) is one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(PRESETS), default="mini")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--examples", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], Path(args.one[1]), config_of(args, args.examples[0], args.one[0]), args.steps)))
        return

    tables = {}
    for examples in args.examples:
        turns = {name: [] for name in args.contenders}
        with tempfile.TemporaryDirectory() as folder:
            save_weights(Path(folder) / "model", config_of(args, examples))
            for _ in range(args.turns):
                for name in args.contenders:
                    flags = ["--model", args.model, "--rows", args.rows, "--examples", examples, "--steps", args.steps]
                    turns[name].append(run_alone("--one", name, folder, *flags))
        failed = {name: turn["failed"] for name, found in turns.items() for turn in found if "failed" in turn}  # out of memory, say
        turns = {name: found for name, found in turns.items() if name not in failed}
        losses = [turn["first_loss"] for found in turns.values() for turn in found]
        assert np.allclose(losses, losses[0], rtol=1e-4), f"the contenders do not compute the same: {losses}"
        tables[examples] = {
            name: {
                "seconds_per_step": round(statistics.median(s for turn in found for s in turn["seconds"]), 3),
                "peak_resident_gib": round(statistics.median(turn["peak_resident_gib"] for turn in found), 2),
            }
            for name, found in turns.items()
        } | {name: {"failed": why} for name, why in failed.items()}
        print(f"{examples} example(s): {json.dumps(tables[examples])}", flush=True)
        path = args.out / f"train_cpu{'_examples' if len(args.examples) > 1 else ''}.json"
        save(path, {"benchmark": "train", "model": args.model, "rows": args.rows, "by_examples": tables})


def config_of(args, examples: int, contender: str = "split") -> Config:
    """The mini's longest bucket, with as many examples as asked for."""
    remat = contender == "split, remat"
    compute = ComputeConfig(dtype="float32", scan_layers=remat, remat="names" if remat else "none")
    bucket = BucketConfig("in_context", examples=examples, context=576, todo=576, answer=259, rows=args.rows)
    return Config(
        model=PRESETS[args.model], compute=compute, data=DataConfig(buckets=(bucket,)),
        optim=OptimConfig(learning_rate=1e-4, schedule="constant", warmup_steps=0, weight_decay=0.1), train=TrainConfig(steps=1000),
    )  # fmt: skip


def save_weights(folder: Path, config: Config) -> None:
    """Random weights for all contenders."""
    import jax

    from xprompt_jax.convert.native import save_folder
    from xprompt_jax.convert.weights import reader_of
    from xprompt_jax.model.chameleon import Chameleon
    from xprompt_jax.model.vqgan import VQGAN
    from xprompt_jax.tokens import train_tokenizer

    words = train_tokenizer(["remove the rain"] * 4, num_codes=config.model.vq.num_codes, vocab_size=config.model.vocab_size)
    model, vqgan = Chameleon(config.model, jax.random.key(0)), VQGAN(config.model.vq, jax.random.key(1))
    save_folder(folder, config.model, reader_of(model, vqgan), words)


def rows_of(config: Config, step: int):
    """Full rows of random tokens, their slots (with roles, for masks) and their batch."""
    from xprompt_jax.prompt import Sample, SlotShape, fill, stack

    bucket, rng = config.data.buckets[0], np.random.default_rng(step)
    shape = SlotShape.of(bucket, config.model.num_xp_tokens)
    draw = lambda count: rng.integers(2, config.model.vocab_size, count).astype(np.int32)
    samples = [
        Sample(tuple(draw(bucket.context) for _ in range(bucket.examples)), draw(bucket.todo - bucket.answer), draw(bucket.answer))
        for _ in range(bucket.rows)
    ]
    slots = [fill(s, shape, bos=0, pad=1, loss=config.data.loss) for s in samples]
    return slots, stack(slots, bucket.answer)


def measure(name: str, folder: Path, config: Config, steps: int) -> dict:
    """Seconds of each step after the first, the first loss, peak memory of this process."""
    step = {"dense": dense_step, "torch": torch_step}.get(name, split_step)(folder, config)
    loss, seconds = step(0), []
    for i in range(1, steps + 1):
        start = time.perf_counter()
        step(i)
        seconds.append(time.perf_counter() - start)
    return {"first_loss": loss, "seconds": seconds, "peak_resident_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def split_step(folder: Path, config: Config):
    """Our step as training runs it."""
    import jax

    from xprompt_jax.mesh import make_mesh, shard_batch
    from xprompt_jax.train.optim import make_optimizer
    from xprompt_jax.train.state import abstract_state, init_state
    from xprompt_jax.train.step import make_train_step

    mesh, optimizer = make_mesh(config.mesh), make_optimizer(config.optim, config.train.steps)
    held = {"state": init_state(config, optimizer, mesh, initial_of(folder, mesh))}
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(config, optimizer, mesh))
    train_step = make_train_step(config, optimizer, shardings)

    def step(i: int) -> float:
        with jax.set_mesh(mesh):
            held["state"], metrics = train_step(held["state"], shard_batch({"in_context": rows_of(config, i)[1]}, mesh))
            return float(metrics["loss"])

    return step


def initial_of(folder: Path, mesh=None):
    """The saved weights as a flat dictionary."""
    import jax.numpy as jnp

    from xprompt_jax.convert.formats import open_source
    from xprompt_jax.convert.weights import load_decoder
    from xprompt_jax.model.params import flatten

    return flatten(load_decoder(open_source(folder / "model"), dtype=jnp.float32, mesh=mesh))


def dense_step(folder: Path, config: Config):
    """The same model with its mask in memory."""
    import jax
    import optax

    from xprompt_jax.model.attention import dense_attention, dense_mask
    from xprompt_jax.model.chameleon import abstract_model
    from xprompt_jax.model.layers import rotary
    from xprompt_jax.model.params import unflatten
    from xprompt_jax.model.xp import place_by_role
    from xprompt_jax.prompt import Role
    from xprompt_jax.train.loss import cross_entropy, gather_answers
    from xprompt_jax.train.optim import make_optimizer

    optimizer = make_optimizer(config.optim, config.train.steps)
    held = {"params": initial_of(folder)}
    held["opt"] = optimizer.init(held["params"])

    def loss(params, batch, roles, groups):
        model = unflatten(abstract_model(config.model), params)
        segments = (roles != Role.PAD).astype(np.int32)
        x = place_by_role(model.embed_tokens(batch["ids"], config.compute), model.xp[...], roles, groups, segments)
        mask = dense_mask(roles, groups, segments)

        def attend(q, k, v):
            q, k = (rotary(t, batch["positions"], config.model.rope_theta) for t in (q, k))
            return dense_attention(q, k, v, mask), None

        x, _ = model._run(x, attend, config.compute)
        states, labels = gather_answers(model.final(x), batch)
        sums = cross_entropy(states, params["head"], labels, batch["weights"], chunk=config.train.loss_chunk)
        return (sums.loss + config.train.z_loss * sums.z) / sums.weight, sums.loss / sums.weight

    def update(params, opt, batch, roles, groups):
        grads, told = jax.grad(loss, has_aux=True)(params, batch, roles, groups)
        updates, opt = optimizer.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, told

    update = jax.jit(update, donate_argnums=(0, 1))

    def step(i: int) -> float:
        slots, batch = rows_of(config, i)
        roles, groups = (np.stack([getattr(s, n) for s in slots]) for n in ("roles", "groups"))
        held["params"], held["opt"], told = update(held["params"], held["opt"], batch, roles, groups)
        return float(told)

    return step


def torch_step(folder: Path, config: Config):
    """Hugging Face's model in torch."""
    import torch

    from xprompt_jax.convert.formats import open_source
    from xprompt_jax.convert.verify import torch_decoder
    from xprompt_jax.model.attention import dense_mask
    from xprompt_jax.prompt import Role

    source = open_source(folder / "model")
    model = torch_decoder(source)
    model.set_attn_implementation("sdpa")
    body = model.model.language_model if hasattr(model.model, "language_model") else model.model
    xp = torch.nn.Parameter(torch.tensor(np.array(source.read("xp"))))
    learned = [*(p for n, p in model.named_parameters() if "vqmodel" not in n), xp]
    c = config.optim
    optimizer = torch.optim.AdamW(learned, lr=c.learning_rate, betas=(c.beta1, c.beta2), weight_decay=c.weight_decay, fused=True)

    def step(i: int) -> float:
        slots, batch = rows_of(config, i)
        roles, groups = (np.stack([getattr(s, n) for s in slots]) for n in ("roles", "groups"))
        mask = np.asarray(dense_mask(roles, groups, (roles != Role.PAD).astype(np.int32)))
        bias = torch.where(torch.tensor(mask[:, None]), 0.0, torch.finfo(torch.float32).min)
        ids, where = torch.tensor(batch["ids"], dtype=torch.long), torch.tensor(batch["targets"], dtype=torch.long)
        x = body.get_input_embeddings()(ids)
        x[torch.tensor(roles == Role.XP)] = xp.repeat(len(roles) * config.data.buckets[0].examples, 1)
        positions = torch.tensor(batch["positions"], dtype=torch.long)
        hidden = body(inputs_embeds=x, attention_mask=bias, position_ids=positions).last_hidden_state
        before = (where - 1).clamp(min=0)
        states = torch.gather(hidden, 1, before[..., None].expand(-1, -1, hidden.shape[-1]))
        logits, labels = model.lm_head(states).flatten(0, 1), torch.gather(ids, 1, where).flatten()
        nll = torch.nn.functional.cross_entropy(logits, labels)
        loss = nll + config.train.z_loss * torch.logsumexp(logits, -1).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, c.clip_norm)
        optimizer.step()
        return float(nll.detach())

    return step


if __name__ == "__main__":
    main()
