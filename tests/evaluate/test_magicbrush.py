"""MagicBrush from the layout of its archive to the scores: every number computed again from the files, with random CLIP and DINO."""

import dataclasses
import itertools
import json

import numpy as np
import PIL.Image
import pytest

from tests.helpers import TINY
from tests.vision.made import clip_tensors, write_clip
from xprompt_jax import Example, UserError
from xprompt_jax.cli import main
from xprompt_jax.data.images import open_image, save_png
from xprompt_jax.evaluate import features
from xprompt_jax.evaluate.edits import Edit
from xprompt_jax.evaluate.features import Looks
from xprompt_jax.evaluate.magicbrush import MAGICBRUSH, MAGICBRUSH_MULTI, Session, read_turns
from xprompt_jax.evaluate.measures import reduce_sums
from xprompt_jax.evaluate.pairs import pairs_in
from xprompt_jax.evaluate.suites import find_records, get_suite
from xprompt_jax.evaluate.turns import at_turn
from xprompt_jax.vision.clip import CLIP
from xprompt_jax.vision.dino import DINO

SIZE = TINY.vq.image_size


def picture(*seed, shape=(24, 24)):
    low = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(PIL.Image.fromarray(low).resize(shape[::-1], PIL.Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The unpacked test archive: image 139 with two turns, 30 with one, which is not square."""
    root = tmp_path_factory.mktemp("magic")
    turns, whole, local = [], {}, {}
    for image, count in (("139", 2), ("30", 1)):
        shape = (24, 24) if image == "139" else (20, 28)
        before = f"{image}-input.png"
        save_png(picture(int(image), shape=shape), root / "test" / "images" / image / before)
        whole[image], local[image] = {before: f"a photo {image}"}, {}
        for k in range(1, count + 1):
            after = f"{image}-output{k}.png"
            save_png(picture(int(image), k, shape=shape), root / "test" / "images" / image / after)
            save_png(picture(int(image), k, 9, shape=shape), root / "test" / "images" / image / f"{image}-mask{k}.png")
            turns.append({"input": before, "mask": f"{image}-mask{k}.png", "output": after, "instruction": f"add red ball {k} "})
            whole[image][after], local[image][after] = f"a photo {image} with ball {k} at night", f"the red ball {k}"
            before = after
    for name, value in (("edit_turns", turns), ("global_descriptions", whole), ("local_descriptions", local)):
        (root / "test" / f"{name}.json").write_text(json.dumps(value))
    return root


@pytest.fixture
def model(tiny_model):
    return str(tiny_model)


def test_turns_start_from_the_true_picture_before_and_have_both_captions(archive):
    turns = read_turns(archive / "test")
    assert [(t.input.name, t.output.name) for t in turns] == [
        ("139-input.png", "139-output1.png"), ("139-output1.png", "139-output2.png"), ("30-input.png", "30-output1.png"),
    ]  # fmt: skip
    second = turns[1]
    assert second.instruction == "add red ball 2" and second.split == "eval" and second.input.is_file()
    assert second.captions_before == {"global": "a photo 139 with ball 1 at night"}
    assert second.captions_after == {"global": "a photo 139 with ball 2 at night", "local": "the red ball 2"}
    assert find_records(MAGICBRUSH, archive) == find_records(MAGICBRUSH, archive / "test") == turns


def test_scores_are_those_of_the_files(capsys, archive, weights, model, tmp_path):
    flags = ["eval", "magicbrush", "--model", model, "--data", str(archive), "--out", str(tmp_path), "--examples", "1"]
    main([*flags, "--clip", str(weights[0]), "--dino", str(weights[1])])
    printed = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "result.json").read_text())
    clip, dino = CLIP.load(weights[0]), DINO.load(weights[1])
    assert result["data"]["queries"] == 2 and result["suite"] == get_suite("magicbrush").name == "magicbrush"
    assert all(clip.name in m["protocol"] and dino.name in m["protocol"] for m in result["protocol"]["metrics"].values())
    turns = {t.output.name: t for t in read_turns(archive / "test")}
    arms = ("drawn", "wrong", "none", "copied", "ceiling")
    for query in result["queries"]:
        turn = turns[query["target"].rsplit("/", 1)[-1]]
        source, target = (open_image(path) for path in (turn.input, turn.output))
        square = target.width == target.height
        for arm in arms:
            if arm == "copied":
                image = source.resize((SIZE, SIZE), PIL.Image.Resampling.LANCZOS)
            else:
                name = f"{arm}.png" if arm in ("none", "ceiling") else f"{arm}-{query['choice']}.png"
                image = open_image(tmp_path / "images" / f"{query['number']:05d}" / name)
            assert image.size == (SIZE, SIZE)
            full = image.resize(target.size, PIL.Image.Resampling.BICUBIC)
            seen = image if square else full
            (a, b, s), (p, q) = clip.images([seen, target, source]), dino.images([seen, target])
            local, after, before = clip([turn.captions_after["local"], turn.captions_after["global"], turn.captions_before["global"]])
            direction = (a - s) @ (after - before) / np.linalg.norm(a - s) / np.linalg.norm(after - before)
            difference = np.asarray(full, float) / 255 - np.asarray(target, float) / 255
            wanted = {
                "clip_direction": direction, "clip_text_local": a @ local, "clip_image_target": a @ b, "dino_target": p @ q,
                "clip_text_global": a @ after, "clip_text_oracle": b @ local, "l1_unit": np.abs(difference).mean(),
                "l2_unit": (difference**2).mean(),
            }  # fmt: skip
            assert set(wanted) == set(query["scores"])
            for metric, value in wanted.items():
                assert query["scores"][metric][arm] == pytest.approx(value, abs=2e-5), (metric, arm)
    (told,) = (line for line in printed if line.startswith("magicbrush dino_target: drawn"))
    assert told.endswith("; paper: X-Prompt, Table 3 0.781")
    assert result["published"]["rows"]["MagicBrush's own model, Table 3"]["DINO"] == 0.899
    assert printed[-2].startswith("magicbrush: 2 queries are not the benchmark, which has 1,053; ")
    main(["eval", "recompute", str(tmp_path), "--clip", str(weights[0]), "--dino", str(weights[1])])
    assert "numbers of result.json follow from its files" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(flags)
    assert "--clip DIR (openai/clip-vit-base-patch32) is missing" in capsys.readouterr().err


def test_index_gives_every_turn_the_pairs_with_the_nearest_instructions(capsys, archive, weights, model, tmp_path):
    texts = ["remove the rain", "add red ball 2", "make it night", "add a red ball", "add red ball 1"]
    rows = [{"input": f"{i}a.png", "output": f"{i}b.png", "instruction": text, "split": "train"} for i, text in enumerate(texts)]
    for i, side in itertools.product(range(5), "ab"):
        save_png(picture(i, ord(side)), tmp_path / f"{i}{side}.png")
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["index", "--data", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "i"), "--encoder", "clip", "--clip", str(weights[0])])
    flags = ["eval", "magicbrush", "--model", model, "--data", str(archive), "--clip", str(weights[0]), "--dino", str(weights[1])]
    flags += ["--index", str(tmp_path / "i"), "--examples", "2", "--queries", "2"]
    main([*flags, "--out", str(tmp_path / "o")])
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    clip = CLIP.load(weights[0])
    found = {}
    for query in result["queries"]:
        found.setdefault(query["input"].rsplit("/", 1)[-1], set()).add(int(query["example"][-6]))
        assert query["wrong"] != query["example"]
    cosines = clip(["add red ball 1", "add red ball 2"]) @ clip(texts).T
    nearest = [set(row[:2].tolist()) for row in np.argsort(-cosines, axis=1)]
    assert [found["139-input.png"], found["139-output1.png"]] == nearest and len(found) == 2 and 4 in nearest[0] and 1 in nearest[1]
    assert result["data"]["queries"] == 2 and result["data"]["wrong_example"] == "a pair of another group"
    assert "; paper: X-Prompt + RAIE, Table 3 0.097" in capsys.readouterr().out
    weights_flags = ["--clip", str(weights[0]), "--dino", str(weights[1])]
    main(["eval", "recompute", str(tmp_path / "o"), *weights_flags, "--index", str(tmp_path / "i")])
    assert "numbers of result.json follow from its files" in capsys.readouterr().out
    for more, told in (
        (["--examples-from", str(tmp_path / "m.jsonl")], "--index takes the place of --examples-from"),
        (["--clip", str(write_clip(tmp_path / "other", tensors=clip_tensors(1)))], f"was made with {clip.name}, not with"),
    ):
        with pytest.raises(SystemExit):
            main([*flags, "--out", str(tmp_path / "p"), *more])
        assert told in capsys.readouterr().err


def test_sessions_edit_what_the_model_drew(capsys, archive, weights, loud_model, loud_folder, tmp_path):
    """With and without retrieval: every turn starts from the model's own picture, under its own words and example."""
    texts = ["add red ball 1", "add red ball 2", "make it night"]
    rows = [{"input": f"{i}a.png", "output": f"{i}b.png", "instruction": text, "split": "train"} for i, text in enumerate(texts)]
    for i, side in itertools.product(range(3), "ab"):
        save_png(picture(i, ord(side), shape=(SIZE, SIZE)), tmp_path / f"{i}{side}.png")
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["index", "--data", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "i")])
    flags = ["--clip", str(weights[0]), "--dino", str(weights[1])]
    command = ["eval", "magicbrush_multi", "--model", str(loud_folder), "--data", str(archive), "--examples", "1", *flags]
    command += ["--temperature", "0.2"]
    draw = lambda example, image, words: np.asarray(loud_model.generate([example], [image], words, temperature=0.2)[0])
    pairs = [Example(str(tmp_path / f"{i}a.png"), str(tmp_path / f"{i}b.png"), text) for i, text in enumerate(texts)]
    turns = read_turns(archive / "test")
    for name, way in (("raie", ["--index", str(tmp_path / "i")]), ("plain", ["--examples-from", str(tmp_path / "m.jsonl")])):
        main([*command, "--out", str(tmp_path / name), *way])
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert [q["target"].rsplit("/", 1)[-1] for q in result["queries"]] == ["139-output2.png", "30-output1.png"]
        assert result["queries"][0]["input"].endswith("139-input.png") and result["data"]["queries"] == 2
        pair = int(result["queries"][0]["example"][-6])
        for query, session in zip(result["queries"], (turns[:2], turns[2:]), strict=True):
            image = first = np.asarray(open_image(query["input"]).resize((SIZE, SIZE), PIL.Image.Resampling.LANCZOS))
            for number, turn in enumerate(session):
                shown = number if name == "raie" else pair  # the instruction that is nearest is the turn's own
                before, image = image, draw(pairs[shown], image, turn.instruction)
            drawn = open_image(tmp_path / name / "images" / f"{query['number']:05d}" / "drawn-0.png")
            np.testing.assert_array_equal(image, np.asarray(drawn))
            if len(session) == 2:  # input and example must matter to this model, or nothing was shown
                assert not np.array_equal(image, draw(pairs[shown], first, turn.instruction))
                assert name == "plain" or not np.array_equal(image, draw(pairs[0], before, turn.instruction))
        # The last picture is held against the last target, by its local caption.
        look = features.Encoders(*weights)
        ((clip, _),) = look.look([np.asarray(open_image(tmp_path / name / "images" / "00000" / "drawn-0.png"))])
        (caption,) = look.clip(["the red ball 2"])
        assert result["queries"][0]["scores"]["clip_text_local"]["drawn"] == pytest.approx(clip @ caption, abs=2e-5)
        more = way if name == "raie" else []
        main(["eval", "recompute", str(tmp_path / name), *flags, *more])
        assert "numbers of result.json follow from its files" in capsys.readouterr().out
    main(["eval", "compare", str(tmp_path / "plain"), str(tmp_path / "raie"), "--out", str(tmp_path / "c")])
    assert "clip_direction drawn" in capsys.readouterr().out


def test_sessions_keep_the_order_of_their_turns(archive):
    first, second = find_records(MAGICBRUSH_MULTI, archive)
    assert isinstance(first, Session) and [t.instruction for t in first.turns] == ["add red ball 1", "add red ball 2"]
    assert first.captions_before == {"global": "a photo 139"} and first.captions_after["local"] == "the red ball 2"
    assert len(second.turns) == 1 and pairs_in(first) == first.turns and at_turn(second, 3) is second.turns[0]
    assert all("0.2855" in m.protocol for m in MAGICBRUSH_MULTI.metrics if m.name == "clip_text_oracle")


def looks(pixels=0, clip=(1, 0), dino=(0, 1), **words):
    unit = lambda v: np.asarray(v, np.float32) / max(np.linalg.norm(v), 1e-9)
    return Looks(np.full((2, 2, 3), pixels, np.uint8), unit(clip), unit(dino), {k: unit(v) for k, v in words.items()})


def test_scores_worked_by_hand():
    drawn, target = looks(51, (1, 1), (3, 4)), looks(0, (1, 0), (4, 3), local=(0, 1), **{"global": (0, 1)})
    source = looks(9, (0, 1), (1, 0), **{"global": (1, 0)})
    score = lambda name: getattr(features, name)(drawn, target, source)
    half = 0.5**0.5
    assert score("clip_image_target") == pytest.approx(half) and score("dino_target") == pytest.approx(24 / 25)
    assert score("clip_text_local") == score("clip_text_global") == pytest.approx(half) and score("clip_text_oracle") == 0
    # Image: (.7, .7) - (0, 1); captions: (0, 1) - (1, 0).
    assert score("clip_direction") == pytest.approx((-half + half - 1) / np.hypot(half, half - 1) / 2**0.5)
    assert score("l1_unit") == pytest.approx(0.2) and score("l2_unit") == pytest.approx(0.04)
    assert np.isnan(features.clip_direction(source, target, source)), "nothing changed"
    # Image: (.7, .7) - (0, 1); target: (1, 0) - (0, 1).
    assert score("clip_direction_image") == pytest.approx((half + 1 - half) / np.hypot(half, half - 1) / 2**0.5)
    assert score("clip_image_input") == pytest.approx(half)
    assert np.isnan(features.clip_direction(drawn, target, looks())) and np.isnan(features.clip_text_local(drawn, source, source))


def test_a_manifest_gets_the_scores_of_images_alone(weights, tmp_path):
    for name in "ab":
        save_png(picture(ord(name)), tmp_path / f"{name}.png")
    (tmp_path / "m.jsonl").write_text(json.dumps({"input": "a.png", "output": "b.png", "instruction": "x"}) + "\n")
    (record,) = find_records(MAGICBRUSH, tmp_path / "m.jsonl")
    assert not isinstance(record, Edit) and record.group == "magicbrush"
    suite = MAGICBRUSH.with_encoders(*weights)
    scores = suite.score(record, {"drawn": picture(3, shape=(SIZE, SIZE))}, SIZE)
    found = {name: reduce_sums([arms["drawn"]]) for name, arms in scores.items()}
    assert {name for name, value in found.items() if np.isnan(value)} == {
        "clip_direction", "clip_text_local", "clip_text_global", "clip_text_oracle"
    }  # fmt: skip
    with pytest.raises(UserError, match="suite magicbrush needs --clip and --dino"):
        MAGICBRUSH.score(record, {}, SIZE)


def test_what_is_missing_is_one_line(archive, weights, tmp_path):
    with pytest.raises(UserError, match=r"--clip DIR .* is missing"):
        MAGICBRUSH.with_encoders(None, weights[1])
    with pytest.raises(UserError, match=r"--dino DIR .* is missing"):
        MAGICBRUSH.with_encoders(weights[0], None)
    with pytest.raises(UserError, match="not the layout expected; suite magicbrush takes a manifest .*edit_turns.json"):
        find_records(MAGICBRUSH, tmp_path)
    files = {name: (archive / "test" / f"{name}.json").read_text() for name in ("edit_turns", "global_descriptions", "local_descriptions")}
    for name, text, told in (
        ("local_descriptions", None, "no local_descriptions.json; it lies in MagicBrush's test archive"),
        ("local_descriptions", "{}", "no caption of 139-output1.png"),
        ("edit_turns", "[{}]", "a turn without input, output and instruction"),
        ("edit_turns", "[", "edit_turns.json: not readable"),
    ):
        place = tmp_path / f"{name}{len(told)}"
        place.mkdir()
        for other, whole in files.items():
            (place / f"{other}.json").write_text(whole)
        (place / f"{name}.json").unlink()
        if text is not None:
            (place / f"{name}.json").write_text(text)
        with pytest.raises(UserError, match=told):
            find_records(MAGICBRUSH, place)


def test_metrics_carry_the_names_of_their_functions():
    for metric in MAGICBRUSH.metrics:
        assert callable(getattr(features, metric.name)) and metric.protocol
    columns = {m.column for m in MAGICBRUSH.metrics if m.column}
    assert columns == {"CLIP_dir", "CLIP_out", "CLIP_img", "DINO"}
    assert set().union(*MAGICBRUSH.published.values()) <= columns and dataclasses.is_dataclass(MAGICBRUSH)
