"""Suites through the real command, with a tiny random model: every number is computed again from the files and the images."""

import csv
import dataclasses
import json

import jax
import numpy as np
import PIL.Image
import pytest

from tests.helpers import TINY
from xprompt_jax import Example, UserError, XPrompt
from xprompt_jax.cli import main
from xprompt_jax.data.images import open_image, resize_center_crop, save_png
from xprompt_jax.data.sources import Record
from xprompt_jax.evaluate import metrics, runs
from xprompt_jax.evaluate.measures import Metric, reduce_sums
from xprompt_jax.evaluate.pairs import ARMS, make_episodes, paired_bootstrap, run_pairs
from xprompt_jax.evaluate.scores import summarise
from xprompt_jax.evaluate.suites import SUITES
from xprompt_jax.sample.speculative import decode_image

SIZE = TINY.vq.image_size


@pytest.fixture
def model(loud_model):
    return loud_model


@pytest.fixture
def folder(loud_folder):
    return loud_folder


def picture(*seed, shape=(SIZE, SIZE)):
    """Smooth, so that scores differ."""
    low = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(PIL.Image.fromarray(low).resize(shape[::-1], PIL.Image.Resampling.BICUBIC))


def record(i, group, task, split="eval"):
    return Record(picture(i, 0), picture(i, 1), f"{task} it", f"un{task} it", task=task, group=group, split=split)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A manifest of two tasks: one with training pairs, one without."""
    root = tmp_path_factory.mktemp("data")
    lines = []
    for i in range(8):
        for side in (0, 1):
            image = picture(i, side, shape=(20, 26)).copy()
            image[:, :13] = picture(i, 0, shape=(20, 26))[:, :13]  # half of it is not changed
            save_png(image, root / f"{i}-{side}.png")
        task, split = ("rain", "train" if i < 2 else "eval") if i < 4 else ("depth", "eval")
        words = {"instruction": "remove the rain" if task == "rain" else "paint the depth in grey", "task": task, "split": split}
        lines.append({"input": f"{i}-0.png", "output": f"{i}-1.png", **words})
    (root / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def strict_json(path):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_pairs_through_the_command(capsys, model, folder, data, tmp_path):
    flags = ["--examples", "2", "--seed", "3", "--top-k", "8"]
    main(["eval", "pairs", "--model", str(folder), "--data", str(data / "pairs.jsonl"), "--out", str(tmp_path / "o"), *flags])
    printed = capsys.readouterr().out
    result = strict_json(tmp_path / "o" / "result.json")
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "grid.png", "images", "index.html", "result.json", "run.json", "scores.csv"
    ]  # fmt: skip
    assert result["model"]["fingerprint"] == XPrompt.from_pretrained(folder).fingerprint and result["seed"] == 3
    assert result["versions"]["jax"] == jax.__version__ and result["sampling"]["top_k"] == 8
    assert result["data"] | {"path": "", "fingerprint": ""} == {
        "path": "", "examples_from": None, "fingerprint": "", "queries": 4, "groups": 2, "episodes": 8,
        "wrong_example": "a pair of another task",
    }  # fmt: skip

    # Rain has training pairs: its examples. Depth has none: two of its four held-out pairs are set aside.
    name = lambda path: path.rsplit("/", 1)[-1]
    rain = [q for q in result["queries"] if q["task"] == "rain"]
    assert {name(q["input"]) for q in rain} == {"2-0.png", "3-0.png"} and {name(q["example"]) for q in rain} == {"0-0.png", "1-0.png"}
    depth = [q for q in result["queries"] if q["task"] == "depth"]
    asked, shown = {name(q["input"]) for q in depth}, {name(q["example"]) for q in depth}
    assert len(asked) == len(shown) == 2 and asked | shown == {f"{i}-0.png" for i in range(4, 8)}
    assert {name(q["wrong"]) for q in rain} == shown

    # The controls are what they claim.
    for query in result["queries"]:
        before, after = (resize_center_crop(open_image(query["input"].replace("-0.png", f"-{s}.png")), SIZE) for s in (0, 1))
        (ceiling,) = model.decode_images(model.encode_images([after]))
        for metric in ("psnr_rgb", "ssim_rgb_gaussian", "mean_abs_error"):
            score = getattr(metrics, metric)
            assert query["scores"][metric]["copied"] == pytest.approx(score(before, after))
            assert query["scores"][metric]["ceiling"] == pytest.approx(score(np.asarray(ceiling), after))
        for region in ("changed_region_psnr", "unchanged_region_psnr"):
            wanted = getattr(metrics, region)(before, before, after)
            assert query["scores"][region]["copied"] == pytest.approx(wanted)

    # One query drawn again, alone.
    query = result["queries"][5]
    pair = Example(query["example"], query["example"].replace("-0.png", "-1.png"), "paint the depth in grey")
    (drawn,) = model.generate([pair], [query["input"]], seed=3, top_k=8)
    target = resize_center_crop(open_image(query["input"].replace("-0.png", "-1.png")), SIZE)
    assert query["scores"]["psnr_rgb"]["drawn"] == pytest.approx(metrics.psnr_rgb(np.asarray(drawn), target))

    # The same from the words alone: whatever the example.
    words = dataclasses.replace(model._no_example, instruction="paint the depth in grey")
    (alone,) = model.generate(words, [query["input"]], seed=3, top_k=8)
    assert query["scores"]["psnr_rgb"]["none"] == pytest.approx(metrics.psnr_rgb(np.asarray(alone), target))
    assert not np.array_equal(alone, drawn) and result["scores"]["psnr_rgb"]["none"]["spread"] == 0

    # Means, spreads and the interval follow from the queries; the table and the page say the same.
    for metric, scores in result["scores"].items():
        for arm in runs.ARMS:
            by_example = [np.mean([q["scores"][metric][arm] for q in result["queries"] if q["choice"] == c]) for c in (0, 1)]
            assert scores[arm]["by_example"] == pytest.approx(by_example)
            assert scores[arm]["mean"] == pytest.approx(np.mean(by_example))
            assert scores[arm]["spread"] == pytest.approx(abs(by_example[0] - by_example[1]) / np.sqrt(2))
        for control in ("wrong", "none"):
            gap = scores[f"drawn_minus_{control}"]
            assert gap["mean"] == pytest.approx(scores["drawn"]["mean"] - scores[control]["mean"])
            assert gap["low"] <= gap["mean"] <= gap["high"]
    assert result["scores"]["psnr_rgb"]["copied"]["spread"] == 0
    with (tmp_path / "o" / "scores.csv").open() as f:
        table = list(csv.DictReader(f))
    assert len(table) == 8 * 5 and float(table[0]["drawn"]) == result["queries"][0]["scores"]["psnr_rgb"]["drawn"]
    mean = result["scores"]["psnr_rgb"]["drawn"]["mean"]
    assert f"pairs psnr_rgb (dB): drawn {mean:.2f} ±" in printed and len(printed.splitlines()) == 6
    page = (tmp_path / "o" / "index.html").read_text()
    assert f"{mean:.2f}" in page and page.count("<img") == 9 * 4


def test_derain_prints_the_paper_beside_and_scores_whole_images(capsys, model, folder, tmp_path):
    for i in range(3):
        for j, side in enumerate(("input", "target")):
            save_png(picture(i, j, shape=(24, 40)), tmp_path / "d" / side / f"{i}.png")
    main(["eval", "derain", "--model", str(folder), "--data", str(tmp_path / "d"), "--out", str(tmp_path / "o"), "--examples", "1"])
    out = capsys.readouterr().out
    assert out.count("; paper: X-Prompt, Table 2 25.53") == 2 and "does not say whether RGB or Y" in out
    assert "derain: 2 queries are not the benchmark, which has 100; " in out
    result = strict_json(tmp_path / "o" / "result.json")
    assert "error" in (tmp_path / "o" / "index.html").read_text()
    assert result["published"]["rows"]["X-Prompt, Table 2"] == {"PSNR": 25.53, "SSIM": 0.843}
    assert result["data"]["wrong_example"] == "the right example, shown backwards" and result["data"]["queries"] == 2
    main(["eval", "recompute", str(tmp_path / "o")])
    assert "numbers of result.json follow from its files" in capsys.readouterr().out
    query = result["queries"][0]
    before, after = (PIL.Image.open(query["input"].replace("input", side)) for side in ("input", "target"))
    # Stretched to the model's square, through it and back.
    square = lambda image: image.resize((SIZE, SIZE), PIL.Image.Resampling.LANCZOS)
    back = lambda image: np.asarray(image.resize((40, 24), PIL.Image.Resampling.BICUBIC))
    assert query["scores"]["psnr_y"]["copied"] == pytest.approx(metrics.psnr_y(back(square(before)), np.asarray(after)))
    (ceiling,) = model.decode_images(model.encode_images([square(after)]))
    assert query["scores"]["psnr_y"]["ceiling"] == pytest.approx(metrics.psnr_y(back(ceiling), np.asarray(after)))


def test_examples_from_elsewhere_leave_every_pair_a_query(folder, data, tmp_path):
    for where in ("test", "train"):
        for i in range(2):
            for side in ("low", "high"):
                save_png(picture(i, len(where), side == "low"), tmp_path / where / side / f"{i}.png")
    flags = ["--data", str(tmp_path / "test"), "--examples-from", str(tmp_path / "train"), "--examples", "1"]
    main(["eval", "low_light", "--model", str(folder), "--out", str(tmp_path / "o"), *flags])
    queries = strict_json(tmp_path / "o" / "result.json")["queries"]
    assert len(queries) == 2 and all("/test/" in q["input"] and "/train/" in q["example"] for q in queries)
    assert all(q["words"] == ["brighten the dark photograph"] for q in queries)
    with pytest.raises(UserError, match=r"0\.png would be an example for itself \(equal files\)"):
        runs.make_plan(SUITES["low_light"], tmp_path / "test", examples_from=tmp_path / "test")


def test_groups_without_examples_are_named(capsys, folder, data, tmp_path):
    row = {"input": str(data / "0-0.png"), "output": str(data / "0-1.png"), "instruction": "x", "task": "rain"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit):
        main([
            "eval", "pairs", "--model", str(folder), "--data", str(data / "pairs.jsonl"), "--examples-from", str(tmp_path / "m.jsonl"),
            "--out", str(tmp_path / "o"),
        ])  # fmt: skip
    assert "no pair of group 'depth', which --data asks for" in capsys.readouterr().err


@pytest.mark.parametrize("suite", SUITES)
def test_absent_data_is_one_line_with_place_and_layout(capsys, tmp_path, suite):
    for place, problem in ((tmp_path / "none", "no such file or folder"), (tmp_path, "not the layout expected")):
        with pytest.raises(SystemExit):
            main(["eval", suite, "--model", "m", "--data", str(place), "--out", str(tmp_path / "o")])
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--data {place}: {problem}" in line and all(f"{a}/ and {b}/" in line for a, b in SUITES[suite].layouts)


def test_nothing_held_out_is_told(capsys, folder, tmp_path):
    save_png(picture(0), tmp_path / "a.png")
    row = {"input": "a.png", "output": "a.png", "instruction": "x", "split": "train"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(SystemExit):
        main(["eval", "pairs", "--model", str(folder), "--data", str(tmp_path / "m.jsonl"), "--out", str(tmp_path / "o")])
    assert "no pair is held out" in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_a_task_is_compiled_once(model):
    """More queries of a task, other pictures, words and seeds need no further program."""
    draw = lambda seed, count: list(
        run_pairs(
            model, make_episodes([record(100 * seed + i, "g", "a") for i in range(count)], examples=1), no_example=True, seed=seed,
            progress=False,
        )
    )  # fmt: skip
    draw(1, 6)
    programs = decode_image._cache_size(), model._compiled_examples._cache_size()
    draw(2, 22)  # a whole batch, and a part of one
    assert (decode_image._cache_size(), model._compiled_examples._cache_size()) == programs


def test_run_pairs_takes_records_in_memory_and_ignores_company(model):
    records = [record(i, f"g{i // 3}", ("a", "b", "a")[i // 3]) for i in range(9)]
    episodes = make_episodes(records, examples=1, per_group=1)
    assert [e.wrong.task for e in episodes] == ["b", "a", "b"] and len(episodes) == 3
    outcomes = list(run_pairs(model, episodes, seed=5, progress=False, temperature=0.2))
    alone = next(run_pairs(model, episodes[1:2], seed=5, progress=False, temperature=0.2))
    bare = list(run_pairs(model, episodes, wrong=False, seed=5, progress=False, temperature=0.2))
    for arm in ARMS:
        np.testing.assert_array_equal(outcomes[1].images[arm], alone.images[arm])
    assert set(bare[0].images) == {*ARMS} - {"wrong"} and len(bare) == 3
    np.testing.assert_array_equal(bare[1].images["drawn"], alone.images["drawn"])
    query, wrong = episodes[1].query, episodes[1].wrong
    np.testing.assert_array_equal(alone.images["copied"], query.input)
    np.testing.assert_array_equal(alone.target, query.output)
    # The wrong example, under the query's own words.
    task = dataclasses.replace(model.compile([Example(wrong.input, wrong.output, wrong.instruction)]), instruction=query.instruction)
    (drawn,) = model.generate(task, [query.input], seed=5, temperature=0.2)
    np.testing.assert_array_equal(alone.images["wrong"], drawn)
    (other,) = model.generate(task, [query.input], wrong.instruction, seed=5, temperature=0.2)
    assert not np.array_equal(drawn, other), "words must matter to this model, or nothing was shown"


def test_one_group_has_its_examples_backwards_for_wrong_ones(model):
    episodes = make_episodes([record(i, "g", "rain") for i in range(2)])
    (outcome,) = run_pairs(model, episodes, progress=False, temperature=0.2)
    shown, query = episodes[0].example, episodes[0].query
    assert episodes[0].backwards and shown is not query
    backwards = model.compile([Example(shown.output, shown.input, "unrain it")])
    (drawn,) = model.generate(backwards, [query.input], "rain it", temperature=0.2)
    np.testing.assert_array_equal(outcome.images["wrong"], drawn)
    assert not np.array_equal(drawn, outcome.images["drawn"])
    np.testing.assert_array_equal(outcome.example, (shown.input, shown.output))


def test_episodes_never_show_a_query_to_itself():
    records = [record(i, f"g{i % 3}", "t") for i in range(13)]
    training = [record(100 + i, "g0", "t", "train") for i in range(2)]
    for seed in range(5):
        episodes = make_episodes(records, training, examples=3, seed=seed)
        shown, asked = {id(e.example) for e in episodes}, {id(e.query) for e in episodes}
        assert not shown & asked and len(asked) == 5 + 1 + 1
        assert {id(e.example) for e in episodes if e.query.group == "g0"} == {id(r) for r in training}
        assert all(e.wrong.group != e.example.group == e.query.group for e in episodes)
    with pytest.raises(UserError, match="no group"):
        make_episodes(records[:1])


def test_bootstrap_against_cases_worked_by_hand():
    assert paired_bootstrap([2.0] * 7) == (2.0, 2.0, 2.0)
    # Two queries: resampled means are 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    assert paired_bootstrap([0.0, 1.0]) == (0.5, 0.0, 1.0)
    assert paired_bootstrap([0.0, 1.0], level=0.4) == (0.5, 0.5, 0.5)
    # (0, 0, 3): the mean is Binomial(3, 1/3), cumulated 0.296, 0.741, 0.963, 1; so 20 % and 80 % are at 0 and 2.
    assert paired_bootstrap([0.0, 0.0, 3.0], level=0.6) == (1.0, 0.0, 2.0)
    assert paired_bootstrap([1.0, float("inf"), float("nan")]) == (1.0, 1.0, 1.0)
    # Many queries: the normal interval.
    mean, low, high = paired_bootstrap(np.random.default_rng(0).normal(3, 2, 400))
    assert (low - mean, high - mean) == (pytest.approx(-0.196, abs=0.02), pytest.approx(0.196, abs=0.02))


def test_interval_takes_a_query_once_however_many_examples_it_has():
    episodes = make_episodes([record(i, "g", "t") for i in range(4)], examples=2)  # 2 queries, 2 examples each
    drawn = [-8.0, 12.0, 15.0, -5.0]  # drawn - wrong: -9 and 11 -> 1; 14 and -6 -> 4
    scores = [{"m": {arm: (d if arm == "drawn" else 1.0, 1) for arm in ARMS}} for d in drawn]
    metric = Metric("m", "", "", lambda *a: (0, 0))
    summary = summarise(metric, episodes, scores)
    assert summary["drawn_minus_wrong"] == {"mean": 2.5, "low": 1.0, "high": 4.0}
    assert summary["drawn"] == {"mean": 3.5, "spread": 0.0, "by_example": [3.5, 3.5]}


def test_pooled_sums_equal_the_metrics_over_all_images():
    rng = np.random.default_rng(0)
    truths = [rng.integers(-1, 6, (5, 7)) for _ in range(3)]
    guesses = [np.where(rng.random(t.shape) < 0.5, t, rng.integers(0, 8, t.shape)).clip(0) for t in truths]
    (iou,) = SUITES["segmentation"].metrics
    pooled = reduce_sums(iou.measure(g, t, t) for g, t in zip(guesses, truths, strict=True))
    assert pooled == pytest.approx(100 * metrics.mean_iou(guesses, truths, 150))

    truths = [rng.normal(size=(5, 7, 3)) * (rng.random((5, 7, 1)) < p) for p in (1, 0.3, 0)]
    guesses = [rng.normal(size=(5, 7, 3)) for _ in truths]
    expected = metrics.normal_angles(guesses, truths)
    for angle in SUITES["normals"].metrics:
        pooled = angle.reduce(angle.measure(g, t, t) for g, t in zip(guesses, truths, strict=True))
        key = angle.name.removeprefix("normal_angles_")
        wanted = 100 * expected[key] if angle.unit == "%" else expected[key]
        assert pooled == pytest.approx(wanted, **({"abs": 1.0} if key == "median" else {}))  # few pixels: the next one may be far

    truths = [rng.uniform(0, 11, (480, 640)).astype(np.float32), np.zeros((4, 4), np.float32), rng.uniform(0, 9, (6, 6)).astype(np.float32)]
    guesses = [rng.uniform(0, 11, t.shape).astype(np.float32) for t in truths]
    for rmse, wanted in zip(SUITES["depth"].metrics, (metrics.depth_rmse_painter, metrics.depth_rmse_pooled), strict=False):
        assert rmse.name == wanted.__name__
        pooled = rmse.reduce(rmse.measure(g, t, t) for g, t in zip(guesses, truths, strict=True))
        assert pooled == pytest.approx(wanted(guesses, truths))
    assert np.isnan(reduce_sums([])) and np.isnan(reduce_sums([(0.0, 0)]))
