"""The four readers against what was written: order, random access, pickling, small indices, damage."""

import json
import pickle
import tarfile

import numpy as np
import pytest

from tests.data.making import coded, jsonl, struct, table, tar, write
from xprompt_jax.data.readers import Folders, Manifest, Parquet, Strings, Tar
from xprompt_jax.data.sources import paired_folders
from xprompt_jax.errors import UserError


def everything(rows):
    """All rows, forwards; they are the same at random, backwards, and in another process."""
    found = list(rows)
    again = pickle.loads(pickle.dumps(rows))
    for i in np.random.default_rng(0).permutation(len(rows)):
        assert rows[i] == again[int(i) - len(rows)] == found[i]
    with pytest.raises(IndexError):
        rows[len(rows)]
    return found


def test_strings_are_small_and_whole():
    words = ["", "a", "ä/日本", "x" * 1000, "bad\udcff name"]
    assert everything(Strings(words)) == words
    many = Strings(f"folder/{i:08d}" for i in range(10_000))
    assert len(pickle.dumps(many)) < 10_000 * (15 + 8) + 1000


def test_folders_bring_files_together(tmp_path):
    for i in (3, 1, 2):
        write(tmp_path / "a" / "in" / f"rain-{i}.png", i)
        write(tmp_path / "a" / "out" / f"norain-{i}.jpg", i)
    write(tmp_path / "a" / "in" / "list.txt", "rain-1\n")
    write(tmp_path / "a" / "in" / ".hidden.png", 1)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for folder in ("a", "link"):
        read = lambda root=tmp_path, folder=folder, **options: Folders(
            root, rf"{folder}/in/rain-(?P<key>\d)\.png", {"output": (rf"{folder}/none/\g<key>", rf"{folder}/out/norain-\g<key>")}, **options
        )
        assert [row["key"] for row in everything(read(below=[folder]))] == ["1", "2", "3"]
        assert read()[1]["output"] == tmp_path / folder / "out" / "norain-2.jpg"
        assert [row["input"].name for row in read(only={"3"})] == ["rain-3.png"]
    (tmp_path / "a" / "out" / "norain-2.jpg").unlink()
    with pytest.raises(UserError, match=r"rain-2\.png: no a/none/2 or a/out/norain-2\.\* in .*; complete the copy"):
        Folders(tmp_path, r"a/in/rain-(?P<key>\d)\.png", {"output": (r"a/none/\g<key>", r"a/out/norain-\g<key>")}, below=["a"])
    with pytest.raises(UserError, match="no file whose path fits"):
        Folders(tmp_path, r"(?P<key>b)/x\.png", {})
    with pytest.raises(UserError, match="cannot read the folder: No such file"):
        Folders(tmp_path / "none", r"(?P<key>.*)", {})


def test_a_partner_is_the_one_that_is_meant(tmp_path):
    for name in ("in/1.jpg", "in/1.png", "out/1.jpg", "out/1.png", "in/2.png", "out/2.jpg"):
        write(tmp_path / name, 1)
    read = lambda: Folders(tmp_path, r"in/(?P<key>\d)\..+", {"output": r"out/\g<key>"})
    assert [(row["input"].name, row["output"].name) for row in read()] == [("1.jpg", "1.jpg"), ("1.png", "1.png"), ("2.png", "2.jpg")]
    pairs = lambda: list(paired_folders(tmp_path / "in", tmp_path / "out", task="t", instruction="x"))
    assert [(r.input.name, r.output.name) for r in pairs()] == [("1.jpg", "1.jpg"), ("1.png", "1.png"), ("2.png", "2.jpg")]
    write(tmp_path / "out/2.webp", 1)
    for bring in (read, pairs):
        with pytest.raises(UserError, match=r"out/2: is there with \.jpg and \.webp; remove all but one"):
            bring()


def test_parquet_reads_groups_on_demand(tmp_path):
    rows = [{"image": struct(i), "text": f"row {i}", "unused": "x" * 1000} for i in range(7)]
    table(tmp_path, "data-{}-of-{}.parquet", rows, shards=2)
    read = Parquet(sorted(tmp_path.glob("*.parquet")), ["image", "text"])
    found = everything(read)
    assert [row["text"] for row in found] == [f"row {i}" for i in range(7)]
    assert [row["image"] for row in found] == [coded(i) for i in range(7)]
    assert found[4]["key"] == "data-1-of-2.parquet:0" and len({row["key"] for row in found}) == 7
    assert "unused" not in found[0] and len(pickle.dumps(read)) < 3000
    with pytest.raises(UserError, match="no column 'caption', but image, text, unused"):
        Parquet(read.files, ["caption"])
    read.files[1].write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match=r"data-1-of-2\.parquet: not a readable parquet file"):
        Parquet(read.files, ["text"])


def test_an_image_without_bytes_is_a_path(tmp_path):
    table(tmp_path, "{}{}.parquet", [{"image": {"bytes": None, "path": "a.png"}}, {"image": {"bytes": b"x", "path": None}}], shards=1)
    first, second = Parquet([tmp_path / "01.parquet"], ["image"])
    assert first["image"] == tmp_path / "a.png" and second["image"] == b"x"


def test_tars_are_read_through_offsets(tmp_path):
    for shard in range(2):
        files = {}
        for i in range(3):
            files |= {
                f"./s/{shard}{i}.jpg": coded(10 * shard + i),
                f"./s/{shard}{i}.seg.png": b"seg",
                f"./s/{shard}{i}.txt": f"{i}".encode(),
            }
        files |= {f"./s/{shard}9.txt": b"dead link", "note.md": b"no sample"}
        tar(tmp_path / f"{shard}.tar", files)
    columns = {"image": ("jpg", "png"), "text": ("txt",), "seg": ("seg.png",), "absent": ("cls",)}
    read = Tar(sorted(tmp_path.glob("*.tar")), columns, required=["image"])
    found = everything(read)
    assert [(row["image"], row["text"], row["seg"], row["absent"]) for row in found] == [
        (coded(10 * s + i), str(i).encode(), b"seg", None) for s in range(2) for i in range(3)
    ]
    assert found[4]["key"].endswith("s/11")
    assert len(Tar(read.files, columns)) == 8
    for i, row in enumerate(found):  # against tarfile itself
        with tarfile.open(tmp_path / f"{i // 3}.tar") as archive:
            assert archive.extractfile(f"./s/{i // 3}{i % 3}.jpg").read() == row["image"]


def test_damaged_tars_are_refused(tmp_path):
    tar(tmp_path / "a.tar", {"1.jpg": bytes(5000), "2.jpg": bytes(5000)})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:7000])
    with pytest.raises(UserError, match=r"a\.tar: not a whole, uncompressed tar"):
        Tar([tmp_path / "a.tar"], {"image": ("jpg",)})
    import gzip

    (tmp_path / "a.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(UserError, match=r"a\.tar: not a whole, uncompressed tar"):
        Tar([tmp_path / "a.tar"], {"image": ("jpg",)})


def test_manifests_are_read_by_line(tmp_path):
    path = tmp_path / "m.jsonl"
    rows = [{"text": f"zeile {i} \u2028 日本"} for i in range(5)]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))  # with empty lines between
    read = Manifest(path)
    assert [row["text"] for row in everything(read)] == [row["text"] for row in rows]
    assert read[3]["key"] == "m.jsonl:7" and read.lines.tolist() == [1, 3, 5, 7, 9]
    jsonl(path, [{"a": 1}])
    path.write_bytes(path.read_bytes() + b'{"b": \n\xff\xfe\n[1]\n')
    read = Manifest(path)
    for i, message in ((1, "line 2: not JSON"), (2, "not a text file"), (3, "line 4: not an object")):
        with pytest.raises(UserError, match=message):
            read[i]
    with pytest.raises(UserError, match="cannot read: No such file"):
        Manifest(tmp_path / "none")


def test_an_array_is_read_as_lines_are(tmp_path):
    path, rows = tmp_path / "list.json", [{"text": f"zeile {i} 日本"} for i in range(5)]
    for indent, lines in ((None, [1] * 5), (1, [2, 5, 8, 11, 14])):
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=indent))
        read = Manifest(path)
        assert [row["text"] for row in everything(read)] == [row["text"] for row in rows]
        assert [row["key"] for row in read] == [f"list.json:{i}" for i in range(1, 6)] and read.lines.tolist() == lines
    path.write_text("[]")
    assert len(Manifest(path)) == 0
    whole = json.dumps([*rows, 3])
    path.write_text(whole)
    with pytest.raises(UserError, match="line 1: not an object"):
        Manifest(path)[5]
    for damaged in (whole[:-1], whole[:-40], whole.replace("}, {", "} {", 1)):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"list\.json: not a whole JSON array .*; write one object a line"):
            Manifest(path)
