"""`convert`: every format to every other without losing a bit, whole or not at all, resumed, verified, on a full disk."""

import dataclasses
import json
import logging
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import ml_dtypes  # noqa: F401  (np.dtype("bfloat16") needs it)
import numpy as np
import pytest

from tests.convert.folders import meta_folder, random_tensors, same_bits, write_huggingface
from tests.disk import needs_a_small_disk, on_a_small_disk
from tests.helpers import FP32, TINY, tiny_tokenizer
from xprompt_jax import XPrompt
from xprompt_jax.config import MeshConfig
from xprompt_jax.convert.convert import Options, convert
from xprompt_jax.convert.formats import open_source
from xprompt_jax.convert.huggingface import HuggingFaceTarget
from xprompt_jax.convert.native import save_folder
from xprompt_jax.convert.torchwriter import TorchWriter
from xprompt_jax.convert.verify import CERTIFICATE, verify
from xprompt_jax.convert.weights import load_decoder, shapes_of
from xprompt_jax.errors import UserError
from xprompt_jax.mesh import make_mesh
from xprompt_jax.model.params import flatten
from xprompt_jax.model.xp import init_xp

ROOT = Path(__file__).parents[2]
HEADS = slice(4, 4 + TINY.vq.num_codes)  # columns of the head that draw


def in_metas_reach(tensors, config):
    """Heads share their QK-norms, as in one file of Meta's."""
    return {
        name: np.broadcast_to(value[:1], value.shape).copy() if "_norm." in name and value.ndim == 2 else value
        for name, value in tensors.items()
    }


def native(path, config, tensors):
    save_folder(path, config, tensors.__getitem__, tiny_tokenizer())
    return path


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_way_round_is_bit_exact(tmp_path, dtype):
    """ours -> each -> each -> ours, and every stop holds the same bits."""
    tensors = in_metas_reach(random_tensors(TINY, np.random.default_rng(0), np.dtype(dtype)), TINY)
    places = {"xprompt": native(tmp_path / "xprompt", TINY, tensors)}
    for kind in ("huggingface", "meta"):
        places[kind] = convert(open_source(places["xprompt"]), tmp_path / kind, Options(to=kind), progress=False)
    keep = Options(image_head="keep")
    for kind, place in list(places.items()):
        for to in ("xprompt", "huggingface", "meta"):
            options = dataclasses.replace(keep, to=to)
            places[f"{kind}-{to}"] = convert(open_source(place), tmp_path / f"{kind}-{to}", options, progress=False)
    for kind, place in places.items():
        source = open_source(place)
        assert source.kind == kind.split("-")[-1] and source.config == TINY
        for name, value in tensors.items():
            assert same_bits(source.read(name), value), (kind, name)
        assert XPrompt.from_pretrained(place, compute=FP32).tokenizer.fingerprint == tiny_tokenizer().fingerprint


def test_another_type_is_rounded_once(tmp_path):
    tensors = random_tensors(TINY, np.random.default_rng(0))
    source = native(tmp_path / "a", TINY, tensors)
    convert(open_source(source), tmp_path / "b", Options(dtype="bfloat16"), progress=False)
    after = open_source(tmp_path / "b")
    for name, value in tensors.items():
        want = value if name.startswith("vqgan/") else value.astype("bfloat16")  # in less than float32, codes flip
        assert same_bits(after.read(name), want), name
    large = native(tmp_path / "large", TINY, tensors | {"norm": tensors["norm"] * 1e7})
    with pytest.raises(UserError, match="norm: has numbers beyond 65504"):
        convert(open_source(large), tmp_path / "half", Options(dtype="float16"), progress=False)
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("choice", ["auto", "keep", "zero", "he"])
def test_the_image_head(tmp_path, choice, caplog):
    checkpoint = meta_folder(tmp_path / "m", dim=256, heads=4, kv_heads=4)
    with caplog.at_level(logging.WARNING):
        convert(open_source(tmp_path / "m/models/tiny"), tmp_path / "o", Options(image_head=choice), progress=False)
    assert ("cannot draw" in caplog.text) == (choice == "auto")
    before, after = checkpoint[0]["output.weight"].T, open_source(tmp_path / "o").read("head")
    others = np.ones(before.shape[1], bool)
    others[HEADS] = False
    np.testing.assert_array_equal(after[:, others], before[:, others])
    loaded = XPrompt.from_pretrained(tmp_path / "m/models/tiny", image_head=choice, compute=FP32)
    np.testing.assert_allclose(loaded.decoder.head[...], after, rtol=1e-6)
    image = after[:, HEADS]
    if choice in ("auto", "zero"):
        assert not image.any()
    elif choice == "keep":
        np.testing.assert_array_equal(image, before[:, HEADS])
    else:
        assert image.std() == pytest.approx((2 / 256) ** 0.5, rel=0.03) and abs(image.mean()) < 0.005


def test_drawing_with_a_head_that_cannot_is_told(tmp_path, caplog):
    meta_folder(tmp_path / "m")
    model = XPrompt.from_pretrained(tmp_path / "m/models/tiny", num_xp_tokens=3, compute=FP32)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        model.text_to_image(["rain"], seed=0)
        model.text_to_image(["rain"], seed=1)
    assert [r.message for r in caplog.records].count(caplog.records[0].message) == 1  # once is enough
    assert "all zero" in caplog.text and "train it" in caplog.text


def test_new_xp_embeddings_are_those_of_training_from_nothing(tmp_path):
    """The streamed statistics draw what `init_xp` draws from the whole table."""
    checkpoint = meta_folder(tmp_path / "m")
    convert(open_source(tmp_path / "m/models/tiny", num_xp_tokens=7), tmp_path / "o", Options(seed=5), progress=False)
    embed = checkpoint[0]["tok_embeddings.weight"]
    np.testing.assert_allclose(open_source(tmp_path / "o").read("xp"), init_xp(jax.random.key(5), embed, 7), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["xprompt", "huggingface", "meta"])
def test_straight_onto_a_mesh(tmp_path, kind):
    tensors = in_metas_reach(random_tensors(TINY, np.random.default_rng(0)), TINY)
    native(tmp_path / "xprompt", TINY, tensors)
    if kind != "xprompt":
        convert(open_source(tmp_path / "xprompt"), tmp_path / kind, Options(to=kind, image_head="keep"), progress=False)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    placed = flatten(load_decoder(open_source(tmp_path / kind), dtype=np.float32, mesh=mesh))
    wq = placed["blocks.attention.wq"]
    assert {s.data.size for s in wq.addressable_shards} == {wq.size // 8}
    for name, value in placed.items():
        parts = [tensors[n] for n in tensors if n == name or (n.startswith("blocks.") and "blocks." + n.split(".", 2)[2] == name)]
        np.testing.assert_array_equal(value, np.stack(parts) if name.startswith("blocks.") else parts[0])


class Stops(BaseException):
    """As a kill does: nothing catches it."""


@pytest.mark.parametrize("to", ["xprompt", "huggingface", "meta"])
def test_a_killed_run_goes_on(tmp_path, monkeypatch, to):
    """What an interrupted run has finished is not done again, and the end is the same to the byte."""
    tensors = in_metas_reach(random_tensors(TINY, np.random.default_rng(0)), TINY)
    native(tmp_path / "a", TINY, tensors)
    monkeypatch.setitem(HuggingFaceTarget.__init__.__kwdefaults__, "shard_bytes", 20_000)
    convert(open_source(tmp_path / "a"), tmp_path / "whole", Options(to=to), progress=False)

    class Dies:
        """The source, until its hundredth tensor."""

        def __init__(self, source, lives):
            self.source, self.lives = source, lives

        def __getattr__(self, name):
            return getattr(self.source, name)

        def read(self, name):
            self.lives -= 1
            if self.lives < 0:
                raise Stops
            return self.source.read(name)

    source = Dies(open_source(tmp_path / "a"), 30)
    with pytest.raises(Stops):
        convert(source, tmp_path / "b", Options(to=to), progress=False)
    assert not (tmp_path / "b").exists()
    done = json.loads((tmp_path / ".b.converting" / "progress.json").read_text())["done"]
    assert done
    read = []
    source = open_source(tmp_path / "a")
    monkeypatch.setattr(source, "read", lambda name, own=source.read: (read.append(name), own(name))[1])
    convert(source, tmp_path / "b", Options(to=to), progress=False)
    assert len(read) < len(tensors)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "whole"]
    again = open_source(tmp_path / "b")
    for name, value in tensors.items():
        assert same_bits(again.read(name), value), name
    if to != "xprompt":
        files = [f.relative_to(tmp_path / "whole") for f in (tmp_path / "whole").rglob("*") if f.is_file()]
        assert sorted(files) == sorted(f.relative_to(tmp_path / "b") for f in (tmp_path / "b").rglob("*") if f.is_file())
        for file in files:
            assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_killed_between_the_notes_of_two_ranks(tmp_path, monkeypatch):
    """One rank's file knows of a layer that the other's and the conversion's own notes do not have: it is not written twice."""
    native(tmp_path / "a", TINY, in_metas_reach(random_tensors(TINY, np.random.default_rng(0)), TINY))
    options = Options(to="meta", shards=2)
    convert(open_source(tmp_path / "a"), tmp_path / "whole", options, progress=False)
    marks, mark = [], TorchWriter.mark

    def dies(self):
        marks.append(self.path.name)
        if len(marks) == 4:  # of two files after two parts
            raise Stops
        mark(self)

    monkeypatch.setattr(TorchWriter, "mark", dies)
    with pytest.raises(Stops):
        convert(open_source(tmp_path / "a"), tmp_path / "b", options, progress=False)
    monkeypatch.setattr(TorchWriter, "mark", mark)
    convert(open_source(tmp_path / "a"), tmp_path / "b", options, progress=False)
    for file in ("consolidated.00.pth", "consolidated.01.pth", "checklist.chk"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_another_conversion_does_not_go_on_from_it(tmp_path):
    native(tmp_path / "a", TINY, random_tensors(TINY, np.random.default_rng(0)))
    work = tmp_path / ".b.converting"
    (work / "params").mkdir(parents=True)
    (work / "progress.json").write_text(json.dumps({"of": {"files": []}, "done": ["outer"]}))
    convert(open_source(tmp_path / "a"), tmp_path / "b", Options(), progress=False)
    assert open_source(tmp_path / "b").read("norm").shape == (TINY.dim,)


def test_nothing_is_overwritten(tmp_path):
    native(tmp_path / "a", TINY, random_tensors(TINY, np.random.default_rng(0)))
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="--out .*b: exists"):
        convert(open_source(tmp_path / "a"), tmp_path / "b", Options(), progress=False)


def test_a_damaged_source_leaves_nothing(tmp_path):
    path = write_huggingface(tmp_path / "a", TINY, random_tensors(TINY, np.random.default_rng(0)), 40_000)
    source = open_source(path)
    last = sorted(path.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:100])
    with pytest.raises((UserError, Exception)) as error:
        convert(source, tmp_path / "b", Options(), progress=False)
    assert isinstance(error.value, UserError), error.value
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_too_little_room_is_told_before_the_first_byte(tmp_path, monkeypatch):
    native(tmp_path / "a", TINY, random_tensors(TINY, np.random.default_rng(0)))
    few = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: few)
    with pytest.raises(UserError, match=r"needs 0\.00 GiB, 0\.00 are free"):
        convert(open_source(tmp_path / "a"), tmp_path / "b", Options(), progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("to", ["xprompt", "huggingface", "meta"])
def test_a_disk_that_fills_up_half_way(tmp_path, to):
    """A real full disk: the check of free space passes, another program takes the room, the writer meets ENOSPC."""
    needs_a_small_disk()
    config = dataclasses.replace(TINY, dim=128, ffn_dim=512)
    native(tmp_path / "a", config, in_metas_reach(random_tensors(config, np.random.default_rng(0)), config))
    result = on_a_small_disk("8m", f"""
        import os, shutil, sys
        from xprompt_jax.convert import convert as module
        real, taken = shutil.disk_usage, []
        def disk_usage(path):
            free = real(path)
            if not os.path.exists("/mnt/other"):
                with open("/mnt/other", "wb") as f:  # somebody else's file, right after the first check
                    f.write(bytes(free.free - 600_000))
                taken.append(free)
            elif taken:  # and the next check has not seen it yet; where parts are small, no check ever does
                return taken[0] if {to!r} == "meta" else taken.pop()
            return free
        shutil.disk_usage = disk_usage
        from xprompt_jax.cli import main
        try:
            main(["convert", "--source", {str(tmp_path / "a")!r}, "--out", "/mnt/b", "--to", {to!r}])
        finally:
            print(sorted(os.listdir("/mnt")))
    """)  # fmt: skip
    lines = [line for line in result.stderr.splitlines() if line.startswith("xprompt: ")]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert len(lines) == 1, result.stderr
    assert ("GiB, 0.00 are free" if to == "xprompt" else "No space left on device") in lines[0]
    assert result.stdout == "['other']\n"  # nothing of ours stays behind


def test_verify_writes_a_certificate(tmp_path):
    tensors = random_tensors(TINY, np.random.default_rng(0))
    source = open_source(native(tmp_path / "a", TINY, tensors))
    convert(source, tmp_path / "b", Options(to="huggingface"), progress=False)
    certificate = verify(source, tmp_path / "b", Options(to="huggingface"), progress=False)
    assert json.loads((tmp_path / "b" / CERTIFICATE).read_text()) == certificate
    assert certificate["tensors"]["identical"] == certificate["tensors"]["tensors"] == len(shapes_of(TINY))
    assert certificate["tensors"]["max_abs"] == 0
    try:
        import torch  # noqa: F401
    except ImportError:
        assert certificate["logits"].startswith("not compared")
    else:
        assert certificate["logits"]["max_rel"] < 1e-4 and certificate["logits"]["kl"] < 1e-6


def test_verify_finds_one_wrong_bit(tmp_path):
    source = open_source(native(tmp_path / "a", TINY, random_tensors(TINY, np.random.default_rng(0))))
    convert(source, tmp_path / "b", Options(to="huggingface"), progress=False)
    file = tmp_path / "b" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2] ^= 1  # in the last tensor of the file
    file.write_bytes(data)
    with pytest.raises(UserError, match="1 of .* tensors differ from the original, vqgan/"):
        verify(source, tmp_path / "b", Options(to="huggingface"), progress=False)
    certificate = json.loads((tmp_path / "b" / CERTIFICATE).read_text())
    assert certificate["tensors"]["identical"] == len(shapes_of(TINY)) - 1 and certificate["tensors"]["max_abs"] > 0


def test_a_folder_of_two_kinds_needs_a_choice(tmp_path):
    tensors = random_tensors(TINY, np.random.default_rng(0))
    path = write_huggingface(tmp_path / "m", TINY, tensors)
    meta_folder(tmp_path / "m", tree=False)
    with pytest.raises(UserError, match="huggingface and meta weights; choose with --format"):
        open_source(path)
    assert open_source(path, format="huggingface").kind == "huggingface"
    assert open_source(path, format="meta").kind == "meta"
    with pytest.raises(UserError, match="holds no xprompt model"):
        open_source(path, format="xprompt")


def test_what_is_no_model_is_told(tmp_path):
    with pytest.raises(UserError, match="no such model folder"):
        open_source(tmp_path / "none")
    with pytest.raises(UserError, match=r"no model here \(it has no files\)"):
        open_source(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="ask for safetensors"):
        open_source(tmp_path)
    with pytest.raises(UserError, match="a file; give the folder"):
        open_source(tmp_path / "pytorch_model.bin")


def test_hub_names_are_read_from_the_cache(tmp_path, monkeypatch):
    """As huggingface_hub lays out its cache; no network."""
    snapshot = tmp_path / "hub/models--someone--anole/snapshots/0123456789abcdef0123456789abcdef01234567"
    tensors = random_tensors(TINY, np.random.default_rng(0))
    write_huggingface(snapshot, TINY, tensors)
    refs = tmp_path / "hub/models--someone--anole/refs/main"
    refs.parent.mkdir(parents=True)
    refs.write_text(snapshot.name)
    script = """
        from xprompt_jax.convert.formats import open_source
        from xprompt_jax.errors import UserError
        source = open_source("someone/anole")
        print(source.kind, source.read("norm")[:2].tolist())
        try:
            open_source("someone/else")
        except UserError as e:
            print(e)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=ROOT, timeout=120,
        env={"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    first, second = result.stdout.splitlines()
    assert first == f"huggingface {tensors['norm'][:2].tolist()}", result.stderr
    assert "someone/else: no such folder, not in the hub's cache" in second and "HF_HUB_OFFLINE" in second
