"""Proof of a conversion: every tensor compared, the decoder run beside Hugging Face's, a certificate next to the weights."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import importlib.util
import json
import logging
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import xprompt_jax
from xprompt_jax.config import ComputeConfig, VQConfig
from xprompt_jax.convert.adapt import Adaptation, Adapted
from xprompt_jax.convert.formats import open_source
from xprompt_jax.convert.huggingface import write_config
from xprompt_jax.convert.meta import wrong_checksums
from xprompt_jax.convert.names import LAYER, hf_decoder
from xprompt_jax.convert.weights import VQGAN_PREFIX, Source, load_decoder, shapes_of
from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path
from xprompt_jax.model.params import stacked
from xprompt_jax.prompt import Role

log = logging.getLogger(__name__)

CERTIFICATE = "certificate.json"
ROWS, LENGTH = 2, 48  # random tokens that both decoders read


@dataclasses.dataclass(frozen=True)
class TensorProof:
    """What became of the tensors."""

    tensors: int
    identical: int
    """Equal to the last bit."""
    max_abs: float
    """Largest difference of any entry."""
    max_rel: float
    """The same, relative to the largest entry of its tensor."""
    worst: str
    """Name of the tensor with the largest relative difference; empty where all are identical."""
    sha256: str
    """Over all converted tensors in order: names, types, shapes, bytes."""


@dataclasses.dataclass(frozen=True)
class LogitProof:
    """Our decoder beside Hugging Face's torch model on the same weights and random tokens, both in float32."""

    max_abs: float
    max_rel: float
    """Relative to the largest logit."""
    kl: float
    """Mean Kullback-Leibler divergence of the next-token distributions, nats."""


def verify(source: Source, out: Path, options: Adaptation, *, progress: bool = True) -> dict[str, Any]:
    """Compares a converted folder with its original and writes `certificate.json` into it.

    Args:
      source: the original.
      out: the folder that `convert` wrote.
      options: what was changed on the way (the same changes are made to the original before comparing).

    Raises:
      UserError: a file is not what Meta's checklist.chk says, a tensor differs, or logits by more than 1e-4 relative.
    """
    original, converted = Adapted(source, options), open_source(out)
    if damaged := wrong_checksums([*source.files(), *converted.files()]):
        raise UserError(f"{damaged[0]}: its MD5 is not the one in checklist.chk; fetch it again")
    if original.config != converted.config:
        raise UserError(f"{out}: another architecture than {source.tokenizer.parent}: {converted.config} is not {original.config}")
    tensors = _compare_tensors(original, converted, progress=progress)
    logits = _compare_logits(converted)
    certificate = {
        "verified": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source": {"kind": source.kind, "files": {f.name: f.stat().st_size for f in source.files()}},
        "converted": converted.kind,
        "options": dataclasses.asdict(options),
        "tensors": dataclasses.asdict(tensors),
        "logits": dataclasses.asdict(logits) if logits else "not compared: see the log",
        "versions": {"xprompt_jax": xprompt_jax.__version__, "jax": jax.__version__, "numpy": np.__version__},
    }
    with atomic_path(out / CERTIFICATE) as temporary:
        temporary.write_text(json.dumps(certificate, indent=2))
    if tensors.identical < tensors.tensors:
        wrong = tensors.tensors - tensors.identical
        raise UserError(f"{out}: {wrong} of {tensors.tensors} tensors differ from the original, {tensors.worst} by {tensors.max_rel:.1e} "
                        f"relative; convert again (details in {CERTIFICATE})")  # fmt: skip
    if logits and not logits.max_rel < 1e-4:
        raise UserError(f"{out}: logits differ from Hugging Face's by {logits.max_rel:.1e} relative; report this with {CERTIFICATE}")
    return certificate


def _compare_tensors(original: Source, converted: Source, *, progress: bool) -> TensorProof:
    digest, identical, max_abs, max_rel, worst = hashlib.sha256(), 0, 0.0, 0.0, ""
    names = list(shapes_of(original.config))
    for name in tqdm(names, desc="comparing tensors", unit="tensor", disable=not progress):
        a, b = original.read(name), converted.read(name)
        digest.update(f"{name} {b.dtype} {b.shape}".encode())
        digest.update(np.ascontiguousarray(b).reshape(-1).view(np.uint8).data)
        if a.dtype == b.dtype and np.array_equal(_bits(a), _bits(b)):
            identical += 1
            continue
        x, y = a.astype(np.float64), b.astype(np.float64)
        difference = float(np.max(np.abs(x - y), initial=0.0))
        relative = difference / max(float(np.max(np.abs(x), initial=0.0)), 1e-30)
        max_abs = max(max_abs, difference)
        if relative >= max_rel:
            max_rel, worst = relative, name
    return TensorProof(len(names), identical, max_abs, max_rel, worst, digest.hexdigest())


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def _compare_logits(converted: Source) -> LogitProof | None:
    """None, with the reason in the log, where torch is missing or memory is short."""
    if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        log.info("logits not compared: install torch and transformers for that (pip install 'xprompt-jax[parity]' torch)")
        return None
    needed = 4 * 3 * sum(int(np.prod(s)) for s in shapes_of(converted.config).values())
    have = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > have:
        log.info("logits not compared: both decoders in float32 need %.0f GiB, %.0f are free", needed / 2**30, have / 2**30)
        return None
    c = converted.config
    ids = np.random.default_rng(0).integers(0, c.vocab_size, (ROWS, LENGTH), dtype=np.int32)
    ours = _our_logits(converted, ids)
    theirs = _their_logits(converted, ids)
    p, q = _log_softmax(theirs), _log_softmax(ours)
    difference = float(np.abs(ours - theirs).max())
    return LogitProof(difference, difference / float(np.abs(theirs).max()), float(np.sum(np.exp(p) * (p - q), axis=-1).mean()))


def _our_logits(source: Source, ids: np.ndarray) -> np.ndarray:
    decoder = load_decoder(source, dtype=jnp.float32)
    task, zero = jnp.full(ids.shape, Role.TD, jnp.int32), jnp.zeros(ids.shape, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return np.asarray(decoder.logits(jnp.asarray(ids), task, zero, positions, zero + 1, ComputeConfig(dtype="float32")))


def torch_decoder(source: Source) -> Any:
    """Hugging Face's `ChameleonForConditionalGeneration` in float32 with a model's decoder in it, for comparisons.

    Its VQGAN is the smallest that Hugging Face accepts, and no word is an image's, or its head would mask it.
    """
    import torch
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    small = VQConfig(channels=32, channel_multipliers=(1,), num_res_blocks=1, latent_channels=32, embed_dim=8, num_codes=8)
    words = {"<s>": 0, "<pad>": 1, "</s>": 2}
    settings = write_config(dataclasses.replace(source.config, vq=small), words, "float32")
    settings["attn_implementation"] = "eager"
    theirs = ChameleonForConditionalGeneration(ChameleonConfig(**settings)).eval()
    slots, entries = theirs.state_dict(), {entry.ours: entry for entry in hf_decoder(source.config)}
    with torch.no_grad():
        for name in (n for n in shapes_of(source.config) if not n.startswith(VQGAN_PREFIX) and n != "xp"):
            whole, layer = stacked(name)
            value = entries[whole].save(source.read(name)).astype(np.float32)
            slots[entries[whole].theirs.replace(LAYER, str(layer))].copy_(torch.from_numpy(value))
    return theirs


def _their_logits(source: Source, ids: np.ndarray) -> np.ndarray:
    import torch

    theirs = torch_decoder(source)
    with torch.no_grad():
        body = theirs.model.language_model if hasattr(theirs.model, "language_model") else theirs.model
        return theirs.lm_head(body(input_ids=torch.tensor(ids, dtype=torch.long)).last_hidden_state).numpy()


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
