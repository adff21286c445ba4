"""Our own model folders, as a source and a target.

    config.json           ModelConfig
    text_tokenizer.json   words and special ids
    params/outer          Orbax: embed, head, norm, xp
    params/block_000 ...  Orbax: the tensors of one layer each, so that any size is read and written in little memory
    vqgan/                Orbax: the image tokenizer, flat names
    vqgan.json            VQConfig

A token store carries the last two and the text tokenizer too, so that it explains itself.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from xprompt_jax.checkpoint import load_arrays, save_arrays
from xprompt_jax.config import ModelConfig, VQConfig, load_json, to_json
from xprompt_jax.convert.weights import VQGAN_PREFIX, Part, Read, abstract_vqgan, groups_of, shapes_of
from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path, check_place, temporary_name
from xprompt_jax.mesh import all_agree, from_first
from xprompt_jax.model.params import flatten, unflatten
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.tokens import Tokenizer

FILES = ("config.json", "text_tokenizer.json", "params", "vqgan", "vqgan.json")
MODEL_FOLDER = ("params", "vqgan.json"), "a model folder"
"""What `files.check_place` knows a model folder by."""


class NativeSource:
    """A folder of ours, as a `Source`."""

    kind = "xprompt"
    has_xp = True
    draws = True

    def __init__(self, folder: Path):
        for name in FILES:
            if not (folder / name).exists():
                raise UserError(f"{folder}: no {name}: not a complete model folder of ours; train one, or copy it again")
        self.folder, self.tokenizer = folder, folder / "text_tokenizer.json"
        self.config = load_json(ModelConfig, folder / "config.json")
        if self.config.vq != load_json(VQConfig, folder / "vqgan.json"):
            raise UserError(f"{folder}: vqgan.json and config.json describe different VQGANs; copy the folder again")
        self._shapes = shapes_of(self.config)
        self._group = {name: part for part in groups_of(self.config) for name in part.tensors}
        self._open: tuple[str, dict[str, np.ndarray]] = ("", {})

    def files(self) -> list[Path]:
        """All weight files."""
        return [f for part in ("params", "vqgan") for f in sorted((self.folder / part).rglob("*")) if f.is_file()]

    def read(self, name: str) -> np.ndarray:
        """One tensor; its group stays in memory until another one is asked for."""
        part = self._group[name]
        if self._open[0] != part.name:
            self._open = "", {}  # let go of the old group before the new one is read
            stored = {_key(n): self._shapes[n] for n in part.tensors}
            self._open = part.name, load_arrays(_place(self.folder, part), stored)
        return self._open[1][_key(name)]


class NativeTarget:
    """A folder of ours, being written."""

    def __init__(self, folder: Path, config: ModelConfig):
        self.folder, self.config = folder, config
        (folder / "params").mkdir(parents=True, exist_ok=True)

    def parts(self) -> Sequence[Part]:
        """Outer parameters, layers, VQGAN."""
        return groups_of(self.config)

    def write(self, part: Part, read: Read) -> None:
        """One group."""
        place = _place(self.folder, part)
        if jax.process_index() == 0:
            shutil.rmtree(place, ignore_errors=True)  # of a run that was killed
        save_arrays(place, {_key(name): read(name) for name in part.tensors})

    def finish(self, tokenizer: Path) -> None:
        """The small files."""
        Tokenizer.from_file(tokenizer, limit=self.config.vocab_size).save(self.folder / "text_tokenizer.json")
        (self.folder / "vqgan.json").write_text(to_json(self.config.vq))
        (self.folder / "config.json").write_text(to_json(self.config))


def save_folder(folder: str | Path, config: ModelConfig, read: Read, tokenizer: Tokenizer) -> None:
    """Writes a model folder from tensors at hand, whole or not at all; one that is there is replaced.

    All processes of a run call it: they read the same tensors in the same order and write together; the first puts the folder in place.

    Raises:
      UserError: another folder is there, or the place cannot be written.
    """
    folder, first = check_place(folder, *MODEL_FOLDER), jax.process_index() == 0
    writer = from_first(os.getpid())
    with atomic_path(folder, writer) if first else nullcontext(temporary_name(folder, writer)) as temporary:
        target = NativeTarget(temporary, config)
        for part in target.parts():
            target.write(part, read)
        if first:
            tokenizer.save(temporary / "text_tokenizer.json")
            target.finish(temporary / "text_tokenizer.json")
        all_agree(True)  # all have written
    all_agree(True)  # and it is in place


def save_tokenizers(folder: str | Path, vqgan: VQGAN, tokenizer: Tokenizer) -> None:
    """Writes the text and the image tokenizer into a new folder, as a model folder has them."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    tokenizer.save(folder / "text_tokenizer.json")
    (folder / "vqgan.json").write_text(to_json(vqgan.config))
    save_arrays(folder / "vqgan", {name: np.asarray(value) for name, value in flatten(vqgan).items()})


def load_tokenizers(folder: str | Path) -> tuple[VQGAN, Tokenizer]:
    """Reads what `save_tokenizers` wrote; a model folder of ours will do.

    Raises:
      UserError: a file is missing or damaged.
    """
    folder = Path(folder)
    like = abstract_vqgan(load_json(VQConfig, folder / "vqgan.json"))
    arrays = load_arrays(folder / "vqgan", {name: tuple(p.shape) for name, p in flatten(like).items()})
    vqgan = unflatten(like, {name: jnp.asarray(value.astype(np.float32)) for name, value in arrays.items()})
    return vqgan, Tokenizer.from_file(folder / "text_tokenizer.json")


def _place(folder: Path, part: Part) -> Path:
    return folder / "vqgan" if part.name == "vqgan" else folder / "params" / part.name


def _key(name: str) -> str:
    """The name inside a group's checkpoint: without vqgan/ and without the layer's number."""
    if name.startswith(VQGAN_PREFIX):
        return name.removeprefix(VQGAN_PREFIX)
    parts = name.split(".", 2)
    return parts[2] if parts[0] == "blocks" else name
