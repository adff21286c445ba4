"""In-context image generation: train on image pairs, compile an example, do the same to new images.

The command line, `xprompt demo | tokenize | train | convert | compile | sample | describe`. Each command is a dataclass
of flags with a `run` method. A mistake is one line on stderr and exit code 2. Heavy imports stay inside `run`, so that
`--help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import logging
import os
import re
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from xprompt_jax.config import Config, load_json
from xprompt_jax.errors import UserError


@dataclass
class Demo:
    """Train a small X-Prompt model from nothing and draw with it: a few minutes, no downloads, no GPU.

    Opens nothing and uploads nothing; the result is WORKDIR/index.html, WORKDIR/demo.png and a model in WORKDIR/model.

    Example: xprompt demo --photos ~/Pictures
    """

    workdir: Path = Path("demo")
    """Folder for everything the demo makes."""
    photos: Path | None = None
    """A folder of photographs to train on as well; without it, the free ones inside scikit-image are used."""
    seed: int = 0
    """Another seed makes other scenes, another training and other images."""
    quick: bool = False
    """A run of about a minute that shows that everything works, not how well."""
    devices: int = 2
    """Virtual devices to split a CPU into, so that training runs on a real mesh."""

    def run(self) -> None:
        """Runs the demo."""
        if self.devices < 1:
            raise UserError("--devices must be at least 1")
        flags = os.environ.get("XLA_FLAGS", "")
        if "device_count" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={self.devices}"
        from xprompt_jax.demo import run_demo

        page = run_demo(self.workdir, quick=self.quick, photos=self.photos, seed=self.seed)
        print(f"open {page}")


@dataclass
class Tokenize:
    """Turn pairs of images into a token store, once, for any number of training runs.

    Give exactly one source: --manifest, --inputs with --outputs, or --world.

    Examples:
      xprompt tokenize --model demo/model --out data/rain --inputs rainy/ --outputs clean/ --task derain --instruction "remove the rain"
      xprompt tokenize --model demo/model --out data/mine --manifest pairs.jsonl
      xprompt tokenize --model demo/model --out data/world --world 2000 --photos ~/Pictures
    """

    model: Path
    """Model folder whose image and text tokenizers to use."""
    out: Path
    """The store's folder."""
    manifest: Path | None = None
    """JSONL file, one pair a line: {"input": "a.png", "output": "b.png", "instruction": "..."} (see docs/data.md)."""
    inputs: Path | None = None
    """Folder of input images."""
    outputs: Path | None = None
    """Folder of output images; partners have the same name without extension."""
    rename: tuple[str, str] | None = None
    """Regular expression and replacement that turn an input's name into its output's, e.g. --rename rain- norain-."""
    task: str = "custom"
    """Name of the task of --inputs and --outputs."""
    instruction: str = ""
    """What the pairs of --inputs and --outputs do, in words."""
    reverse_instruction: str = ""
    """What they do backwards; empty: they are not trained backwards."""
    world: int | None = None
    """Number of rendered task groups to make."""
    photos: Path | None = None
    """Folder of photographs for the tasks of --world that work on any image."""
    eval_fraction: float = 0.05
    """Held out for evaluation."""
    seed: int = 0
    """Of --world."""

    def run(self) -> None:
        """Writes the store."""
        if sum(s is not None for s in (self.manifest, self.inputs or self.outputs, self.world)) != 1:
            raise UserError("give one source: --manifest FILE, --inputs DIR --outputs DIR, or --world NUMBER")
        if (self.inputs is None) != (self.outputs is None):
            raise UserError("--inputs and --outputs belong together; give both")
        from xprompt_jax.data import sources
        from xprompt_jax.data.tokenise import tokenize
        from xprompt_jax.sample.pretrained import load_tokenizers

        vqgan, tokenizer = load_tokenizers(_model_folder(self.model))
        if self.manifest is not None:
            records = sources.manifest(self.manifest, eval_fraction=self.eval_fraction)
        elif self.inputs is not None and self.outputs is not None:
            records = sources.paired_folders(
                self.inputs, self.outputs, task=self.task, instruction=self.instruction,
                reverse_instruction=self.reverse_instruction, rename=self.rename, eval_fraction=self.eval_fraction,
            )  # fmt: skip
        else:
            size = vqgan.config.image_size
            photos = sources.photographs(self.photos, size) if self.photos else []
            records = sources.world_pairs(
                groups=self.world or 0, pairs_per_group=4, size=size, seed=self.seed, photos=photos, eval_fraction=self.eval_fraction
            )
        store = tokenize(records, vqgan, tokenizer, self.out)
        print(f"{self.out}: {len(store.pairs)} pairs, {len(store.codes)} images")


@dataclass
class Train:
    """Train from one configuration; the same command resumes, and --workdir alone does too.

    Every setting of the configuration is a flag; flags override the file.

    Examples:
      xprompt train --config configs/debug_cpu.py --workdir runs/debug
      xprompt train --config configs/chameleon_7b_pod.py --workdir gs://bucket/run --mesh.fsdp 128 --optim.learning-rate 5e-5
      xprompt train --workdir runs/debug
    """

    workdir: Path
    """Folder of the run: config, checkpoints, metrics, and the model at the end."""
    config: Path | None = None
    """A Python file that defines `config = Config(...)`, or a JSON file; without it, WORKDIR/config.json."""
    distributed: str = "auto"
    """How processes find each other: auto (SLURM, Open MPI, TPU pods), off, or address:port,count,index."""
    settings: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)

    def run(self) -> None:
        """Trains."""
        from xprompt_jax.mesh import log_devices, start_distributed

        start_distributed(self.distributed)
        log_devices()
        from xprompt_jax.runner import run_training

        if run_training(self.settings, self.workdir) is not None:
            print(f"{self.workdir / 'model'}: the trained model")


@dataclass
class Convert:
    """Convert a model between our format and Hugging Face's, exactly.

    Example: xprompt convert --source anole-7b-hf --out models/anole-7b
    """

    source: Path
    """Model folder: ours (Orbax), or Hugging Face safetensors with config.json and tokenizer.json."""
    out: Path
    """Folder to write."""
    to: Literal["xprompt", "huggingface"] = "xprompt"
    """Format to write."""
    num_xp_tokens: int = 64
    """XP tokens to add to a model that has none."""

    def run(self) -> None:
        """Writes the folder."""
        if not self.source.is_dir():
            raise UserError(f"--source {self.source}: no such folder")
        if self.num_xp_tokens < 1:
            raise UserError("--num-xp-tokens must be at least 1")
        from xprompt_jax.sample import pretrained

        if any(self.source.glob("*.safetensors")):
            model = pretrained.load_huggingface(self.source, num_xp_tokens=self.num_xp_tokens)
        else:
            model = pretrained.load(self.source)
        if self.to == "huggingface":
            pretrained.export_huggingface(model, self.out)
        else:
            model.save_pretrained(self.out)
        print(f"{self.out}: model {model.fingerprint}")


@dataclass
class Compile:
    """Turn example pairs into a small file that does the same to any image.

    Example: xprompt compile --model demo/model --inputs before.png --outputs after.png --instruction "remove the rain" --out derain.xprompt
    """

    model: Path
    """Model folder."""
    inputs: tuple[Path, ...]
    """Example input images."""
    outputs: tuple[Path, ...]
    """Their outputs, in the same order."""
    out: Path
    """The compiled prompt to write."""
    instruction: str = ""
    """What the examples do, in words; may be empty."""

    def run(self) -> None:
        """Writes the compiled prompt."""
        if len(self.inputs) != len(self.outputs):
            raise UserError(f"--inputs has {len(self.inputs)} images and --outputs {len(self.outputs)}; give one output for each input")
        from xprompt_jax import Example, XPrompt

        model = XPrompt.from_pretrained(_model_folder(self.model))
        pairs = [Example(a, b, self.instruction) for a, b in zip(self.inputs, self.outputs, strict=True)]
        model.compile(pairs).save(self.out)
        print(f"{self.out}: {len(pairs)} example(s), {self.out.stat().st_size / 2**20:.2f} MiB")


@dataclass
class Sample:
    """Draw images: do to each input what a compiled prompt shows, or draw texts.

    Examples:
      xprompt sample --model demo/model --task derain.xprompt --inputs rainy/*.png --out drawn/
      xprompt sample --model demo/model --texts "a red sphere on a grey floor" --out drawn/
    """

    model: Path
    """Model folder."""
    out: Path
    """Folder for the PNG files."""
    task: Path | None = None
    """Compiled prompt, made by `xprompt compile`."""
    inputs: tuple[Path, ...] = ()
    """Images to work on."""
    texts: tuple[str, ...] = ()
    """Texts to draw instead."""
    instruction: str | None = None
    """Overrides the compiled prompt's instruction."""
    seed: int = 0
    """The same seed draws the same images, whatever else is drawn beside them."""
    num_images: int = 1
    """Images for each input or text."""
    guidance: float = 1.0
    """Scale on the example (or on the text); 1 is off."""
    temperature: float = 1.0
    """0 takes the most likely token; for images that is usually dull."""
    top_k: int = 0
    """Draw among the k most likely tokens; 0 is all."""
    top_p: float = 1.0
    """Draw among the most likely tokens that hold this much probability."""
    decoding: Literal["jacobi", "sequential"] = "jacobi"
    """Several tokens at once, or one by one; both give the same images."""

    def run(self) -> None:
        """Writes the images."""
        if bool(self.texts) == bool(self.inputs):
            raise UserError("give --inputs with --task, or --texts")
        if self.inputs and self.task is None:
            raise UserError("--inputs needs --task FILE; make one with `xprompt compile`")
        from xprompt_jax import CompiledPrompt, XPrompt
        from xprompt_jax.data.images import open_image, save_png

        images = [open_image(path) for path in self.inputs]  # a bad file is named before the model is loaded
        model = XPrompt.from_pretrained(_model_folder(self.model))
        options: dict[str, Any] = {
            "seed": self.seed, "num_images": self.num_images, "guidance": self.guidance, "temperature": self.temperature,
            "top_k": self.top_k, "top_p": self.top_p, "decoding": self.decoding, "progress": True,
        }  # fmt: skip
        if self.task is not None and images:
            drawn = model.generate(CompiledPrompt.load(self.task), images, self.instruction, **options)
            names = [f"{i:04d}-{path.stem}" for i, path in enumerate(self.inputs)]
        else:
            drawn = model.text_to_image(self.texts, **options)
            names = [f"{i:04d}" for i in range(len(self.texts))]
        for i, image in enumerate(drawn):
            part = f"-{i % self.num_images}" if self.num_images > 1 else ""
            save_png(image, self.out / f"{names[i // self.num_images]}{part}.png")
        print(f"{self.out}: {len(drawn)} image(s)")


@dataclass
class Describe:
    """Say in words what changes from one image to another.

    Example: xprompt describe --model demo/model --input before.png --output after.png
    """

    model: Path
    """Model folder."""
    input: Path
    """The first image."""
    output: Path
    """The second image."""
    seed: int = 0
    """Of the words, when the temperature is above 0."""
    temperature: float = 0.0
    """0 takes the most likely words."""

    def run(self) -> None:
        """Prints the description."""
        from xprompt_jax import Example, XPrompt
        from xprompt_jax.data.images import open_image

        pair = Example(open_image(self.input), open_image(self.output))
        model = XPrompt.from_pretrained(_model_folder(self.model))
        print(model.describe([pair], seed=self.seed, temperature=self.temperature))


COMMANDS: dict[str, Any] = {
    "demo": Demo,
    "tokenize": Tokenize,
    "train": Train,
    "convert": Convert,
    "compile": Compile,
    "sample": Sample,
    "describe": Describe,
}


def _model_folder(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"--model {path}: no such folder; `xprompt demo` makes one in demo/model")
    return path


def load_config(path: Path) -> Config:
    """A configuration from a Python file (`config = Config(...)`) or a JSON file.

    Raises:
      UserError: the file is missing, does not run, or defines no configuration.
    """
    if path.suffix == ".json" or not path.is_file():
        return load_json(Config, path)
    try:
        config = runpy.run_path(str(path)).get("config")
    except UserError:
        raise
    except Exception as e:  # whatever a person's file raises: an unknown key is a TypeError
        raise UserError(f"{path}: {type(e).__name__}: {e}") from None
    if not isinstance(config, Config):
        raise UserError(f"{path}: defines no `config = Config(...)`")
    return config


def parse(arguments: Sequence[str]) -> Demo | Tokenize | Train | Convert | Compile | Sample | Describe:
    """Flags -> a command. `train` takes its defaults from the file that --config or --workdir names."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name not in COMMANDS:
        summary = (__doc__ or "").splitlines()[0]
        return tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="xprompt", description=summary, args=list(arguments) or ["--help"])
    kind = COMMANDS[name]
    if kind is not Train:
        return tyro.cli(kind, prog=f"xprompt {name}", args=rest)
    split = [part for flag in rest for part in (flag.split("=", 1) if flag.startswith("--") else [flag])]
    given = dict(itertools.pairwise(split))
    if "--config" in given:
        settings = load_config(Path(given["--config"]))
    elif "--workdir" in given and (Path(given["--workdir"]) / "config.json").exists():
        settings = load_json(Config, Path(given["--workdir"]) / "config.json")
    elif {"-h", "--help"} & set(rest) or "--workdir" not in given:
        settings = Config()
    else:
        raise UserError(f"--workdir {given['--workdir']}: no run there yet; start one with --config FILE")
    default = Train(workdir=tyro.MISSING, settings=settings)
    return tyro.cli(Train, prog="xprompt train", args=rest, default=default)


def _one_line(text: str) -> str:
    """The point of tyro's boxed message in one line: what is wrong, where, and the nearest flags."""
    words = re.sub(r"[─│╭╮╰╯]|-{3,}|\x1b\[[0-9;]*m", " ", text)
    lines = [line for line in (" ".join(line.split()) for line in words.splitlines()) if line]
    found = " ".join(lines)
    if match := re.search(r"Unrecognized options: (.+?)(?= Perhaps | Similar | Available | Arguments | For full |$)", found):
        near = re.findall(r"(?<![\w-])--[\w.-]+", found[match.end() :].split("For full")[0])
        choices = re.search(r"Available subcommands: (.+?)(?= For full |$)", found)
        cure = f"; did you mean {near[0]}?" if near else f"; commands are {choices[1]}" if choices else ""
        return f"unknown: {match[1]}{cure}"
    if "Missing from" in found:
        flags = [line for line in lines if re.match(r"--[\w.-]+ [A-Z{]", line)]
        return f"missing {', '.join(flags)}"
    if match := re.search(r"Error parsing (.+?)(?= Argument helptext| For full |$)", found):
        return f"cannot read {match[1]}"
    return "; ".join(lines[1:])


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point of `xprompt`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            command = parse(arguments)
    except UserError as e:
        _fail(str(e))
    except SystemExit as e:
        if e.code:
            name = f"xprompt {arguments[0]}" if arguments[0] in COMMANDS else "xprompt"
            _fail(f"{_one_line(captured.getvalue())}; see `{name} --help`")
        raise
    # Compiled programs are kept between runs, as `pip` keeps wheels; JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xprompt_jax" / "jit"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("absl", "jax", "orbax", "httpx", "tensorboardX"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        command.run()
    except UserError as e:
        _fail(str(e))
    except KeyboardInterrupt:
        print("xprompt: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            _fail(f"{e.filename or 'disk'}: {e.strerror}; free space or choose another folder")
        raise


def _fail(message: str) -> None:
    print("xprompt: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(2)
