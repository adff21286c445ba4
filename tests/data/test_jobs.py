"""Tokenizing jobs: parts of one, stops and kills at any place, and what cannot be read."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest

from tests.data.jobs import Shared, files_of, pixels, store_of
from xprompt_jax.data.journal import Journal
from xprompt_jax.data.tokenise import merge
from xprompt_jax.errors import UserError


def test_parts_joined_are_the_whole(vqgan, tmp_path):
    """Byte for byte, though parts share pictures, and one of them cannot read a pair."""
    records = Shared()
    records[13] = dataclasses.replace(records[13], output=b"no picture")
    whole = store_of(records, vqgan, tmp_path / "whole", crops=2, max_corrupt=2)
    parts = [store_of(records, vqgan, tmp_path / f"{i}", batch=5, crops=2, max_corrupt=2, shard=(i, 3)) for i in range(3)]
    assert [len(part.pairs) for part in parts] == [8, 7, 8] and sum(len(part.codes) for part in parts) > len(whole.codes) == 30
    merge([tmp_path / f"{i}" for i in range(3)], tmp_path / "joined")
    assert files_of(tmp_path / "joined") == files_of(tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "skipped.jsonl").read_text())["pair"] == 13
    store_of(records, vqgan, tmp_path / "single", max_corrupt=2)
    with pytest.raises(UserError, match="1: crops 2, but .*single has 1; tokenize both with one model, one --recipe and one --crops"):
        merge([tmp_path / "single", tmp_path / "1"], tmp_path / "bad")
    with pytest.raises(UserError, match="--shard works on pairs that can be counted"):
        store_of(iter(records), vqgan, tmp_path / "bad", shard=(0, 2))
    assert not (tmp_path / "bad").exists()


def test_what_is_not_ours_is_never_removed(vqgan, tmp_path):
    (tmp_path / "o.partial").mkdir()
    (tmp_path / "o.partial" / "notes.txt").write_text("mine")
    for job in (None, {"data": "d"}):
        with pytest.raises(UserError, match=r"o\.partial: there already, and not what a stopped job left"):
            store_of(Shared(), vqgan, tmp_path / "o", job=job)
    assert (tmp_path / "o.partial" / "notes.txt").read_text() == "mine"
    (tmp_path / "q.partial" / "store").mkdir(parents=True)  # a name of ours, and nothing of a journal
    with pytest.raises(UserError, match=r"q\.partial: there already, and not what a stopped job left"):
        store_of(Shared(), vqgan, tmp_path / "q")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="p: there already, and not a token store"):
        store_of(Shared(), vqgan, tmp_path / "p")


def test_a_store_may_lie_behind_a_link(vqgan, tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "o").symlink_to(tmp_path / "big")
    for _ in range(2):
        assert len(store_of(Shared(), vqgan, tmp_path / "o").pairs) == len(Shared())
    assert (tmp_path / "o").is_symlink() and (tmp_path / "big" / "store.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big", "o"]


def test_a_stopped_job_goes_on_from_every_place(vqgan, tmp_path, monkeypatch):
    """The journal as it was at every commit, with what was under way beyond it, leads to the same bytes."""
    records = Shared()
    records[5] = dataclasses.replace(records[5], output=b"no picture")
    settings = {"batch": 4, "max_corrupt": 1, "job": {"from": "here"}}
    left, commit = [], Journal.commit

    def commit_and_copy(journal):
        commit(journal)
        left.append(shutil.copytree(journal.folder, tmp_path / f"left-{len(left)}"))

    with monkeypatch.context() as changed:
        changed.setattr("xprompt_jax.data.journal.COMMIT_SECONDS", 0)
        changed.setattr(Journal, "commit", commit_and_copy)
        store_of(records, vqgan, tmp_path / "whole", **settings)
    done = [json.loads((folder / "progress.json").read_text())["done"] for folder in left]
    chosen = [left[done.index(n)] for n in sorted(set(done))] + [left[-1]]
    assert len(chosen) > 5 and done[-1] == len(records)
    for number, folder in enumerate(chosen):
        for name in ("codes.bin", "addresses.bin", "pairs.jsonl", "skipped.jsonl"):
            with (folder / name).open("ab") as file:
                file.write(b"under way")
        (folder / "store").mkdir()
        (folder / "store" / "pairs.arrow").write_text("half")
        out = tmp_path / f"again-{number}"
        folder.rename(f"{out}.partial")
        records.reads = 0
        if number % 2:
            store_of(records, vqgan, out, **settings)
            assert records.reads == len(records) - done[left.index(folder)]
        else:  # what has no length is read from its start
            store_of(iter(records), vqgan, out, total=len(records), **settings)
        assert files_of(out) == files_of(tmp_path / "whole") and not (tmp_path / f"again-{number}.partial").exists()


KILLED = """
import sys, time
from tests.data.jobs import Shared
from xprompt_jax.convert.native import load_tokenizers
from xprompt_jax.data import journal
from xprompt_jax.data.tokenise import tokenize

class Slow(Shared):
    def __getitem__(self, i):
        time.sleep(0.05)
        return super().__getitem__(i)

journal.COMMIT_SECONDS = 0
tokenize(Slow(), *load_tokenizers(sys.argv[1]), sys.argv[2], batch=4, job={"from": "here"}, progress=False)
"""


def test_a_killed_job_goes_on(vqgan, other_vqgan, tmp_path):
    """SIGKILL, twice, at moments of no choice of ours."""
    store_of(Shared(), vqgan, tmp_path / "whole", batch=4)
    out, partial = tmp_path / "s", tmp_path / "s.partial"
    reached = lambda: json.loads((partial / "progress.json").read_text())["done"] if (partial / "progress.json").exists() else 0
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
                   "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # fmt: skip
    random, before = np.random.default_rng(), 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / "whole" / "tokenizers", out], env=environment)
        while reached() <= before + 1 and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        process.wait()
        assert not out.exists() and before < reached() < 24, "it must be killed on its way"
        before = reached()
    with pytest.raises(UserError, match=r"s.partial: begun with crops 1, not 2; give the same again to go on, or remove it"):
        store_of(Shared(), vqgan, out, batch=4, job={"from": "here"}, crops=2)
    with pytest.raises(UserError, match=r"begun with from here, not there"):
        store_of(Shared(), vqgan, out, batch=4, job={"from": "there"})
    with pytest.raises(UserError, match=r"begun with vqgan"):
        store_of(Shared(), other_vqgan, out, batch=4, job={"from": "here"})
    records = Shared()
    store_of(records, vqgan, out, batch=4, job={"from": "here"})
    assert records.reads == 24 - before
    assert files_of(out) == files_of(tmp_path / "whole")


def test_one_place_is_written_by_one_job(vqgan, tmp_path):
    settings = {"crops": 1, "grid": 4}
    with Journal(tmp_path / "s.partial", settings), pytest.raises(UserError, match="another process is writing it"):
        store_of(Shared(), vqgan, tmp_path / "s", job={})
    assert not (tmp_path / "s.partial").exists()  # nothing was done there


def test_what_cannot_be_read_is_counted_and_listed(vqgan, tmp_path, caplog):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    records = Shared()
    for i, change in {
        2: {"input": tmp_path / "bad.png"}, 11: {"output": tmp_path / "gone.png", "dataset": "mine"}, 12: {"caption": "\ud800"},
        13: {"more_inputs": (pixels(0), b"x")},
    }.items():  # fmt: skip
        records[i] = dataclasses.replace(records[i], **change)

    class Damaged(Shared):
        def __getitem__(self, i):
            if i == 20:
                raise UserError("table.parquet: damaged in row 20")
            return records[i]

    with caplog.at_level("INFO"):
        store = store_of(Damaged(), vqgan, tmp_path / "s", max_corrupt=0.25)
    assert re.search(r"s: \d+ images, 19 pairs, 5 skipped, [\d.]+ images/s$", caplog.messages[-1])
    skipped = [json.loads(line) for line in (tmp_path / "s" / "skipped.jsonl").read_text().splitlines()]
    assert [(row["pair"], row["dataset"], row["image"], Path(row["file"]).name) for row in skipped] == [
        (2, "", "input", "bad.png"), (11, "mine", "output", "gone.png"), (12, "", "", ""), (13, "", "input 3", ""), (20, "", "", ""),
    ]  # fmt: skip
    for row, reason in zip(skipped, ("not an image", "no such file", "caption is no text", "not an image", "table.parquet"), strict=True):
        assert reason in row["reason"]
    assert [pair.instruction for pair in store.pairs] == [f"do {i}" for i in range(24) if i not in (2, 11, 12, 13, 20)]


def test_too_much_that_cannot_be_read_ends_the_job(vqgan, tmp_path):
    """In one line; repaired, it goes on."""
    records = Shared()
    bad = tmp_path / "bad.png"
    records[1] = dataclasses.replace(records[1], input=b"x")
    records[17] = dataclasses.replace(records[17], input=bad)
    for limit, first in ((0, "image of 1 bytes: not an image"), (0.01, "image of 1 bytes"), (1, r"bad\.png: no such file")):
        with pytest.raises(
            UserError, match=rf"^[^\n]*{first}.*; {1 + (limit == 1)} of 24 pairs cannot be read, more than --max-corrupt {limit}; [^\n]*$"
        ):
            store_of(records, vqgan, tmp_path / "s", batch=4, max_corrupt=limit, job={})
        assert (tmp_path / "s.partial").exists() == (limit == 1) and not (tmp_path / "s").exists()
    PIL.Image.fromarray(pixels(3)).save(bad)
    shutil.copytree(tmp_path / "s.partial", tmp_path / "t.partial")
    records.reads = 0
    assert len(store_of(records, vqgan, tmp_path / "s", batch=4, max_corrupt=1, job={}).pairs) == 23 and records.reads < 24
    records.reads = 0
    store_of(records, vqgan, tmp_path / "t", batch=4, max_corrupt=1)  # it does not say what its job is: from the start
    assert records.reads == 24 and files_of(tmp_path / "t") == files_of(tmp_path / "s")
