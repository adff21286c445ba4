"""What the page asks for, checked and drawn: compiled prompts and rows of images, without a word of HTTP."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import io
import math
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

import xprompt_jax
from xprompt_jax.data.images import open_image, resize_center_crop
from xprompt_jax.errors import UserError
from xprompt_jax.sample.compiled import CompiledPrompt
from xprompt_jax.sample.draw import MAX_BATCH
from xprompt_jax.sample.sampler import Example, XPrompt

MAX_INSTRUCTION = 500
"""Letters of an instruction."""
PROMPTS = 8
"""Compiled prompts that are kept for reuse and download; one of a 7B model takes some 30 MB."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one server takes on; its page says so."""

    upload_mb: float = 20.0
    """Megabytes of one request, all its images together."""
    images: int = 8
    """Images that one request may draw."""
    queue: int = 8
    """Requests that wait or are being drawn; more are turned away."""

    def __post_init__(self):
        if not 0 < self.upload_mb < math.inf:
            raise UserError(f"--max-upload-mb {self.upload_mb:g} must be a number above 0")
        if not 1 <= self.images <= MAX_BATCH:
            raise UserError(f"--max-images {self.images} must be in 1..{MAX_BATCH}, what is drawn at once")
        if self.queue < 1:
            raise UserError(f"--max-queue {self.queue} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Order:
    """One request, checked. Images are uint8 [size, size, 3]."""

    task: CompiledPrompt | tuple[np.ndarray, np.ndarray]
    """A compiled prompt, or an example's input and output."""
    instruction: str
    inputs: Sequence[np.ndarray]
    options: Mapping[str, Any]
    """seed, num_images, guidance, temperature, top_k and top_p of `XPrompt.stream`."""


class Studio:
    """A model and the compiled prompts at hand; one thread at a time may draw."""

    def __init__(self, model: XPrompt, *, tasks: Path | None = None, limits: Limits | None = None):
        if tasks is not None and not tasks.is_dir():
            raise UserError(f"--tasks {tasks}: no such folder; give one with .xprompt files in it")
        self.model, self.limits = model, limits or Limits()
        self._folder = tasks
        self._told: dict[tuple[Path, int], dict[str, Any]] = {}
        self._load = functools.lru_cache(maxsize=PROMPTS)(self._load_file)
        self._compiled: OrderedDict[str, CompiledPrompt] = OrderedDict()

    def about(self) -> dict[str, Any]:
        """The model and the limits, for the page."""
        config, vq = self.model.config, self.model.config.vq
        return {
            "version": xprompt_jax.__version__, "model": self.model.fingerprint, "size": vq.image_size, "rows": vq.grid,
            "layers": config.num_layers, "dim": config.dim, "xp_tokens": config.num_xp_tokens,
            "limits": dataclasses.asdict(self.limits) | {"instruction": MAX_INSTRUCTION},
        }  # fmt: skip

    # --- compiled prompts

    def tasks(self) -> list[dict[str, Any]]:
        """The .xprompt files of the folder as it is now: name, instruction, thumbnails, or the error why one cannot be used."""
        return [self._tell(path) for path in self._paths().values()]

    def _paths(self) -> dict[str, Path]:
        return {_plain(path.stem): path for path in sorted(self._folder.glob("*.xprompt"))} if self._folder else {}

    def _tell(self, path: Path) -> dict[str, Any]:
        key = path, _changed(path)
        if key not in self._told:
            try:
                prompt = self._load(*key)
                told = {"instruction": prompt.instruction, "examples": prompt.num_examples, "thumbnails": prompt.thumbnails}
            except UserError as e:
                told = {"error": str(e)}
            self._told[key] = {"name": _plain(path.stem), **told}
        return self._told[key]

    def _load_file(self, path: Path, _: int) -> CompiledPrompt:
        try:
            prompt = CompiledPrompt.load(path)
            prompt.check(self.model)
        except UserError as e:
            raise UserError(_plain(f"{path.name}: {str(e).removeprefix(f'{path}: ')}")) from None
        return prompt

    def download(self, key: str) -> bytes:
        """The file of a compiled prompt by the key that its `compiled` event told.

        Raises:
          UserError: it has been forgotten.
        """
        prompt = self._compiled.get(key)
        if prompt is None:
            raise UserError("this compiled prompt has been forgotten; draw again and download it then")
        with tempfile.TemporaryDirectory() as folder:
            prompt.save(Path(folder) / "it")
            return (Path(folder) / "it").read_bytes()

    # --- requests

    def check(self, fields: Mapping[str, str], files: Mapping[str, Sequence[bytes]]) -> Order:
        """A form -> an order.

        Args:
          fields: task (a name out of `tasks`), instruction, and the options of `Order` as text; all may be missing.
          files: contents of before, after and inputs.

        Raises:
          UserError: something is missing, out of its range, or no image.
        """
        instruction = fields.get("instruction", "").strip()
        if len(instruction) > MAX_INSTRUCTION:
            raise UserError(f"the instruction has {len(instruction)} letters; {MAX_INSTRUCTION} are allowed")
        inputs, num_images = files.get("inputs", ()), _number(fields, "num_images", 1, 1, self.limits.images)
        if not inputs:
            raise UserError("no image to work on; drop one or more under new images")
        if len(inputs) * num_images > self.limits.images:
            raise UserError(f"{len(inputs) * num_images} images in one request; this server draws {self.limits.images} at once")
        options = {
            "seed": _number(fields, "seed", 0, 0, 2**31 - 1), "num_images": num_images,
            "guidance": _number(fields, "guidance", 1.0, 0.0, 20.0), "temperature": _number(fields, "temperature", 1.0, 0.0, 10.0),
            "top_k": _number(fields, "top_k", 0, 0, self.model.config.vq.num_codes), "top_p": _number(fields, "top_p", 1.0, 1e-3, 1.0),
        }  # fmt: skip
        return Order(self._task(fields.get("task", ""), files), instruction, [self._open(i, "an input") for i in inputs], options)

    def _task(self, name: str, files: Mapping[str, Sequence[bytes]]) -> CompiledPrompt | tuple[np.ndarray, np.ndarray]:
        if name:
            path = self._paths().get(name)
            if path is None:
                raise UserError(f"no compiled prompt {name!r} in this server's folder; reload the page")
            return self._load(path, _changed(path))
        pair = [files.get(side, ()) for side in ("before", "after")]
        if not any(pair):
            raise UserError("no example; drop an image before and after, or choose a compiled prompt")
        if not all(len(side) == 1 for side in pair):
            raise UserError(f"the example has no {'output' if pair[0] else 'input'}; drop one image before and one after")
        return self._open(pair[0][0], "the example's input"), self._open(pair[1][0], "the example's output")

    def _open(self, data: bytes, what: str) -> np.ndarray:
        try:
            return resize_center_crop(open_image(data), self.model.config.vq.image_size)
        except UserError as e:
            raise UserError(f"{what}: {e}") from None

    def draw(self, order: Order) -> Iterator[dict[str, Any]]:
        """Events: `compiled` (where an example was given), `row` after each row of codes, and `done` with the finished images."""
        start = time.perf_counter()
        if isinstance(order.task, CompiledPrompt):
            task = order.task
        else:
            key = hashlib.sha256(b"".join(a.tobytes() for a in order.task) + order.instruction.encode()).hexdigest()[:32]
            known = key in self._compiled
            if not known:
                self._compiled[key] = self.model.compile([Example(*order.task, order.instruction)])
            self._compiled.move_to_end(key)
            while len(self._compiled) > PROMPTS:
                self._compiled.popitem(last=False)
            task = self._compiled[key]
            size = task.k.nbytes + task.v.nbytes
            yield {"event": "compiled", "key": key, "kib": size / 1024, "known": known, "seconds": time.perf_counter() - start}
        rows = self.model.config.vq.grid
        images: Sequence[PIL.Image.Image] = ()
        for row, images in enumerate(self.model.stream(task, order.inputs, order.instruction or None, **order.options), 1):
            if row < rows:
                yield {"event": "row", "row": row, "rows": rows, "images": [_data_uri(image, preview=True) for image in images]}
        yield {"event": "done", "seconds": time.perf_counter() - start, "images": [_data_uri(image) for image in images]}


def _plain(text: str) -> str:
    """Text that can be sent; the name of a file in it need not be UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def _changed(path: Path) -> int:
    """When a file was last changed; 0 of one that is gone, or a link that leads nowhere."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _number(fields: Mapping[str, str], name: str, default: Any, low: Any, high: Any) -> Any:
    """A field of the type of `default`."""
    text = fields.get(name, "").strip()
    try:
        value = type(default)(text) if text else default
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        kind = "a whole number" if isinstance(default, int) else "a number"
        raise UserError(f"{name.replace('_', ' ')} {text[:40]!r} must be {kind} from {low:g} to {high:g}")
    return value


def _data_uri(image: PIL.Image.Image, *, preview: bool = False) -> str:
    """A PNG, or for a large preview a JPEG of a tenth of its size."""
    kind = "JPEG" if preview and image.width > 128 else "PNG"
    data = io.BytesIO()
    image.save(data, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
