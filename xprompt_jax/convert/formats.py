"""What a path or a hub name is, and the source that reads it."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Literal

from xprompt_jax.convert.huggingface import HuggingFaceSource
from xprompt_jax.convert.meta import MetaSource, rank_files
from xprompt_jax.convert.native import NativeSource
from xprompt_jax.convert.weights import Source
from xprompt_jax.errors import UserError

MINI = Path(__file__).parent.parent / "mini"
"""The model that ships with the package; `from_pretrained("mini")` where there is no folder of that name."""

Format = Literal["xprompt", "huggingface", "meta"]

# Weights as safetensors or Orbax, and small files. Never a pickle from the hub.
_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer.json", "text_tokenizer.json", "vqgan.json",
              "params/**", "vqgan/**")  # fmt: skip


def open_source(
    name: str | Path, *, num_xp_tokens: int = 64, vqgan: str | Path | None = None, tokenizer: str | Path | None = None,
    format: Format | None = None, layout: Literal["plain", "lumina"] | None = None,
) -> Source:  # fmt: skip
    """Finds out what a model is, from its files.

    Args:
      name: a folder, "mini" for the model that ships with the package, or org/name on the Hugging Face hub (its cache is used where there
        is no network).
      num_xp_tokens: S, for models that have no XP embeddings.
      vqgan: Meta's vqgan.ckpt, or a .safetensors with the same names, in place of the model's own.
      tokenizer: a text_tokenizer.json in place of the model's own.
      format: which one, where a folder holds several.
      layout: how the model frames images (`tokens.Layout`); None believes the folder: Lumina-mGPT's own way, what we wrote, or plain.

    Raises:
      UserError: nothing is there, files are missing, several formats lie in one folder, or the layout is unknown.
    """
    if layout not in (None, "plain", "lumina"):
        raise UserError(f"layout {layout!r} is unknown; use plain or lumina")
    source = _open(_locate(name), num_xp_tokens=num_xp_tokens, vqgan=vqgan, tokenizer=tokenizer, format=format)
    if layout is not None:
        source.config = dataclasses.replace(source.config, layout=layout)
    return source


def _open(
    folder: Path, *, num_xp_tokens: int, vqgan: str | Path | None, tokenizer: str | Path | None, format: Format | None
) -> Source:  # fmt: skip
    found = _formats(folder)
    if format is not None and format not in found:
        raise UserError(f"{folder}: holds no {format} model ({_seen(folder)})")
    if not found:
        raise UserError(f"{folder}: no model here ({_seen(folder)}). Give a folder with params/ (ours), *.safetensors (Hugging Face) or "
                        "consolidated*.pth (Meta)")  # fmt: skip
    if format is None and len(found) > 1:
        raise UserError(f"{folder}: holds {' and '.join(found)} weights; choose with --format")
    kind = format or found[0]
    vqgan, tokenizer = (None if p is None else Path(p) for p in (vqgan, tokenizer))
    if kind == "xprompt":
        if vqgan or tokenizer:
            raise UserError(f"{folder}: a model folder of ours has its own VQGAN and tokenizer; leave --vqgan and --tokenizer out")
        return NativeSource(folder)
    source: Source = (HuggingFaceSource if kind == "huggingface" else MetaSource)(
        folder, num_xp_tokens=num_xp_tokens, vqgan=vqgan, tokenizer=tokenizer
    )
    if not source.tokenizer.is_file():
        raise UserError(f"{source.tokenizer}: no such file; copy text_tokenizer.json from the folder of the original weights, or name it "
                        "with --tokenizer")  # fmt: skip
    return source


def _formats(folder: Path) -> list[Format]:
    found: list[Format] = []
    if (folder / "params").is_dir() or (folder / "vqgan.json").exists():
        found.append("xprompt")
    if (folder / "config.json").exists() and any(f.name != "xprompt.safetensors" for f in folder.glob("*.safetensors")):
        found.append("huggingface")
    if rank_files(folder):
        found.append("meta")
    return found


def _seen(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    if any(n.endswith((".bin", ".pt")) for n in names) and not any(n.endswith(".safetensors") for n in names):
        return "weights as .bin or .pt; ask for safetensors"
    inner = [p.parent for p in folder.glob("**/consolidated*.pth")] or [p.parent for p in folder.glob("*/*.safetensors")]
    if inner:
        return f"did you mean {sorted(set(inner))[0]}?"
    return f"it has {', '.join(names[:4]) or 'no files'}{', ...' if len(names) > 4 else ''}"


def _locate(name: str | Path) -> Path:
    """A folder, or the local copy of a hub repository."""
    path = Path(name)
    if path.is_dir():
        return path
    if str(name) == "mini":
        return MINI
    if path.exists():
        raise UserError(f"{path}: a file; give the folder it lies in")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or str(name).startswith("."):
        raise UserError(
            f"{name}: no such model folder; give a folder, org/name on the hub, or mini for the model that ships with the package"
        )
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(_HUB_FILES)))
    except (errors.GatedRepoError, errors.RepositoryNotFoundError):
        raise UserError(f"{name}: no such folder, and no such repository on the hub that you may read; for a gated one, accept its "
                        "licence there and run `hf auth login`") from None  # fmt: skip
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as e:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise UserError(
            f"{name}: no such folder, not in the hub's cache, and the hub cannot be reached{offline}: {type(e).__name__}"
        ) from None
