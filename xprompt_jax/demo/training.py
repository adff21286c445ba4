"""`xprompt demo --train`: the whole way in a few minutes on a laptop, from pictures to a model that follows an example.

Photographs and rendered scenes -> a VQGAN and a BPE tokenizer of their own -> tokens -> a small X-Prompt model trained on
a device mesh -> compiled prompts -> new images, on one page and in one picture. Every step is the code that the 7B uses;
only the sizes differ. What is shown was held out: scenes, photographs and task parameters that training has not seen.
"""

from __future__ import annotations

import logging
import resource
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from xprompt_jax.config import BucketConfig, ComputeConfig, Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig, VQConfig
from xprompt_jax.convert.native import MODEL_FOLDER
from xprompt_jax.data.free import free_photographs
from xprompt_jax.data.pipeline import GENERIC_INSTRUCTIONS
from xprompt_jax.data.sources import Record, photographs, world_pairs
from xprompt_jax.data.tokenise import tokenize
from xprompt_jax.demo.clock import Clock
from xprompt_jax.errors import UserError
from xprompt_jax.evaluate.metrics import psnr_rgb
from xprompt_jax.evaluate.pairs import ARMS, make_episodes, run_pairs
from xprompt_jax.evaluate.report import Curve, ReportRow, Table, contact_sheet, write_report
from xprompt_jax.files import check_place
from xprompt_jax.prompt import DESCRIBE_QUESTION
from xprompt_jax.runner import run_training
from xprompt_jax.sample.sampler import Example, XPrompt
from xprompt_jax.tokens import train_tokenizer
from xprompt_jax.train.metrics import read_metrics
from xprompt_jax.train.vqgan import train_vqgan

log = logging.getLogger(__name__)

SIZE = 32
PHOTOGRAPHS = 200
VQ = VQConfig(
    channels=16, channel_multipliers=(1, 2, 2), num_res_blocks=1, latent_channels=32, embed_dim=16, num_codes=256, image_size=SIZE
)  # fmt: skip
TASKS = ("depth", "normals", "sepia", "low_light", "denoise", "colorize")
MODEL = ModelConfig(
    vocab_size=1024, dim=128, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=32, ffn_dim=352, num_xp_tokens=8,
    rope_theta=100.0, vq=VQ,  # rows are short: a low base tells near positions apart sooner
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    groups: int
    vq_steps: int
    steps: int
    shown: int
    """Rows of pictures a task."""
    scored: int


FULL = Scale(groups=4000, vq_steps=1200, steps=2400, shown=2, scored=48)
QUICK = Scale(groups=80, vq_steps=60, steps=20, shown=1, scored=8)


def train_demo(workdir: Path, *, quick: bool = False, photos: Path | None = None, seed: int = 0) -> Path:
    """Runs the demo.

    Args:
      workdir: gets tokens/, run/, model/, demo.png and index.html; a finished training in it is not repeated.
      quick: a run of about a minute that only shows that everything works.
      photos: folder of photographs; None takes the free ones inside scikit-image.
      seed: of everything.

    Returns:
      The path of the page.

    Raises:
      UserError: no photographs, or the folder cannot be written, or its model/ is something else.
    """
    check_place(workdir / "model", *MODEL_FOLDER)
    scale, clock = QUICK if quick else FULL, Clock()
    logging.getLogger("xprompt_jax.train.loop").setLevel(logging.WARNING)  # its table of parameters is for operators
    with clock("photographs and scenes"):
        pictures = photographs(photos, SIZE) if photos else free_photographs(SIZE, PHOTOGRAPHS, seed)
        records = list(world_pairs(
            groups=scale.groups, pairs_per_group=4, size=SIZE, seed=seed, photos=pictures, photo_fraction=0.3,
            tasks=TASKS, eval_fraction=0.1, zoom=1.5, plain=True,  # what 64 tokens can show
        ))  # fmt: skip
    with clock("image tokenizer"):
        training = [r for r in records if r.split == "train"]
        images = np.stack([image for r in training for image in (r.input, r.output)])
        vqgan = train_vqgan(VQ, images, steps=scale.vq_steps, batch=8, learning_rate=4e-3, seed=seed)
    with clock("tokens"):
        tokenizer = train_tokenizer(_texts(training), num_codes=VQ.num_codes, vocab_size=MODEL.vocab_size)
        tokenize(records, vqgan, tokenizer, workdir / "tokens", total=len(records))
    with clock("training"):
        model = run_training(_config(workdir, scale, seed), workdir / "run")
        if model is None:
            raise UserError(f"stopped in the middle of training; the same command goes on from {workdir / 'run'}")
        model.save_pretrained(workdir / "model")
    with clock("drawing"):
        rows, scores, queries = _show(model, [r for r in records if r.split == "eval"], scale, seed)
    return _write(workdir, rows, scores, queries, clock, quick)


def _config(workdir: Path, scale: Scale, seed: int) -> Config:
    return Config(
        model=MODEL,
        compute=ComputeConfig(dtype="float32", scan_layers=False),
        mesh=MeshConfig(data=-1, fsdp=1, tensor=1),
        data=DataConfig(
            store=str(workdir / "tokens"),
            buckets=(
                BucketConfig("in_context", examples=1, context=160, todo=160, answer=67, rows=8),
                BucketConfig("describe", examples=1, context=144, todo=80, answer=56, rows=2, kind="describe"),
            ),
            reverse=False, seed=seed,  # half the tasks, learned twice as well in minutes
        ),
        optim=OptimConfig(learning_rate=6e-3, warmup_steps=30, weight_decay=0.0, final_fraction=0.02, beta2=0.98),
        train=TrainConfig(
            steps=scale.steps, log_every=10, eval_every=max(scale.steps // 4, 1), eval_batches=4, save_every=max(scale.steps // 2, 1),
            keep=1, seed=seed, z_loss=1e-5,
        ),
    )  # fmt: skip


def _texts(records: Sequence[Record]) -> Iterator[str]:
    yield from GENERIC_INSTRUCTIONS
    yield DESCRIBE_QUESTION
    for r in records:
        yield from (r.instruction, r.reverse_instruction, r.description, r.reverse_description)


def _show(model: XPrompt, records: Sequence[Record], scale: Scale, seed: int) -> tuple[list[ReportRow], dict[str, float], int]:
    """Draws held-out queries from held-out examples: rows to show, mean PSNR-RGB in dB by arm, and of how many queries."""
    episodes = make_episodes(records, examples=1, per_group=1, seed=seed)[: scale.scored]
    outcomes = list(run_pairs(model, episodes, seed=seed, top_k=16, temperature=0.7))
    scores = {arm: float(np.mean([psnr_rgb(o.images[arm], o.target) for o in outcomes])) for arm in ARMS}

    rows: list[ReportRow] = []
    shown: dict[str, int] = {}
    for o in outcomes:
        query, (before, after) = o.episode.query, o.example
        if shown.get(query.task, 0) == scale.shown:
            continue
        shown[query.task] = shown.get(query.task, 0) + 1
        caption = query.instruction
        if len(shown) <= 3 and shown[query.task] == 1:
            caption += f' · the model on the example: "{model.describe([Example(before, after)], max_tokens=64)}"'
        pictures = (
            ("example input", before), ("example output", after),
            ("input", query.input), ("generated", o.images["drawn"]), ("target", o.target),
        )  # fmt: skip
        reached, possible = (psnr_rgb(o.images[arm], o.target) for arm in ("drawn", "ceiling"))
        numbers = (("PSNR-RGB", f"{reached:.1f} dB"), ("tokenizer ceiling", f"{possible:.1f} dB"))
        rows.append(ReportRow(query.task.replace("_", " "), caption, pictures, numbers))
    rows.sort(key=lambda row: [task.replace("_", " ") for task in TASKS].index(row.title))
    return rows, scores, len(outcomes)


def _write(
    workdir: Path, rows: Sequence[ReportRow], scores: Mapping[str, float], queries: int, clock: Clock, quick: bool
) -> Path:  # fmt: skip
    history = read_metrics(workdir / "run")
    trained, held_out = [m for m in history if "loss" in m], [m for m in history if "eval/loss" in m]
    curves = [Curve("training loss", [m["step"] for m in trained], [m["loss"] for m in trained])]
    if held_out:
        curves.append(Curve("held-out loss", [m["step"] for m in held_out], [m["eval/loss"] for m in held_out]))
    first, last = trained[0]["loss"], float(np.mean([m["loss"] for m in trained[-3:]]))
    facts = [
        ("training loss", f"{first:.2f} → {last:.2f} nats a token"),
        ("example → XP tokens", f"{2 * VQ.grid**2 + 5}+ tokens → {MODEL.num_xp_tokens}"),
        ("devices", f"{jax.device_count()} x {jax.devices()[0].platform}"),
        ("time", f"{clock.total():.0f} s"),
        ("peak memory", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"),
    ]
    tables = [
        Table(f"Mean PSNR-RGB of {queries} held-out queries", ("what is compared with the target", "dB"), (
            ("generated from the right example", f"{scores['drawn']:.2f}"),
            ("generated from a wrong example (control)", f"{scores['wrong']:.2f}"),
            ("the input, unchanged (control)", f"{scores['copied']:.2f}"),
            ("the target through the image tokenizer (ceiling)", f"{scores['ceiling']:.2f}"),
        )),
        clock.table(),
    ]  # fmt: skip
    lead = (
        "A small X-Prompt model, trained from nothing on this machine. Each row shows one example pair, which is compiled into "
        f"{MODEL.num_xp_tokens} XP tokens; the model then does the same to a new image. Examples, inputs and targets were held out."
    )
    if quick:
        lead += " This was the quick form: it shows that everything works, not how well."
    contact_sheet(workdir / "demo.png", rows, title="X-Prompt: one example, then the same to a new image")
    page = write_report(workdir / "index.html", title="X-Prompt demo", lead=lead, facts=facts, rows=rows, curves=curves, tables=tables)
    for name, value in facts:
        log.info("%s: %s", name, value)
    log.info(
        "held-out PSNR %.2f dB; wrong example %.2f, input unchanged %.2f, ceiling %.2f",
        scores["drawn"], scores["wrong"], scores["copied"], scores["ceiling"],
    )  # fmt: skip
    return page
