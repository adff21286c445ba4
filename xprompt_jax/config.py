"""Every setting of the project, as frozen dataclasses; JSON in, JSON out; presets of the published sizes.

`ModelConfig` says what the weights are. `ComputeConfig` says how the same numbers are computed (it may change between
two runs on the same weights). The rest configures a run. Shape letters: B batch, L slots, D model, H query heads,
G kv heads, K head dim, F ffn, V vocab, N layers, S XP tokens, E examples.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar, get_args

import pydantic

from xprompt_jax.errors import UserError

T = TypeVar("T")


def _check(config: object, section: str, **rules: tuple[float, float]) -> None:
    """Refuses values outside [least, most], by name."""
    for name, (least, most) in rules.items():
        value = getattr(config, name)
        if not least <= value <= most:
            bound = f"at least {least:g}" if value < least else f"at most {most:g}"
            raise UserError(f"{section}.{name} is {value}; it must be {bound}")


_ANY = math.inf

# Unknown keys and wrong types are errors, never ignored (strict mode still lets an int stand for a float).
_STRICT = pydantic.ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class VQConfig:
    """The VQGAN image tokenizer (Meta's `vqgan.yaml`). Defaults are Chameleon's: 512 x 512 pixels to 32 x 32 codes."""

    __pydantic_config__ = _STRICT
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    latent_channels: int = 256
    embed_dim: int = 256
    num_codes: int = 8192
    image_size: int = 512

    def __post_init__(self):
        sizes = ("channels", "num_res_blocks", "latent_channels", "embed_dim", "num_codes", "image_size")
        _check(self, "vq", **dict.fromkeys(sizes, (1, _ANY)))
        if not self.channel_multipliers or min(self.channel_multipliers) < 1:
            raise UserError(f"vq.channel_multipliers is {self.channel_multipliers}; give one or more positive numbers")
        if self.image_size % self.downsample:
            raise UserError(f"vq.image_size {self.image_size} must be a multiple of {self.downsample}, the pixels of one code")

    @property
    def downsample(self) -> int:
        """Pixels per code along one side."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def grid(self) -> int:
        """Codes along one side of an image of `image_size` pixels."""
        return self.image_size // self.downsample


@dataclass(frozen=True)
class ModelConfig:
    """A Chameleon-family decoder with XP tokens. Defaults are the 7B's."""

    __pydantic_config__ = _STRICT
    vocab_size: int = 65536
    dim: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    ffn_dim: int = 11008
    swin_norm: bool = False
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    num_xp_tokens: int = 64
    layout: Literal["plain", "lumina"] = "plain"
    vq: VQConfig = field(default_factory=VQConfig)

    def __post_init__(self):
        sizes = ("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim", "num_xp_tokens")
        _check(self, "model", **dict.fromkeys(sizes, (1, _ANY)), norm_eps=(0, 1), rope_theta=(1, _ANY))
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"model.num_heads {self.num_heads} must be a multiple of model.num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise UserError(f"model.head_dim {self.head_dim} must be even (rotary pairs)")


@dataclass(frozen=True)
class ComputeConfig:
    """How the forward pass is computed. None of these changes what is computed, up to rounding."""

    __pydantic_config__ = _STRICT
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of activations and of the weights at use; masters keep their own type."""
    scan_layers: bool = True
    """One compiled layer in a loop (fast to compile), or all layers unrolled (often faster to run on a GPU)."""
    remat: Literal["none", "block", "dots", "names", "offload"] = "none"
    """What the backward pass recomputes: nothing, whole blocks, all but matrix products, all but named activations
    (queries, keys, values, attention output, MLP products), or block inputs moved to host memory."""
    attention: Literal["xla", "cudnn", "splash"] = "xla"
    """Kernel for the square causal calls. A backend that cannot run here is an error, never a silent fallback."""
    splash_block: int = 512
    """Queries, and keys, that the splash kernel has in a TPU core's memory at once: a multiple of 128, to which rows are padded."""

    def __post_init__(self):
        if self.splash_block < 128 or self.splash_block % 128:
            raise UserError(f"compute.splash_block is {self.splash_block}; it must be a multiple of 128")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 takes all that are left (at most one axis may be -1)."""

    __pydantic_config__ = _STRICT
    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    slices: int = 1
    """TPU slices, or GPU clusters, joined by a slower network; `data` is a multiple of it and alone crosses that network."""


@dataclass(frozen=True)
class BucketConfig:
    """One static shape of a training row and how many rows of it a step holds (see prompt.py)."""

    __pydantic_config__ = _STRICT
    name: str
    examples: int
    """Example pairs in the row (E)."""
    context: int
    """Slots for one example (its instruction and its two images)."""
    todo: int
    """Slots for the task: instruction, input image, answer."""
    answer: int
    """Most tokens of a row that carry loss; where `data.loss` is todo, all of the task's may."""
    rows: int
    """Rows of this bucket in every step, over all hosts."""
    kind: Literal["image", "describe", "text_to_image"] = "image"
    """What is asked for: an output image, the difference of the example pair in words, or an image of a caption."""
    several_inputs: bool = False
    """Take those pairs alone that have several input images (try-on, composition); kind image, without examples."""

    def __post_init__(self):
        section = f"bucket {self.name!r}"
        if self.several_inputs and (self.examples or self.kind != "image"):
            raise UserError(f"{section}: several_inputs is for rows of kind image without examples; set examples and context to 0")
        _check(self, section, examples=(0, _ANY), context=(0, _ANY), todo=(2, _ANY), answer=(1, _ANY), rows=(1, _ANY))
        if self.answer > self.todo:
            raise UserError(f"{section}: answer {self.answer} is longer than todo {self.todo}, which holds it")
        if bool(self.examples) != bool(self.context):
            raise UserError(f"{section}: examples {self.examples} and context {self.context}: both are zero, or neither")


Holdout = Literal["derain", "low_light", "add_remove", "depth_spectrum"]


@dataclass(frozen=True)
class DataConfig:
    """What rows are made of. Every row is a pure function of (seed, step)."""

    __pydantic_config__ = _STRICT
    store: str = "data/tokens"
    """Folder written by `xprompt tokenize`: token records, and the pair and caption tables that refer to them."""
    buckets: tuple[BucketConfig, ...] = (
        BucketConfig("in_context", examples=1, context=2304, todo=2304, answer=1027, rows=768),
        BucketConfig("describe", examples=1, context=2304, todo=512, answer=448, rows=128, kind="describe"),
        BucketConfig("text_to_image", examples=0, context=0, todo=1536, answer=1027, rows=128, kind="text_to_image"),
    )
    mode: Literal["xprompt", "causal", "none"] = "xprompt"
    """xprompt: the paper's mask. causal: the example stays visible (the paper's baseline). none: no example."""
    loss: Literal["answer", "todo"] = "answer"
    """Tokens that carry loss: the answer alone, or every task token."""
    reverse: bool = True
    """Also train every pair backwards (output to input)."""
    same_scene_partner: bool = False
    """Allow the example to share its source image with the query."""
    generic_instruction: float = 0.2
    """Fraction of image rows whose instruction only says to do what the example shows."""
    index: str | None = None
    """File written by `xprompt index`: examples are drawn among the nearest pairs by instruction (RAIE, paper 3.3), and among those of the
    same group where a pair has no neighbour that can be shown."""
    drop_example: float = 0.0
    """Fraction of in-context rows that lose their example, for guidance without it."""
    repeat_example: float = 0.0
    """Fraction of in-context training rows that ask for an example once more: the query's own pair stands among the examples, so that XP
    tokens learn to carry an output's look, not only its task (docs/in_context.md). Where the example is visible it would be copied."""
    holdouts: tuple[Holdout, ...] = ()
    """Tasks that are not trained, so that they can be asked as novel ones (data/holdouts.py; paper, section 4.4)."""
    strict_holdouts: bool = False
    """Leave out their reverse direction as well, which the paper trains."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Dataset or task -> how many pairs it counts for when rows are drawn; 0 leaves it out, and what is not named counts for the pairs that
    the store has of it (data/mixture.py). Shares are within a bucket: how many rows a bucket has is its own."""
    seed: int = 0

    def __post_init__(self):
        _check(self, "data", generic_instruction=(0, 1), drop_example=(0, 1), repeat_example=(0, 1), seed=(0, _ANY))
        for name, weight in self.weights.items():
            if not 0 <= weight < _ANY:
                raise UserError(f"data.weights: {name!r} has {weight}; give a number of pairs, 0 to leave it out")
        names = [b.name for b in self.buckets]
        if not names or len(set(names)) < len(names):
            raise UserError(f"data.buckets {names}: give at least one, each with a name of its own")


LoraTarget = Literal["wq", "wk", "wv", "wo", "gate", "up", "down"]
LORA_TARGETS: tuple[LoraTarget, ...] = get_args(LoraTarget)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up (the paper: lr 1e-4, cosine, batch 1024, 20k steps)."""

    __pydantic_config__ = _STRICT
    name: Literal["adamw", "muon"] = "adamw"
    """muon: orthogonalised momentum for the matrices of the blocks, AdamW for the rest; the same learning rate fits both. Fewer steps
    where a model is trained from nothing."""
    learning_rate: float = 1e-4
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    warmup_steps: int = 200
    final_fraction: float = 0.0
    """Learning rate at the last step, as a fraction of the peak."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    xp_lr_multiplier: float = 1.0
    """Learning rate of the XP embeddings relative to the rest; they have no weight decay."""
    trainable: Literal["all", "xp", "image_head", "lora"] = "all"
    """all: everything. xp: the XP embeddings alone. image_head: head rows of the image tokens alone. lora: the XP embeddings, and
    low-rank adapters that the exported model has merged into its matrices."""
    lora_rank: int = 16
    """Inner dimension of the adapters A B."""
    lora_alpha: float = 16.0
    """Adapters are multiplied by alpha / rank."""
    lora_targets: tuple[LoraTarget, ...] = LORA_TARGETS
    """Matrices of the blocks that get adapters."""
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which parameters that are not trained are kept. Chameleon's were published in bfloat16, which holds them exactly."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which Adam's moments are kept between steps; bfloat16 halves their memory and is rounded stochastically."""
    ema_decay: float = 0.0
    """Exponential moving average of the weights, kept beside them, of at most (1 + step) / (10 + step); 0 turns it off."""

    def __post_init__(self):
        fractions = ("final_fraction", "beta1", "beta2", "ema_decay")
        positive = ("learning_rate", "warmup_steps", "eps", "weight_decay", "clip_norm", "xp_lr_multiplier", "lora_alpha")
        _check(self, "optim", **dict.fromkeys(fractions, (0, 1)), **dict.fromkeys(positive, (0, _ANY)), lora_rank=(1, _ANY))
        unknown = [name for name in self.lora_targets if name not in LORA_TARGETS]
        if unknown or not self.lora_targets:
            raise UserError(f"optim.lora_targets {list(self.lora_targets)}: give one or more of {', '.join(LORA_TARGETS)}")
        if self.trainable == "all" and self.frozen_dtype != "float32":
            raise UserError(f"optim.frozen_dtype {self.frozen_dtype}: nothing is frozen; set optim.trainable to xp, image_head or lora")


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    __pydantic_config__ = _STRICT
    steps: int = 20_000
    accumulate: int = 1
    """Microbatches per step, summed inside the compiled step; each must hold rows / accumulate rows of every bucket."""
    z_loss: float = 1e-5
    dropout: float = 0.0
    """Residual-branch dropout, training only (Lumina-mGPT 7B uses 0.05)."""
    loss_chunk: int = 2048
    """Answer tokens per slice of the head; bounds the memory of the logits."""
    seed: int = 0
    log_every: int = 10
    eval_every: int = 500
    """0 turns evaluation off."""
    eval_batches: int = 4
    save_every: int = 1000
    keep: int = 3
    """Newest checkpoints kept; older ones are removed."""
    init_from: str | None = None
    """A model folder to start from (any format that from_pretrained reads); None starts from random weights."""
    keep_best: int = 1
    """Checkpoints with the lowest held-out loss, kept as well (of those saved at a step that was evaluated)."""
    spike_factor: float = 0.0
    """The run is broken when its loss exceeds this multiple of its running mean; 0 turns that off. One that is not finite always is."""
    on_divergence: Literal["stop", "roll-back"] = "stop"
    """What a broken run does: end with a message, or go back to the newest checkpoint and leave out the rows since then."""
    samples: int = 0
    """Held-out rows drawn at every evaluation, into samples/ and TensorBoard; runs of one process only."""
    profile: tuple[int, int] | None = None
    """First and last step (from 1) of a profile, written to WORKDIR/profile for TensorBoard or Perfetto."""
    wandb_project: str | None = None

    def __post_init__(self):
        counts = ("steps", "accumulate", "loss_chunk", "log_every", "eval_batches", "save_every", "keep")
        _check(
            self,
            "train",
            **dict.fromkeys(counts, (1, _ANY)),
            dropout=(0, 0.99),
            z_loss=(0, _ANY),
            seed=(0, _ANY),
            eval_every=(0, _ANY),
            spike_factor=(0, _ANY),
            keep_best=(0, _ANY),
            samples=(0, _ANY),
        )
        if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1]:
            raise UserError(f"train.profile is {self.profile}; it must be a first and a last step, counted from 1")  # fmt: skip


@dataclass(frozen=True)
class Config:
    """One run, whole."""

    __pydantic_config__ = _STRICT
    model: ModelConfig = field(default_factory=ModelConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


PRESETS: dict[str, ModelConfig] = {
    "7b": ModelConfig(),
    "30b": ModelConfig(dim=8192, num_layers=48, num_heads=64, num_kv_heads=8, ffn_dim=22016, swin_norm=True),
    # A Chameleon in everything but size: 64 px images of 16 x 16 codes, about 20 million parameters.
    "mini": ModelConfig(
        vocab_size=2048, dim=384, num_layers=8, num_heads=6, num_kv_heads=6, head_dim=64, ffn_dim=1024, num_xp_tokens=16,
        vq=VQConfig(channels=48, channel_multipliers=(1, 2, 4), num_res_blocks=2, latent_channels=64, embed_dim=32,
                    num_codes=1024, image_size=64),
    ),
}  # fmt: skip


def to_json(config) -> str:
    """Any of the dataclasses above as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(cls: type[T], text: str, *, source: str = "config") -> T:
    """Reads what `to_json` wrote, strictly.

    Raises:
      UserError: on malformed JSON, an unknown key or a wrong type, naming `source` and the key.
    """
    try:
        return pydantic.TypeAdapter(cls).validate_json(text)
    except pydantic.ValidationError as e:
        first = e.errors(include_url=False)[0]
        where = ".".join(str(p) for p in first["loc"])
        hint = "remove it or correct its spelling" if "extra" in first["type"] or "unexpected" in first["type"] else first["msg"]
        what = "unknown key" if "unexpected" in first["type"] or "extra" in first["type"] else "bad value for"
        raise UserError(f"{source}: {what} {where!r}: {hint}" if where else f"{source}: {first['msg']}") from None


def load_json(cls: type[T], path: str | Path) -> T:
    """Reads a JSON file written by `to_json`; errors name the file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"{path}: cannot read: {e.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not text in UTF-8; save it as that") from None
    return from_json(cls, text, source=str(path))
