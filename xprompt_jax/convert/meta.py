"""Meta's own folders: `consolidated.pth`, or one `consolidated.NN.pth` for each tensor-parallel rank (facts: chameleon.md 1.5).

    models/7b/      consolidated.pth  params.json  consolidate_params.json  checklist.chk
    tokenizer/      text_tokenizer.json  vqgan.yaml  vqgan.ckpt

The tokenizer's folder is found beside or above the model's, or inside it. XP embeddings have no place in these files; ours
stand beside them in xprompt.safetensors.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xprompt_jax.config import ModelConfig
from xprompt_jax.convert.names import HF_XP, LAYER, Entry, meta_decoder
from xprompt_jax.convert.safetensors import Tensors, Writer
from xprompt_jax.convert.torchfile import TorchFile
from xprompt_jax.convert.torchwriter import TorchWriter
from xprompt_jax.convert.vqgan import VQGANFile, write_vqgan
from xprompt_jax.convert.weights import VQGAN_PREFIX, Part, Read, checked, groups_of, shapes_of
from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path
from xprompt_jax.model.params import stacked
from xprompt_jax.tokens import Tokenizer

log = logging.getLogger(__name__)

TOKENIZERS = tuple(f"{place}text_tokenizer.json" for place in ("", "tokenizer/", "../tokenizer/", "../../tokenizer/"))
XP_FILE = "xprompt.safetensors"


def rank_files(folder: Path) -> list[Path]:
    """consolidated.pth, or consolidated.00.pth and on, in order; empty where there is none.

    Raises:
      UserError: a rank is missing.
    """
    whole = folder / "consolidated.pth"
    if whole.exists():
        return [whole]
    files = sorted(folder.glob("consolidated.*.pth"))
    numbers = [int(m[1]) for f in files if (m := re.fullmatch(r"consolidated\.(\d+)\.pth", f.name))]
    expected = _json(folder / "consolidate_params.json").get("model_parallel_size", len(numbers))
    missing = sorted(set(range(max(expected, len(numbers)))) - set(numbers))
    if files and missing:
        raise UserError(f"{folder}: consolidated.{missing[0]:02d}.pth is missing (of {max(expected, len(numbers))} ranks); fetch it too")
    return files


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not readable JSON ({e}); fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; fetch it again")
    return {**content, **content.get("model", {})} if isinstance(content.get("model", {}), dict) else content


class MetaSource:
    """A folder in Meta's format, as a `Source`."""

    kind = "meta"

    def __init__(self, folder: Path, *, num_xp_tokens: int, vqgan: Path | None = None, tokenizer: Path | None = None):
        self.folder = folder
        self._ranks = [TorchFile(path) for path in rank_files(folder)]
        self._prefix = next((p for p in ("", "model.") if f"{p}tok_embeddings.weight" in self._ranks[0]), None)
        if self._prefix is None:
            raise UserError(f"{self._ranks[0].path}: no tok_embeddings.weight; not a decoder in Meta's format")
        self._vqgan = VQGANFile.find(folder, vqgan)
        xp = folder / XP_FILE
        self._xp = Tensors(folder)[HF_XP] if xp.exists() else None
        self.has_xp = self._xp is not None
        self.draws = self.has_xp  # Meta's release cannot; what we exported can
        self.config = self._read_config(num_xp_tokens if self._xp is None else len(self._xp))
        self.tokenizer = tokenizer or next((folder / p for p in TOKENIZERS if (folder / p).exists()), folder / TOKENIZERS[0])
        self._entries = {entry.ours: entry for entry in meta_decoder(self.config, len(self._ranks))}
        self._shapes = shapes_of(self.config)

    def files(self) -> list[Path]:
        """All weight files."""
        return [f.path for f in self._ranks] + [self._vqgan.path] + ([self.folder / XP_FILE] if self.has_xp else [])

    def read(self, name: str) -> np.ndarray:
        """One tensor under our name, all ranks joined."""
        if name.startswith(VQGAN_PREFIX):
            value = self._vqgan[name.removeprefix(VQGAN_PREFIX)]
        elif name == "xp":
            if self._xp is None:
                raise KeyError(name)
            value = self._xp
        else:
            whole, layer = stacked(name)
            entry = self._entries[whole]
            theirs = f"{self._prefix}{entry.theirs.replace(LAYER, str(layer))}"
            value = self._join(theirs, entry)
            try:
                value = entry.load(value)
            except ValueError:
                raise UserError(f"{self.folder}: {theirs} has shape {value.shape}, which does not fit params.json") from None
        return checked(name, value, self._shapes[name], self.folder)

    def _join(self, theirs: str, entry: Entry) -> np.ndarray:
        for rank in self._ranks:
            if theirs not in rank:
                raise UserError(f"{rank.path}: no tensor {theirs}; the file is damaged or not Chameleon's")
        pieces = [rank[theirs] for rank in self._ranks]
        if entry.join == "stack":
            return np.stack(pieces)
        if entry.join == "same":
            if any(not np.array_equal(p.view(np.uint8), pieces[0].view(np.uint8)) for p in pieces):
                log.warning("%s: %s differs between ranks; their mean is taken", self.folder, theirs)
                return np.mean([p.astype(np.float32) for p in pieces], axis=0).astype(pieces[0].dtype)
            return pieces[0]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=entry.join)

    def _read_config(self, num_xp_tokens: int) -> ModelConfig:
        """Sizes from the tensors' shapes; params.json has what shapes cannot tell."""
        path = self.folder / "params.json"
        p = _json(path)
        for key in ("dim", "n_layers", "n_heads"):
            if not isinstance(p.get(key), int):
                raise UserError(f"{path}: no number {key!r}; the file beside Meta's weights has it: fetch it")
        ranks = len(self._ranks)
        shape = lambda name: self._ranks[0].tensors[f"{self._prefix}{name}"].shape
        head_dim = p.get("head_dim", p["dim"] // p["n_heads"])
        try:
            return ModelConfig(
                vocab_size=shape("output.weight")[0] * ranks, dim=p["dim"], num_layers=p["n_layers"], num_heads=p["n_heads"],
                num_kv_heads=shape("layers.0.attention.wk.weight")[0] * ranks // head_dim, head_dim=head_dim,
                ffn_dim=shape("layers.0.feed_forward.w1.weight")[0] * ranks, swin_norm=bool(p.get("swin_norm", False)),
                norm_eps=float(p.get("norm_eps", 1e-5)), rope_theta=float(p.get("rope_theta", 10000.0)),
                num_xp_tokens=num_xp_tokens, layout=p.get("xprompt_layout", "plain"), vq=self._vqgan.config,
            )  # fmt: skip
        except KeyError as e:
            raise UserError(f"{self._ranks[0].path}: no tensor {e.args[0]}; the file is damaged or not Chameleon's") from None


class MetaTarget:
    """A folder in Meta's format.

    Args:
      ranks: tensor-parallel ranks, one file each; 1 writes consolidated.pth.
    """

    def __init__(self, folder: Path, config: ModelConfig, ranks: int):
        self.folder, self.config, self.ranks = folder, config, ranks
        for name in ("vocab_size", "dim", "num_heads", "num_kv_heads", "ffn_dim"):
            if getattr(config, name) % ranks:
                raise UserError(f"--shards {ranks}: {name} {getattr(config, name)} is not a multiple of it")
        self._entries = {entry.ours: entry for entry in meta_decoder(config, ranks)}
        *decoder, images = groups_of(config)
        self._decoder = [Part(part.name, tuple(n for n in part.tensors if n != "xp")) for part in decoder]
        self._parts = [*self._decoder, images, Part("xp", ("xp",))]
        names = ["consolidated.pth"] if ranks == 1 else [f"consolidated.{r:02d}.pth" for r in range(ranks)]
        self._files = [TorchWriter(folder / name) for name in names]

    def parts(self) -> Sequence[Part]:
        """The decoder layer by layer, the VQGAN and the XP embeddings."""
        return self._parts

    def write(self, part: Part, read: Read) -> None:
        """One part."""
        if part.name == "vqgan":
            folder = self.folder / "tokenizer"
            folder.mkdir(exist_ok=True)
            write_vqgan(folder, self.config.vq, [(n.removeprefix(VQGAN_PREFIX), read(n)) for n in part.tensors])
        elif part.name == "xp":
            with atomic_path(self.folder / XP_FILE) as temporary, Writer(temporary, (HF_XP,)) as out:
                out.write(HF_XP, read("xp"))
        else:
            self._write_decoder(part, read)

    def _write_decoder(self, part: Part, read: Read) -> None:
        """The files of all ranks grow together. One may be a layer ahead of a killed run's notes: what it has is kept."""
        for name in part.tensors:
            whole, layer = stacked(name)
            entry = self._entries[whole]
            theirs = entry.theirs.replace(LAYER, str(layer))
            value = entry.save(read(name))
            for rank, file in enumerate(self._files):
                if theirs in file:
                    continue
                if entry.join == "same":
                    piece = value
                elif entry.join == "stack":
                    piece = value[rank]
                else:
                    piece = np.split(value, self.ranks, axis=entry.join)[rank]
                file.write(theirs, piece)
        for file in self._files:
            file.mark()

    def finish(self, tokenizer: Path) -> None:
        """params.json, consolidate_params.json, tokenizer/text_tokenizer.json and checklist.chk."""
        c = self.config
        params: dict[str, Any] = {
            "dim": c.dim, "n_layers": c.num_layers, "n_heads": c.num_heads, "n_kv_heads": c.num_kv_heads, "vocab_size": c.vocab_size,
            "multiple_of": 256, "norm_eps": c.norm_eps, "rope_theta": c.rope_theta, "swin_norm": c.swin_norm, "qk_normalization": True,
        }  # fmt: skip
        # Meta has no words for these; where they are as usual, the file is as Meta's own.
        if c.head_dim * c.num_heads != c.dim:
            params["head_dim"] = c.head_dim
        if c.layout != "plain":
            params["xprompt_layout"] = c.layout
        (self.folder / "params.json").write_text(json.dumps({"model": params}, indent=2))
        (self.folder / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": self.ranks}))
        Tokenizer.from_file(tokenizer, limit=c.vocab_size).save(self.folder / "tokenizer" / "text_tokenizer.json")
        sums = [f"{file.seal()}  {file.path.name}\n" for file in self._files]
        (self.folder / "checklist.chk").write_text("".join(sums))


def fewest_ranks(source: Any) -> int:
    """The smallest number of tensor-parallel ranks whose shared QK-norms can hold a source's, exactly.

    Raises:
      UserError: there is none up to the number of kv heads.
    """
    config: ModelConfig = source.config
    sides = [
        f"blocks.{i}.attention.{n}"
        for i in range(config.num_layers)
        for n in ("q_norm.scale", "q_norm.bias", "k_norm.scale", "k_norm.bias")
    ]
    norms = [source.read(name) for name in sides]
    for ranks in (r for r in (1, 2, 4, 8) if config.num_kv_heads % r == 0 and config.num_heads % r == 0):
        shared = (x.reshape(ranks, len(x) // ranks, -1).view(np.uint8) for x in norms)
        if all((x == x[:, :1]).all() for x in shared):
            return ranks
    raise UserError("the QK-norms differ from head to head, which Meta's layout cannot hold; export to huggingface")


def wrong_checksums(files: Sequence[Path]) -> list[Path]:
    """Those of `files` whose MD5 is not the one in checklist.chk, which lies beside them or up to two folders above.

    Files that no list names are passed over.
    """
    wrong = []
    for file in files:
        for folder in (file.parent, *file.parent.parents[:2]):
            path = folder / "checklist.chk"
            lines = [line.split() for line in path.read_text().splitlines()] if path.is_file() else []
            sums = {(folder / line[1]).resolve(): line[0] for line in lines if len(line) == 2}
            if file.resolve() in sums and _md5(file) != sums[file.resolve()]:
                wrong.append(file)
    return wrong


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
