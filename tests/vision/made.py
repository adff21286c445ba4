"""Tiny checkpoints of CLIP and DINO, with the names, layouts and files of the published ones, and random weights."""

import json
import re

import numpy as np
import safetensors.numpy
from flax import serialization

WORDS = ("remove", "the", "rain", "make", "it", "night", "add", "red", "ball", "photo")
VOCAB = 600
CLIP_CONFIG = {
    "model_type": "clip", "projection_dim": 24,
    "text_config": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB,
        "max_position_embeddings": 20, "projection_dim": 24, "hidden_act": "quick_gelu",
    },
    "vision_config": {
        "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 5, "image_size": 32, "patch_size": 8,
        "projection_dim": 24, "hidden_act": "quick_gelu",
    },
}  # fmt: skip
DINO_CONFIG = {
    "model_type": "vit", "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 32,
    "patch_size": 8, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
}  # fmt: skip


def bpe(folder):
    """vocab.json and merges.txt: all bytes, a few words, the two special tokens last, as in OpenAI's."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    tokens, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            if (pair := (parts[0], parts[1])) not in merges:
                merges.append(pair)
                tokens.append("".join(pair))
            parts[:2] = ["".join(pair)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    assert len(tokens) <= VOCAB and len(set(tokens)) == len(tokens)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return {token: i for i, token in enumerate(tokens)}, merges


def clip_tensors(seed=0):
    """By Hugging Face's names."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: (0.3 * rng.standard_normal(shape)).astype(np.float32)
    found = {"logit_scale": np.array(2.6, np.float32)}
    for side, c in (("text_model", CLIP_CONFIG["text_config"]), ("vision_model", CLIP_CONFIG["vision_config"])):
        d, f = c["hidden_size"], c["intermediate_size"]
        for i in range(c["num_hidden_layers"]):
            at = f"{side}.encoder.layers.{i}."
            linear = {f"self_attn.{n}_proj": (d, d) for n in ("q", "k", "v", "out")} | {"mlp.fc1": (f, d), "mlp.fc2": (d, f)}
            for name, shape in linear.items():
                found |= {f"{at}{name}.weight": normal(*shape), f"{at}{name}.bias": normal(shape[0])}
            for name in ("layer_norm1", "layer_norm2"):
                found |= {f"{at}{name}.weight": 1 + normal(d), f"{at}{name}.bias": normal(d)}
        norms = ("final_layer_norm",) if side == "text_model" else ("pre_layrnorm", "post_layernorm")
        for name in norms:
            found |= {f"{side}.{name}.weight": 1 + normal(d), f"{side}.{name}.bias": normal(d)}
        found[{"text_model": "text_projection", "vision_model": "visual_projection"}[side] + ".weight"] = normal(24, d)
    found |= {
        "text_model.embeddings.token_embedding.weight": normal(VOCAB, 32),
        "text_model.embeddings.position_embedding.weight": normal(20, 32),
        "vision_model.embeddings.class_embedding": normal(40),
        "vision_model.embeddings.patch_embedding.weight": normal(40, 3, 8, 8),
        "vision_model.embeddings.position_embedding.weight": normal(17, 40),
    }
    return found


def dino_tensors(seed=0):
    """By Hugging Face's names."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: (0.3 * rng.standard_normal(shape)).astype(np.float32)
    d, f = 48, 64
    found = {
        "embeddings.cls_token": normal(1, 1, d), "embeddings.position_embeddings": normal(1, 17, d), "layernorm.weight": 1 + normal(d),
        "layernorm.bias": normal(d), "embeddings.patch_embeddings.projection.weight": normal(d, 3, 8, 8),
        "embeddings.patch_embeddings.projection.bias": normal(d),
    }  # fmt: skip
    for i in range(2):
        at = f"encoder.layer.{i}."
        linear = {f"attention.attention.{n}": (d, d) for n in ("query", "key", "value")}
        linear |= {"attention.output.dense": (d, d), "intermediate.dense": (f, d), "output.dense": (d, f)}
        for name, shape in linear.items():
            found |= {f"{at}{name}.weight": normal(*shape), f"{at}{name}.bias": normal(shape[0])}
        for name in ("layernorm_before", "layernorm_after"):
            found |= {f"{at}{name}.weight": 1 + normal(d), f"{at}{name}.bias": normal(d)}
    return found


def as_flax(tensors):
    """The tree of Hugging Face's FlaxCLIPModel."""
    tree = {}
    for name, value in tensors.items():
        *path, last = name.split(".")
        if last == "weight":
            if value.ndim == 1:
                last = "scale"
            elif path[-1] in ("token_embedding", "position_embedding"):
                last = "embedding"
            else:
                last, value = "kernel", value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)
        at = tree
        for part in path:
            at = at.setdefault(part, {})
        at[last] = np.ascontiguousarray(value)
    return tree


def _fused(tensors, names, parts):
    """Query, key and value of each layer as one."""
    return {new: np.concatenate([tensors.pop(old.format(p)) for p in parts]) for new, old in names}


def as_open_clip(tensors):
    tensors, found = dict(tensors), {}
    for side, ours, count in (("text_model", "", 2), ("vision_model", "visual.", 3)):
        for i in range(count):
            at, to = f"{side}.encoder.layers.{i}.self_attn.", f"{ours}transformer.resblocks.{i}.attn.in_proj_"
            found |= _fused(tensors, [(f"{to}{kind}", f"{at}{{}}_proj.{kind}") for kind in ("weight", "bias")], ("q", "k", "v"))
    renamed = (
        (r"^vision_model\.encoder\.layers", "visual.transformer.resblocks"), (r"^text_model\.encoder\.layers", "transformer.resblocks"),
        (r"self_attn", "attn"), (r"layer_norm(\d)", r"ln_\1"), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"),
        (r"^text_model\.final_layer_norm", "ln_final"), (r"^vision_model\.pre_layrnorm", "visual.ln_pre"),
        (r"^vision_model\.post_layernorm", "visual.ln_post"), (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
        (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"^vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
        (r"^vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
        (r"^vision_model\.embeddings\.patch_embedding", "visual.conv1"),
    )  # fmt: skip
    for name, value in tensors.items():
        if name in ("text_projection.weight", "visual_projection.weight"):
            found[{"t": "text_projection", "v": "visual.proj"}[name[0]]] = np.ascontiguousarray(value.T)
            continue
        for pattern, new in renamed:
            name = re.sub(pattern, new, name)
        found[name] = value
    return found


def as_meta(tensors):
    """DINO's own file."""
    tensors, found = dict(tensors), {}
    for i in range(2):
        at = f"encoder.layer.{i}.attention.attention."
        found |= _fused(
            tensors, [(f"blocks.{i}.attn.qkv.{kind}", f"{at}{{}}.{kind}") for kind in ("weight", "bias")], ("query", "key", "value")
        )
    renamed = (
        (r"^encoder\.layer", "blocks"), (r"layernorm_before", "norm1"), (r"layernorm_after", "norm2"),
        (r"attention\.output\.dense", "attn.proj"), (r"intermediate\.dense", "mlp.fc1"), (r"output\.dense", "mlp.fc2"),
        (r"^embeddings\.cls_token", "cls_token"),
        (r"^embeddings\.position_embeddings", "pos_embed"), (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"^layernorm", "norm"),
    )  # fmt: skip
    for name, value in tensors.items():
        for pattern, new in renamed:
            name = re.sub(pattern, new, name)
        found[name] = value
    return found


def write_clip(folder, kind="huggingface", tensors=None):
    """A whole folder: weights of a kind, configuration, tokenizer."""
    tensors = clip_tensors() if tensors is None else tensors
    bpe(folder)
    if kind == "open_clip":
        text = {"context_length": 20, "vocab_size": VOCAB, "width": 32, "heads": 4, "layers": 2}
        image = {"image_size": 32, "layers": 3, "width": 40, "patch_size": 8, "head_width": 8}
        config = {"model_cfg": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": image, "text_cfg": text}}
        (folder / "open_clip_config.json").write_text(json.dumps(config))
        safetensors.numpy.save_file(as_open_clip(tensors), folder / "open_clip_model.safetensors")
        return folder
    (folder / "config.json").write_text(json.dumps(CLIP_CONFIG))
    if kind == "flax":
        (folder / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(as_flax(tensors)))
    else:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def write_dino(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(DINO_CONFIG))
    safetensors.numpy.save_file(dino_tensors(), folder / "model.safetensors")
    return folder
