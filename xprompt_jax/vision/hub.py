"""Encoders by their name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from xprompt_jax.errors import UserError

# Weights that are data, and small files. Never a pickle from the hub.
_WEIGHTS = ("*.safetensors", "flax_model.msgpack")
_FILES = (*_WEIGHTS, "*.json", "merges.txt")


def locate(place: str | Path) -> Path:
    """A folder or file as it is; org/name on the hub as the folder of its copy in the hub's cache, which is filled where it is not there.

    Args:
      place: for example openai/clip-vit-base-patch32 or facebook/dino-vits16.

    Raises:
      UserError: it is not in the cache and cannot be fetched, or has no weights as safetensors or flax_model.msgpack.
    """
    path = Path(place)
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(place)):
        return path
    import huggingface_hub
    from huggingface_hub import errors

    def copy(local: bool) -> Path:
        return Path(huggingface_hub.snapshot_download(str(place), allow_patterns=list(_FILES), local_files_only=local))

    try:
        if _has_weights(found := copy(local=True)):
            return found
    except errors.LocalEntryNotFoundError:
        pass
    try:
        found = copy(local=False)
    except (errors.GatedRepoError, errors.RepositoryNotFoundError):
        raise UserError(f"{place}: no such folder, and no such repository on the hub that you may read; correct the name, or run "
                        "`hf auth login`") from None  # fmt: skip
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as e:
        raise UserError(f"{place}: no such folder, not in the hub's cache, and the hub cannot be reached ({type(e).__name__}); fetch it "
                        f"where there is a network, with `hf download {place}`, or give a folder") from None  # fmt: skip
    if not _has_weights(found):
        raise UserError(f"{place}: the hub has no weights of it as {' or '.join(_WEIGHTS)}; give a folder with a converted copy")
    return found


def _has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in _WEIGHTS)
