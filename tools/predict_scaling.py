"""Step time and efficiency of a recipe on 8 to 1024 chips, on paper: prints the tables of docs/scaling.md.

    python tools/predict_scaling.py configs/chameleon_7b_pod.py configs/chameleon_30b_pod.py

Nothing is run or compiled. The bytes are the formulas below (tests/train/test_scale.py holds them against what the compiler counts), the
rates are data sheets times the assumptions written in CHIPS.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from xprompt_jax.commands.train import load_config
from xprompt_jax.config import Config
from xprompt_jax.prompt import SlotShape
from xprompt_jax.train.metrics import PEAK_FLOPS, step_flops

COUNTS = (8, 32, 128, 256, 512, 1024)


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device, by its data sheet, and what of it a good program gets (an assumption)."""

    peak: float
    """bf16 FLOP/s."""
    memory: float
    """Bytes."""
    mxu: float
    """Assumed share of the peak that matrix products reach, recomputation counted as work."""
    wire: float
    """Assumed share of a link's rate that collectives reach."""
    link: float
    """Bytes/s one way: NVLink of a GPU, or one ICI link of a TPU."""
    links: int
    """ICI links of a TPU chip (2 for each axis of its torus); 0 for a GPU."""
    outside: float
    """Bytes/s one way and per chip of the slower network: between hosts (GPU), between slices (TPU)."""
    island: int
    """Chips that the fast links join at most."""

    def rates(self, chips: int, tensor: int) -> tuple[float, float, float]:
        """Bytes/s at which a device sends along (fsdp, tensor, data)."""
        if not self.links:  # Rings of a group pass through all 8 / tensor of its members on a host, each with a NIC of its own.
            fsdp = self.link if chips <= self.island else min(self.link, self.outside * self.island / tensor)
            return self.wire * fsdp, self.wire * self.link, self.wire * self.outside
        # Tensor takes one axis of the torus (two of its chips share one link), fsdp the others. A torus below 64 chips has open ends:
        # half the rate.
        around = 1.0 if chips >= 64 else 0.5
        rest = self.links if tensor == 1 else self.links - 2
        return self.wire * around * self.link * rest, self.wire * self.link * (1 if tensor == 2 else 2), self.wire * self.outside


# Memory, links and networks: NVIDIA's H100 and H200 data sheets (NVLink 900 GB/s both ways, DGX: one 400 Gb/s NIC a GPU) and Google's
# pages on v5p (1200 GB/s both ways over 6 ports, DCN 50 Gb/s a chip) and v6e (800 GB/s over 4 ports, 4 x 200 Gb/s for 8 chips).
# mxu: dense 7B to 70B models in print reach 50 % (H100, MaxText and JAX-Toolbox), 62 to 67 % (v5p, AXLearn and MaxText) and 45 % (v6e,
# MaxText) of the peak with little recomputation; this is that, and a tenth more for the recomputed part of the work.
CHIPS = {
    "H100": Chip(PEAK_FLOPS["H100"], 80e9, 0.55, 0.8, 450e9, 0, 50e9, 8),
    "H200": Chip(PEAK_FLOPS["H200"], 141e9, 0.55, 0.8, 450e9, 0, 50e9, 8),
    "v5p": Chip(PEAK_FLOPS["TPU v5p"], 95 * 2**30, 0.68, 0.8, 100e9, 6, 50e9 / 8, 6144),
    "v6e": Chip(PEAK_FLOPS["TPU v6"], 32e9, 0.5, 0.8, 100e9, 4, 800e9 / 8 / 8, 256),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A recipe on a mesh."""

    config: Config
    data: int
    fsdp: int
    tensor: int
    accumulate: int

    @property
    def slots(self) -> int:
        """Slots of one microbatch on one device, over all buckets."""
        c = self.config
        every = sum(b.rows * SlotShape.of(b, c.model.num_xp_tokens, c.data.mode).length for b in c.data.buckets)
        return every // (self.accumulate * self.data * self.fsdp)

    @property
    def layer(self) -> int:
        """Weights of the matrices of one layer."""
        m = self.config.model
        return 2 * m.dim * m.head_dim * (m.num_heads + m.num_kv_heads) + 3 * m.dim * m.ffn_dim

    @property
    def table(self) -> int:
        """Weights of the embedding; the head has as many."""
        return self.config.model.vocab_size * self.config.model.dim

    @property
    def parameters(self) -> int:
        """All weights, without norms and XP."""
        return self.config.model.num_layers * self.layer + 2 * self.table

    def sent(self) -> dict[str, float]:
        """Bytes a device sends per step along each mesh axis, with remat = block."""
        m, runs = self.config.model, self.accumulate
        ring = lambda n: (n - 1) / n
        # A layer is gathered forward and backward and its gradient scattered, in bfloat16, for every microbatch, all its buckets together.
        # So is the head, whose backward gather and gradient are float32. Embedded rows are exchanged, and so are their gradients.
        gathered = runs * (m.num_layers * self.layer * 3 * 2 + self.table * (2 + 2 + 4 + 4)) / self.tensor
        hidden = self.accumulate * self.slots * m.dim * 2
        # Attention and MLP each sum [slots, D] over tensor: forward, backward, and again where the sum is needed to recompute the
        # block. Post-norm needs both then, pre-norm the first.
        sums = 6 if m.swin_norm else 5
        return {
            "fsdp": (gathered + 2 * hidden) * ring(self.fsdp),
            "tensor": hidden * (m.num_layers * sums + 1) * 2 * ring(self.tensor),
            "data": runs * (m.num_layers * self.layer * 2 + self.table * 4) / (self.tensor * self.fsdp) * 2 * ring(self.data),
        }

    def memory(self) -> dict[str, float]:
        """Bytes on a device."""
        c, m = self.config, self.config.model
        answers = sum(b.rows * b.answer for b in c.data.buckets) // (self.accumulate * self.data * self.fsdp)
        widths = (2 * (m.num_heads + m.num_kv_heads) * m.head_dim + 3 * m.ffn_dim) / self.tensor + 4 * m.dim
        return {
            "state": self.parameters * (4 + 4 + 4) / (self.fsdp * self.tensor),
            # Those of one microbatch are added to the sum over them.
            "gradients": self.parameters * 4 * (1 + (self.accumulate > 1)) / (self.fsdp * self.tensor),
            "block inputs": self.slots * m.dim * 2 * m.num_layers,
            "one layer": self.slots * widths * 2 * 2,  # activations and their gradients
            "logits": 2 * 4 * min(c.train.loss_chunk, answers) * m.vocab_size / self.tensor,
            # Two layers; the head in use, its gradient, the embedding's.
            "weights whole": (2 * self.layer * 2 + self.table * (2 + 4 + 4)) / self.tensor,
        }


def plan(config: Config, chips: int, island: int) -> Plan:
    """The mesh for a number of chips: at most as many rows apart as the smallest bucket has, the rest to tensor."""
    rows = min(b.rows for b in config.data.buckets)
    shards = min(chips, rows)
    slices = max(1, chips // island) if island > 8 else 1
    return Plan(config, slices, shards // slices, chips // shards, rows // shards)


def seconds(p: Plan, chip: Chip) -> dict[str, float]:
    """Seconds of a step's parts, were each alone; `compute` with every block computed once more in the backward pass."""
    chips, sent = p.data * p.fsdp * p.tensor, p.sent()
    rates = dict(zip(("fsdp", "tensor", "data"), chip.rates(chips, p.tensor), strict=True))
    return {"compute": step_flops(p.config) * 4 / 3 / (chips * chip.peak * chip.mxu)} | {axis: sent[axis] / rates[axis] for axis in sent}


def tables(path: Path) -> Iterator[str]:
    """Markdown of one recipe: a table for every kind of chip."""
    config = load_config(path)
    flops = step_flops(config)
    tokens = sum(b.rows * SlotShape.of(b, config.model.num_xp_tokens, config.data.mode).length for b in config.data.buckets)
    yield f"### {path.as_posix()}: {flops / 1e15:.0f} PFLOP and {tokens / 1e6:.2f}M slots a step"
    for names in (("H100", "H200"), ("v5p",), ("v6e",)):
        chip, first = CHIPS[names[0]], None
        yield ""
        yield f"**{' and '.join(names)}**"
        yield ""
        yield "| chips | data x fsdp x tensor, microbatches | GiB | compute s | fsdp s | tensor s | data s | step s | MFU | efficiency |"
        yield "|---|---|---|---|---|---|---|---|---|---|"
        for count in COUNTS:
            p = plan(config, count, chip.island)
            need = sum(p.memory().values())
            fitting = [n for n in names if 1.3 * need < CHIPS[n].memory]  # what compilers need on top
            start = f"| {count} | {p.data} x {p.fsdp} x {p.tensor}, {p.accumulate} | {need / 2**30:.0f}"
            if not fitting:
                yield f"{start} | does not fit | | | | | | |"
                continue
            s = seconds(p, chip)
            best, worst = max(s["compute"], s["fsdp"]) + s["tensor"] + s["data"], sum(s.values())
            first = first or count * best
            only = "" if len(fitting) == len(names) else f" ({fitting[0]} only)"
            alone = f"{s['compute']:.2f} | {s['fsdp']:.2f} | {s['tensor']:.2f} | {s['data']:.3f}"
            mfu = flops / count / chip.peak
            yield (f"{start}{only} | {alone} | {best:.2f} to {worst:.2f} | {mfu / best:.0%} to {mfu / worst:.0%} | "
                   f"{first / count / best:.0%} |")  # fmt: skip


def main() -> None:
    """Prints the tables of the recipes named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="+")
    for path in parser.parse_args().configs:
        print("\n".join(tables(path)) + "\n")


if __name__ == "__main__":
    main()
