"""Nearest neighbours against brute force, and what the hashed encoder finds close."""

import dataclasses
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.helpers import TINY, TINY_VQ, tiny_tokenizer
from tests.vision.made import clip_tensors, write_clip
from xprompt_jax.cli import main
from xprompt_jax.config import BucketConfig, Config, DataConfig
from xprompt_jax.data import sources
from xprompt_jax.data.mixture import report
from xprompt_jax.data.pipeline import Episodes, Rows
from xprompt_jax.data.retrieval import HashedNgramEncoder, RetrievalIndex, build_index, neighbours
from xprompt_jax.data.sources import Record
from xprompt_jax.data.tokenise import tokenize
from xprompt_jax.errors import UserError
from xprompt_jax.prompt import Prompter
from xprompt_jax.tokens import Layout
from xprompt_jax.vision.clip import CLIP
from xprompt_jax.vision.dino import DINO


@pytest.mark.parametrize("chunk, at_once", [(7, 4), (64, 9), (1000, 1000)])
def test_neighbours_are_brute_force(chunk, at_once, monkeypatch):
    monkeypatch.setattr("xprompt_jax.data.nearest.QUERIES_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    queries, keys = unit(rng.normal(size=(9, 16))).astype(np.float32), unit(rng.normal(size=(50, 16))).astype(np.float32)
    keys[10] = keys[40] = keys[3]  # ties
    query_groups, key_groups = rng.integers(0, 3, 9), rng.integers(0, 3, 50)
    index, cosine = neighbours(queries, keys, 5, query_groups=query_groups, key_groups=key_groups, chunk=chunk)
    scores = (queries @ keys.T).astype(np.float64)
    scores[:, [10, 40]] = scores[:, [3]]
    scores[query_groups[:, None] == key_groups] = -np.inf
    for row in range(9):
        want = np.lexsort((np.arange(50), -scores[row]))[:5]
        assert index[row].tolist() == want.tolist()
        np.testing.assert_allclose(cosine[row], scores[row, want], atol=1e-5)


def test_too_few_keys_are_marked():
    keys = np.eye(3, dtype=np.float32)
    index, cosine = neighbours(keys[:1], keys, 3, query_groups=np.array([0]), key_groups=np.array([0, 1, 0]))
    assert index.tolist() == [[1, -1, -1]] and np.isneginf(cosine[0, 1:]).all()


def test_encoder_brings_like_instructions_together():
    texts = ["remove the rain", "please remove the rain!", "add a red sphere", "Add one red sphere", "make it night", ""]
    vectors = HashedNgramEncoder()(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors[:5], axis=1), 1, atol=1e-5)
    assert (vectors[5] == 0).all()
    index, _ = neighbours(vectors[:4], vectors, 1, query_groups=np.arange(4), key_groups=np.arange(6))
    assert index[:, 0].tolist() == [1, 0, 3, 2]
    np.testing.assert_array_equal(HashedNgramEncoder()(texts[:1]), vectors[:1])


def rows(tmp_path, *lines):
    path = tmp_path / "m.jsonl"
    path.write_text(
        "".join(json.dumps({"input": a, "output": b, "instruction": text, "split": split}) + "\n" for a, b, text, split in lines)
    )
    return path


def test_half_a_letter_is_no_end(tmp_path):
    """JSON can hold half of a surrogate pair, which UTF-8 cannot."""
    manifest = rows(tmp_path, ("a", "b", "make it \ud83d happy", "train"), ("c", "d", "make it happy", "train"))
    assert build_index(manifest, k=1).neighbours.tolist() == [[1], [0]]


def test_index_lists_the_nearest_training_pairs_of_other_sessions(tmp_path):
    manifest = rows(
        tmp_path,
        ("a1", "a2", "add a red ball", "train"),  # 0 to 2: turns of one picture
        ("a2", "a3", "add a blue ball", "train"),
        ("a1", "a4", "make it night", "train"),
        ("b1", "b2", "add a blue ball", "train"),
        ("c1", "c2", "add a blue ball", "eval"),  # has neighbours, is none
        ("d1", "d2", "make it a dark night", "train"),
        ("e1", "e2", "paint it green", "eval"),
    )
    index = build_index(manifest, k=4, seed=1)
    found = [set(row[row >= 0].tolist()) for row in index.neighbours]
    assert found[:4] == [{3, 5}, {3, 5}, {3, 5}, {0, 1, 2, 5}] and found[5] == {0, 1, 2, 3} and len(found[6]) == 4
    assert index.neighbours[0, :2].tolist() == [3, 5] and index.neighbours[2, 0] == 5
    assert set(index.neighbours[4, :2].tolist()) == {1, 3} and np.allclose(index.cosines[4, :2], 1)
    assert (index.cosines[:, :-1] >= index.cosines[:, 1:]).all()
    assert index.instructions.tolist() == [0, 1, 2, 1, -1, 3, -1]


@pytest.mark.parametrize("exclude, found", [
    ("row", [{1, 2, 3}, {0, 2, 3}, {0, 1, 3}, {0, 1, 2}]),
    ("image", [{2, 3}, {3}, {0, 3}, {0, 1, 2}]),  # 0 and 1 share a2, 1 and 2 share a3
    ("session", [{3}, {3}, {3}, {0, 1, 2}]),  # and so 0 and 2 are of one session
])  # fmt: skip
def test_what_is_excluded_is_chosen(exclude, found, tmp_path, capsys):
    lines = [("a1", "a2", "add a ball", "train"), ("a2", "a3", "add a ball", "train"), ("a3", "a4", "add a ball", "train"),
             ("b1", "b2", "add a dog", "train")]  # fmt: skip
    main(["index", "--data", str(rows(tmp_path, *lines)), "--out", str(tmp_path / "i"), "--neighbours", "3", "--exclude", exclude])
    assert [{*row[row >= 0].tolist()} for row in RetrievalIndex.load(tmp_path / "i").neighbours] == found


def test_index_is_brute_force_over_allowed_pairs(tmp_path):
    rng = np.random.default_rng(0)
    words = ["red", "blue", "ball", "night", "rain", "remove", "add"]
    lines = [
        (f"i{rng.integers(30)}", f"o{i}", " ".join(rng.choice(words, 3)), "train" if rng.random() < 0.8 else "eval") for i in range(60)
    ]
    index = build_index(rows(tmp_path, *lines), k=5)
    vectors = HashedNgramEncoder()([text for _, _, text, _ in lines])
    for i, (image, _, _, _) in enumerate(lines):
        allowed = [j for j, other in enumerate(lines) if other[3] == "train" and other[0] != image]
        cosines = np.sort(vectors[allowed] @ vectors[i])[::-1][:5]
        np.testing.assert_allclose(index.cosines[i], cosines, atol=1e-5)
        assert set(index.neighbours[i].tolist()) <= set(allowed) and len(set(index.neighbours[i].tolist())) == 5


def test_index_file_round_trips_and_knows_its_source(tmp_path):
    manifest = rows(tmp_path, ("a", "b", "remove the rain", "train"), ("c", "d", "make it night", "train"))
    index = build_index(manifest, k=3)
    index.save(tmp_path / "sub" / "i")
    again = RetrievalIndex.load(tmp_path / "sub" / "i")
    for name in ("features", "instructions", "neighbours", "cosines"):
        np.testing.assert_array_equal(getattr(again, name), getattr(index, name))
    link = tmp_path / "some" / "where" / "link"
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / "sub" / "i")
    assert RetrievalIndex.load(link).source.resolve() == again.source.resolve()
    ((record, cosine),) = again.retrieve("please make it night")
    assert record.instruction == "make it night" and record.input.resolve() == tmp_path / "c" and 0.3 < cosine < 1
    with pytest.raises(UserError, match="no training pair"):
        build_index(rows(tmp_path, ("a", "b", "x", "eval")), k=1)
    with pytest.raises(UserError, match="has changed since"):
        RetrievalIndex.load(tmp_path / "sub" / "i")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(UserError, match="mine: there already, and not an index"):
        index.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").exists()
    again.save(tmp_path / "sub" / "i")
    (tmp_path / "bad").write_bytes(b"x")
    with pytest.raises(UserError, match="bad: no index of format .*, which is a folder"):
        RetrievalIndex.load(tmp_path / "bad")
    with pytest.raises(UserError, match="no such file; make it with `xprompt index`"):
        RetrievalIndex.load(tmp_path / "none")


def test_neighbours_are_a_table_for_other_programs(tmp_path):
    """Parquet {row, neighbour, cosine}, nearest first; what is damaged is told."""
    manifest = rows(tmp_path, *((f"{i}a", f"{i}b", text, "train") for i, text in enumerate(["add a dog", "add a red dog", "", "night"])))
    index = build_index(manifest, k=3)
    index.save(tmp_path / "i")
    path = tmp_path / "i/neighbours.parquet"
    table = pyarrow.parquet.read_table(path)
    assert [str(f.type) for f in table.schema] == ["int32", "int32", "float"] and table.column_names == ["row", "neighbour", "cosine"]
    want = [(i, int(j), float(c)) for i in range(4) for j, c in zip(index.neighbours[i], index.cosines[i], strict=True) if j >= 0]
    assert [tuple(row.values()) for row in table.to_pylist()] == want and len(want) == 2 + 2 + 3 + 2
    again = RetrievalIndex.load(tmp_path / "i")
    np.testing.assert_array_equal(again.neighbours, index.neighbours)
    for wrong, told in (
        (table.set_column(1, "neighbour", pa.array([9] * 9, pa.int32())), "damaged"), (table.take([8, *range(8)]), "damaged"),
        (table.drop_columns("cosine"), "not a readable table"), (pa.concat_tables([table.slice(0, 2)] * 2 + [table.slice(2)]), "damaged"),
    ):  # fmt: skip
        pyarrow.parquet.write_table(wrong, path)
        with pytest.raises(UserError, match=rf"neighbours\.parquet: .*{told}"):
            RetrievalIndex.load(tmp_path / "i")


def test_what_cannot_be_an_example_is_not_retrieved(tmp_path):
    """Pairs of several inputs and pairs without words have neighbours and are none; sharing a further input makes a session."""
    lines = [
        {"input": "a", "output": "b", "instruction": "try it on", "more_inputs": ["coat"]},
        {"input": "c", "output": "d", "instruction": ""},
        {"input": "e", "output": "f", "instruction": "try it on"},
        {"input": "coat", "output": "g", "instruction": "try it on"},
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row | {"split": "train"}) + "\n" for row in lines))
    index = build_index(tmp_path / "m.jsonl", k=2)
    assert [set(row.tolist()) - {-1} for row in index.neighbours] == [{2}, {2, 3}, {3}, {2}]
    index.save(tmp_path / "i")
    assert len(RetrievalIndex.load(tmp_path / "i").retrieve("try it on", 2)) == 2
    with pytest.raises(UserError, match="has 2 training pairs"):
        index.retrieve("try it on", 3)


def test_the_same_rows_are_held_out_wherever_a_manifest_lies(tmp_path, monkeypatch):
    rows = "".join(json.dumps({"input": f"{i}.png", "output": f"{i}b.png", "instruction": "x"}) + "\n" for i in range(40))
    splits = []
    for place in ("here", "there/deep"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "m.jsonl").write_text(rows)
        splits.append([r.split for r in sources.manifest(tmp_path / place / "m.jsonl", eval_fraction=0.3)])
    monkeypatch.chdir(tmp_path)
    splits.append([r.split for r in sources.manifest("here/m.jsonl", eval_fraction=0.3)])
    assert splits[0] == splits[1] == splits[2] and {*splits[0]} == {"train", "eval"}


def test_training_draws_retrieved_examples(vqgan, tmp_path):
    """Row i of the index is pair i of the store: examples come from it, fall back to the group, and an index of other pairs is refused."""
    texts = ["add a red ball", "add a red ball", "add one red ball", "remove all rain", "paint a blue door", "paint a blue door"]
    rng = np.random.default_rng(0)
    records = [
        Record(*rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8), text, f"undo: {text}", group=group, split=split)
        for text, group, split in zip(texts, "aabbcc", ["train", "train", "eval", "train", "train", "train"], strict=True)
    ]
    store = tokenize(records, vqgan, tiny_tokenizer(), tmp_path / "store", progress=False)
    index = build_index(tmp_path / "store", k=1)
    index = dataclasses.replace(index, neighbours=np.where(np.arange(6)[:, None] == 4, -1, index.neighbours))  # one without neighbours
    index.save(tmp_path / "store.index")
    prompter = Prompter(tiny_tokenizer(), Layout("plain", tiny_tokenizer().vocab, TINY_VQ.downsample))
    bucket = BucketConfig("in_context", examples=2, context=160, todo=160, answer=19, rows=2)
    config = DataConfig(buckets=(bucket,), index=str(tmp_path / "store.index"), generic_instruction=0)
    shown = {}
    for split in ("train", "eval"):
        near = RetrievalIndex.load(tmp_path / "store.index").neighbours_in(store)
        episodes = Episodes(store, prompter, config, bucket, 3, split, near)
        for i, (number, reverse) in enumerate(episodes.specs):
            shown[number, reverse] = set(episodes.choose(i, np.random.default_rng(1)).partners)
    for reverse in (False, True):
        assert shown[0, reverse] == {1} and shown[1, reverse] == {0}
        assert shown[2, reverse] <= {0, 1}  # of another group, and held out itself
        assert shown[4, reverse] == {5}  # no neighbour: the group
    assert shown[3, False] <= {0, 1, 4, 5}  # its group has no other training pair
    model = dataclasses.replace(TINY, num_xp_tokens=3)
    told = report(Config(model=model, data=dataclasses.replace(config, store=str(tmp_path / "store"))))
    assert re.search(r" 10 episodes", told), told  # pair 3 among them, whose group has no other training pair
    copy = tokenize(records, vqgan, tiny_tokenizer(), tmp_path / "copy", progress=False)
    Rows(copy, prompter, config, 3)  # of the same pairs
    fewer = tokenize(records[:-1], vqgan, tiny_tokenizer(), tmp_path / "fewer", progress=False)
    with pytest.raises(UserError, match="have other pairs"):
        Rows(fewer, prompter, config, 3)


def test_an_index_made_with_clip_is_asked_through_the_same_clip(capsys, tmp_path):
    """Through the command; the features are CLIP's, any copy of the weights serves, and another encoder is refused."""
    texts = ["remove the rain", "make it night", "add a red ball", "make it a photo", "remove the rain"]
    manifest = rows(tmp_path, *((f"{i}a", f"{i}b", text, "eval" if i == 4 else "train") for i, text in enumerate(texts)))
    folder = str(write_clip(tmp_path / "clip"))
    flags = ["index", "--data", str(manifest), "--out", str(tmp_path / "i"), "--neighbours", "2"]
    main([*flags, "--encoder", "clip", "--clip", folder])
    assert "i: 5 pairs, 4 instructions of training pairs" in capsys.readouterr().out
    index, clip = RetrievalIndex.load(tmp_path / "i"), CLIP.load(folder)
    assert index.encoder == clip.name and index.features.shape == (4, clip.dim)
    np.testing.assert_allclose(index.features, clip(texts[:4]), atol=1e-6)
    scores = clip(texts) @ clip(texts[:4]).T - np.eye(5, 4) * 9
    np.testing.assert_array_equal(index.neighbours, np.argsort(-scores, axis=1)[:, :2])

    copy = CLIP.load(write_clip(tmp_path / "copy", "flax"))
    asked = "make it a red night"
    found = index.retrieve(asked, 4, encoder=copy)
    cosines = clip([asked])[0] @ clip(texts[:4]).T
    assert [r.instruction for r, _ in found] == [texts[i] for i in np.argsort(-cosines)]
    np.testing.assert_allclose([c for _, c in found], np.sort(cosines)[::-1], atol=1e-5)

    with pytest.raises(UserError, match=f"was made with {clip.name}; give that encoder's folder with --clip"):
        index.retrieve(asked)
    other = CLIP.load(write_clip(tmp_path / "other", tensors=clip_tensors(1)))
    with pytest.raises(UserError, match=f"was made with {clip.name}, not with {other.name}"):
        index.retrieve(asked, encoder=other)
    hashed = build_index(manifest, k=2)
    assert hashed.encoder == HashedNgramEncoder().name
    with pytest.raises(UserError, match="was made with hashed-ngram-512, not with clip-24-.*; leave --clip out"):
        hashed.retrieve(asked, encoder=clip)
    for wrong in (["--encoder", "clip"], ["--clip", folder]):
        with pytest.raises(SystemExit):
            main([*flags, *wrong])
        assert "--encoder clip and --clip DIR belong together" in capsys.readouterr().err


def test_an_encoder_by_its_name_on_the_hub(capsys, tmp_path, monkeypatch):
    """From the hub's cache, without a network; what is not there is told in one line."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit, place = "0123456789" * 4, tmp_path / "hub/models--openai--clip-tiny"
    write_clip(place / "snapshots" / commit, "flax")
    (place / "refs").mkdir()
    (place / "refs/main").write_text(commit)
    manifest = rows(tmp_path, ("a", "b", "remove the rain", "train"), ("c", "d", "make it night", "train"))
    flags = ["index", "--data", str(manifest), "--out", str(tmp_path / "i"), "--encoder", "clip", "--clip"]
    main([*flags, "openai/clip-tiny"])
    assert RetrievalIndex.load(tmp_path / "i").encoder == CLIP.load(place / "snapshots" / commit).name
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*flags, "openai/clip-none"])
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "openai/clip-none: no such folder, not in the hub's cache, and the hub cannot be reached" in err
    (place / "snapshots" / commit / "flax_model.msgpack").rename(tmp_path / "hub/pytorch_model.bin")
    with pytest.raises(UserError, match="openai/clip-tiny: .*(cannot be reached|no weights of it as)"):
        CLIP.load("openai/clip-tiny")
    with pytest.raises(UserError, match="nowhere: no such folder or file"):
        DINO.load(tmp_path / "nowhere")
