"""Decoding against the oracle: compiled = masked, windows = one by one, alone = in a batch."""

import contextlib
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import safetensors

from tests.helpers import FP32, TINY, tiny_tokenizer
from xprompt_jax.data.images import save_png
from xprompt_jax.data.retrieval import build_index
from xprompt_jax.errors import UserError
from xprompt_jax.files import write_tensors
from xprompt_jax.model.chameleon import Chameleon, extend, project_logits
from xprompt_jax.model.params import flatten, unflatten
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.prompt import Sample, SlotShape, fill
from xprompt_jax.sample.compiled import FORMAT, CompiledPrompt
from xprompt_jax.sample.defaults import DEFAULTS
from xprompt_jax.sample.draw import explained_memory, image_keys
from xprompt_jax.sample.guidance import Guidance
from xprompt_jax.sample.logits import Sampling, choose, gumbel, narrow
from xprompt_jax.sample.prefill import prefill
from xprompt_jax.sample.sampler import Example, XPrompt


@pytest.fixture(scope="module")
def model():
    decoder = Chameleon(TINY, jax.random.key(0))
    params = flatten(decoder)
    params["head"] = params["head"] * 3  # sharper than random: windows should agree sometimes, and not always
    return XPrompt(unflatten(decoder, params), VQGAN(TINY.vq, jax.random.key(1)), tiny_tokenizer(), compute=FP32)


def images(seed, count):
    return list(np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8))


def example(seed, instruction="remove the rain"):
    return Example(*images(seed, 2), instruction)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def by_the_oracle(model, examples, image, seed):
    """Draws one image token by token through `XPrompt.logits` on the whole prompt, examples in it, nothing cached."""
    v, p = model.tokenizer.vocab, model.prompter
    codes = model.encode_images([i for e in examples for i in (e.input, e.output)])
    ies = tuple(p.example(e.instruction, codes[2 * i], codes[2 * i + 1]) for i, e in enumerate(examples))
    task = p.task(examples[0].instruction, model.encode_images([image])[0])
    grid = model.config.vq.grid
    shape = SlotShape(len(ies), max(map(len, ies)), model.config.num_xp_tokens, len(task) + grid * grid + 2)
    key, answer = jax.random.fold_in(jax.random.key(seed), 0), [v.boi]
    for i in range(grid * grid):
        row = fill(Sample(ies, task, np.array(answer)), shape, bos=v.bos, pad=v.pad)
        segments = (row.roles != 4).astype(int)
        logits = model.logits(row.ids[None], row.roles[None], row.groups[None], row.positions[None], segments[None])
        here = logits[0, shape.xp_end + len(task) + i, v.image_start : v.image_start + v.num_codes]
        noise = gumbel(key[None], jnp.array([[1 + i]]), v.num_codes)[0, 0]
        answer.append(int(choose(here, noise, Sampling())) + v.image_start)
    return p.layout.decode([*answer, v.eoi], grid, grid)


@pytest.mark.parametrize("count", [1, 2])
def test_compiled_and_cached_is_the_masked_prompt(model, count):
    examples, (image,) = [example(10 + i) for i in range(count)], images(1, 1)
    want = model.decode_images(by_the_oracle(model, examples, image, seed=3)[None])
    for decoding in ("sequential", "jacobi")[2 - count :]:  # they are the same code, and held together below
        assert same(model.generate(examples, [image], seed=3, decoding=decoding, window=5), want)


def test_an_edit_takes_its_example_from_an_index(model, tmp_path):
    """RAIE: the nearest training pair by the instruction, and the asked instruction for the task."""
    rows = []
    for i, text in enumerate(["make it night", "remove the rain", "paint the depth in grey"]):
        for side, picture in zip("ab", images(30 + i, 2), strict=True):
            save_png(PIL.Image.fromarray(picture), tmp_path / f"{i}{side}.png")
        rows.append(json.dumps({"input": f"{i}a.png", "output": f"{i}b.png", "instruction": text, "split": "train"}) + "\n")
    (tmp_path / "edits.jsonl").write_text("".join(rows))
    index = build_index(tmp_path / "edits.jsonl", k=1)
    asked, picture = "please remove the rain", images(1, 1)
    options = {"seed": 3, "guidance": 50.0, "window": 5}  # a random model hardly listens
    want = model.generate([example(31)], picture, asked, **options)
    assert same(model.generate(None, picture, asked, retrieve_from=index, **options), want)
    assert not same(model.generate([example(30)], picture, asked, **options), want)
    for task, text in ((None, None), ([example(31)], asked)):
        with pytest.raises(UserError, match="give an instruction, and None for the task"):
            model.generate(task, picture, text, retrieve_from=index)


def test_compiled_logits_are_the_masked_logits(model):
    """Numbers, not tokens: a wrong rotation of the XP keys need not change any token of a small model."""
    v, p = model.tokenizer.vocab, model.prompter
    examples = [example(20), example(21, "a much longer instruction: add rain and paint the depth in grey")]
    codes = model.encode_images([i for e in examples for i in (e.input, e.output)])
    ies = tuple(p.example(e.instruction, codes[2 * i], codes[2 * i + 1]) for i, e in enumerate(examples))
    task = p.task("remove the rain", codes[0])
    shape = SlotShape(2, max(map(len, ies)), model.config.num_xp_tokens, len(task) + 1)
    row = fill(Sample(ies, task, np.array([v.boi])), shape, bos=v.bos, pad=v.pad)
    segments = (row.roles != 4).astype(int)
    want = model.logits(row.ids[None], row.roles[None], row.groups[None], row.positions[None], segments[None])[:, -1]

    apart = model.layers_apart
    cache = prefill(apart, model.config, [model.compile(examples)], [task], v.bos, room=1, dtype=jnp.float32)

    @jax.jit
    def decode(apart, cache):
        x = apart.embed[...][np.array([[v.boi]])]
        h, _ = extend(apart.blocks, x, cache, jnp.ones(1, jnp.int32), model.config.rope_theta)
        return project_logits(apart.final(h), apart.head[...])

    np.testing.assert_allclose(decode(apart, cache)[:, 0], want, atol=2e-4, rtol=1e-4)


def test_windows_draw_the_same_images(model):
    task, inputs = model.compile([example(2)]), images(3, 3)
    draw = lambda **kw: model.generate(task, inputs, num_images=5, top_k=20, guidance=1.5, **kw)
    for seed in range(3):
        want = draw(seed=seed, decoding="sequential")
        assert len(want) == 15 and not same(want[:1], want[1:2])
        for window in (2, 8, 32):
            assert same(draw(seed=seed, window=window), want)


@pytest.mark.parametrize("decoding", ["jacobi", "speculative"])
def test_an_image_is_the_same_alone_and_in_a_batch_of_16(model, decoding):
    task, inputs = model.compile([example(2)]), images(4, 17)
    draw = lambda chosen: model.generate(task, chosen, seed=7, decoding=decoding, window=8, top_k=20, guidance=1.5)
    together = draw(inputs)  # 16, and one in a second turn
    for i in (0, 5, 15, 16):
        assert same(draw(inputs[i : i + 1]), together[i : i + 1])


def test_speculative_is_sequential_where_there_is_no_choice(model):
    task, inputs, options = model.compile([example(2)]), images(3, 16), {"window": 8, "guidance": 1.5}
    want = model.generate(task, inputs, decoding="sequential", temperature=0.0, top_k=20, guidance=1.5)
    for law in ({"temperature": 0.0, "top_k": 20}, {"top_k": 1}):
        assert same(model.generate(task, inputs, decoding="speculative", **options, **law), want)


def test_mixed_tasks_in_one_batch(model):
    tasks = [model.compile([example(5)]), model.compile([example(6, "add rain"), example(7)])]
    inputs = images(8, 2)
    mixed = model.generate(tasks, inputs, seed=1, window=5)
    for i in range(2):
        assert same(model.generate(tasks[i], inputs[i : i + 1], seed=1, window=5), mixed[i : i + 1])


def test_joined_prompts_are_the_examples_together(model):
    a, b = example(5), example(6, "a much longer instruction: add rain and paint the depth in grey")
    joined = CompiledPrompt.join([model.compile([a]), model.compile([b])])
    inputs = images(9, 2)
    assert same(model.generate(joined, inputs, seed=1, window=5), model.generate([a, b], inputs, seed=1, window=5))


def test_guidance_weights():
    assert Guidance().weights() == {"full": 1.0}
    assert Guidance(task=2.0).weights() == {"image": -1.0, "example": 1.0, "full": 1.0}
    for g in (Guidance(1.5, 3.0, 1.2), Guidance(text=4.0), Guidance(image=0.0)):
        assert sum(g.weights().values()) == pytest.approx(1)


def test_published_guidance_formulas():
    """Our weighted branches against the formulas as the authors write them."""
    u, img, f = (np.random.default_rng(i).normal(size=50) for i in range(3))
    ours = lambda g, **branch: sum(w * branch[name] for name, w in g.weights().items())
    chameleon = u + 1.2 * (img - u) + 3.0 * (f - img)
    np.testing.assert_allclose(ours(DEFAULTS["chameleon"].guidance, nothing=u, image=img, example=img, full=f), chameleon)
    lumina = u + 4.0 * (f - u)
    np.testing.assert_allclose(ours(DEFAULTS["lumina"].guidance, nothing=u, image=u, example=u, full=f), lumina)
    np.testing.assert_allclose(ours(Guidance(task=2.5), image=img, example=f, full=f), img + 2.5 * (f - img))


def test_defaults_by_name(model):
    draw = functools.partial(model.text_to_image, ["remove the rain"], window=4)
    want = draw(temperature=0.7, top_p=0.9, guidance=3.0)
    assert same(draw(defaults="chameleon"), want)
    assert not same(draw(defaults="chameleon", guidance=50.0), want)
    task, inputs = model.compile([example(2)]), images(3, 1)
    want = model.generate(task, inputs, temperature=0.7, top_p=0.9, guidance=Guidance(image=1.2, text=3.0), window=4)
    assert same(model.generate(task, inputs, defaults="anole", window=4), want)
    with pytest.raises(UserError, match="plain, chameleon, anole, lumina"):
        model.generate(task, inputs, defaults="dalle")


@pytest.mark.parametrize("decoding, bad", [("jacobi", np.nan), ("speculative", np.inf), ("sequential", np.nan)])
def test_logits_that_are_no_numbers_are_told(model, decoding, bad):
    params = flatten(model.decoder)
    params["norm"] = params["norm"].at[0].set(bad)
    broken = XPrompt(unflatten(model.decoder, params), model.vqgan, model.tokenizer, compute=FP32)
    with pytest.raises(UserError, match="NaN or infinite") as error:
        broken.text_to_image(["add rain"], decoding=decoding, window=4, defaults="chameleon")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="NaN or infinite"):
        broken.interleave(["add rain"], max_tokens=8)


def test_too_much_for_the_memory_is_told():
    with pytest.raises(UserError, match="does not fit the device's memory"), explained_memory():
        jnp.zeros((1 << 46,), jnp.float32).block_until_ready()


def test_guidance_moves_the_image(model):
    task, inputs = model.compile([example(2)]), images(3, 1)
    assert not same(model.generate(task, inputs, guidance=6.0), model.generate(task, inputs))


def test_text_to_image_and_stream(model):
    (image,) = model.text_to_image(["remove the rain"], seed=2)
    assert image.size == (16, 16)
    assert not same([image], model.text_to_image(["add rain"], seed=2))
    task, inputs = model.compile([example(2)]), images(3, 2)
    for decoding in ("jacobi", "speculative"):
        partial = list(model.stream(task, inputs, seed=4, decoding=decoding))
        assert len(partial) == model.config.vq.grid
        assert same(partial[-1], model.generate(task, inputs, seed=4, decoding=decoding))


def test_describe_writes_words_only(model):
    pair = [example(2)]
    text = model.describe(pair, max_tokens=32, temperature=1.0, seed=1)
    assert isinstance(text, str) and text == model.describe(pair, max_tokens=32, temperature=1.0, seed=1)
    assert "IMGIMG" not in text and "<" not in model.tokenizer.decode(model.tokenizer.encode("a"))


def test_sampling_is_the_softmax():
    """A hundred thousand draws against the exact law, top-k and top-p included."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=8) * 2, jnp.float32)
    keys = jax.random.split(jax.random.key(0), 100_000)
    noise = gumbel(keys, jnp.zeros((len(keys), 1), jnp.int32), 8)[:, 0]
    for sampling in (Sampling(), Sampling(0.7), Sampling(top_k=3), Sampling(top_p=0.8)):
        law = jax.nn.softmax(narrow(logits, sampling))
        drawn = np.bincount(choose(jnp.broadcast_to(logits, noise.shape), noise, sampling), minlength=8)
        kept = np.asarray(law) > 0
        assert drawn[~kept].sum() == 0
        expected = np.asarray(law)[kept] * len(keys)
        assert np.sum((drawn[kept] - expected) ** 2 / expected) < 30  # chi-square, at most 7 degrees of freedom
    assert (np.asarray(jax.nn.softmax(narrow(logits, Sampling(top_k=3)))) > 0).sum() == 3
    for smallest in (1e-38, 1e-39, 1e-300):  # in float32 the last two are 0: the most likely token stays
        assert (choose(jnp.broadcast_to(logits, noise.shape), noise, Sampling(top_p=smallest)) == jnp.argmax(logits)).all()


def test_compiled_prompt_file(model, tmp_path):
    task = model.compile([example(2)])
    path = tmp_path / "derain.xprompt"
    task.save(path)
    again = CompiledPrompt.load(path)
    assert same(model.generate(again, images(3, 1), window=5), model.generate(task, images(3, 1), window=5))
    assert again.instruction == "remove the rain" and len(again.thumbnails) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["derain.xprompt"]
    several = model.compile([example(2), example(4)])
    for many in (several, CompiledPrompt.join([several, task])):  # views of their layers and examples
        many.save(path)
        again = CompiledPrompt.load(path)
        for name in ("k", "v", "lengths"):
            np.testing.assert_array_equal(getattr(again, name), getattr(many, name))
    task.save(path)
    again = CompiledPrompt.load(path)
    with safetensors.safe_open(path, "numpy") as file:
        told = file.metadata()
    assert (told["fingerprint"], told["tokenizer"]) == (model.fingerprint, model.tokenizer.fingerprint)
    assert (told["xp_tokens"], told["dtype"]) == (str(TINY.num_xp_tokens), "float32")

    other = XPrompt(Chameleon(TINY, jax.random.key(9)), model.vqgan, model.tokenizer, compute=FP32)
    with pytest.raises(UserError, match="belongs to model"):
        other.generate(again, images(3, 1))
    for change, reason in (
        ({"tokenizer": "0" * 16}, "text tokenizer 0000"),
        ({"k": task.k[:, :, :2]}, "2 XP tokens an example, the model 3"),
    ):
        with pytest.raises(UserError, match=f"{reason}.*; compile it again"):
            model.generate(dataclasses.replace(task, **change), images(3, 1))
    for change in ({"v": task.v[:, :1]}, {"k": task.k * np.nan}, {"lengths": task.lengths[:0]}, {"k": task.k[0], "v": task.v[0]}):
        dataclasses.replace(task, **change).save(tmp_path / "wrong.xprompt")
        with pytest.raises(UserError, match="wrong.xprompt: damaged"):
            CompiledPrompt.load(tmp_path / "wrong.xprompt")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="derain.xprompt: not a readable"):
        CompiledPrompt.load(path)
    with pytest.raises(UserError, match="no such file"):
        CompiledPrompt.load(tmp_path / "none.xprompt")
    with pytest.raises(UserError, match="at least one compiled prompt"):
        CompiledPrompt.join([])
    with pytest.raises(UserError, match="join takes a list of compiled prompts"):
        CompiledPrompt.join([example(2)])
    for prompt in (several, task):  # files of before, of which those of several examples lost their order
        header = {name: value for name, value in told.items() if name not in ("format", "whole")}
        write_tensors(path, FORMAT, {"k": prompt.k, "v": prompt.v, "lengths": prompt.lengths}, header)
        with pytest.raises(UserError, match="written before they were kept in order") if prompt is several else contextlib.nullcontext():
            CompiledPrompt.load(path)


@pytest.mark.parametrize("change, message", [
    ({"decoding": "beam"}, "jacobi or sequential"), ({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"),
    ({"num_images": 0}, "num_images"), ({"inputs": []}, "at least one input"), ({"inputs": "a.png"}, "takes a list"),
    ({"inputs": np.zeros((16, 16, 3), np.uint8)}, "takes a list"), ({"inputs": np.zeros((4, 4), np.int32)}, "takes a list"),
    ({"task": example(2)}, "an Example is no task; put it into"),
    ({"temperature": float("nan")}, "temperature"), ({"top_k": -1}, "top_k"), ({"guidance": float("inf")}, "guidance"),
    ({"first_image": -1}, "first_image -1 must be at least 0"),
    ({"guidance": 1e39}, "guidance on the task .* from -10000 to 10000, not 1e.39"),
    ({"instruction": "rain " * 20_000}, "do not fit"), ({"task": []}, "at least one example"), ({"window": 0}, "window"),
    ({"task": [("a.png", "b.png")]}, "a list of Example"), ({"inputs": [None]}, "an image must be"),
    ({"task": None}, "at least one example"),
    ({"seed": "a"}, "seed must be a whole number, not 'a'"), ({"seed": 0.5}, "seed must be"), ({"seed": -1}, "seed -1 must be at least 0"),
    ({"seed": 2**32}, "at most 4294967295"), ({"temperature": "a"}, "temperature must be a finite number, not 'a'"),
    ({"top_k": 2.5}, "top_k must be a whole number"), ({"top_p": "a"}, "top_p must be"), ({"guidance": "a"}, "guidance on the task"),
    ({"guidance": float("nan")}, "guidance on the task"), ({"num_images": 1.5}, "num_images must be"), ({"window": "a"}, "window must be"),
    ({"temperature": float("inf")}, "temperature"), ({"temperature": [[1.0]] * 40}, "temperature must be"),
    ({"instruction": 5}, "a text, not 5"), ({"task": "t.xprompt"}, "t.xprompt: a name is no task"), ({"defaults": []}, "are unknown"),
])  # fmt: skip
def test_bad_arguments(model, change, message):
    with pytest.raises(UserError, match=message) as error:
        model.generate(**{"task": [example(2)], "inputs": images(3, 1), **change})
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_numbers_of_other_types_are_the_same_numbers():
    assert Sampling(1, np.int64(3), np.float32(0.5)) == Sampling(1.0, 3, 0.5) and type(Sampling(1).temperature) is float
    assert Guidance.of(jnp.float32(2.0)) == Guidance(task=2.0)
    assert (image_keys(np.int64(2**32 - 1), [0]) != image_keys(2**31 - 1, [0])).all()


def test_an_example_that_cannot_fit_is_refused(model):
    with pytest.raises(UserError, match="do not fit 16384"):
        model.compile([example(2, "rain " * 20_000)])


def test_an_example_needs_both_its_images():
    with pytest.raises(UserError, match="has no output: give the image before and the image after"):
        Example("before.png")
    with pytest.raises(UserError, match="has no input"):
        Example(None, "after.png")
    with pytest.raises(UserError, match="instruction must be a text, not 5"):
        Example("before.png", "after.png", 5)


def test_logits_checks_its_input(model):
    ids = np.zeros((1, 5), int)
    with pytest.raises(UserError, match="XP tokens"):
        model.logits(ids, roles=np.full((1, 5), 2))
    with pytest.raises(UserError, match="ids must be"):
        model.logits(np.full((1, 5), 10_000))
    with pytest.raises(UserError, match="at least one token"):
        model.logits(np.zeros((0, 5), int))
    assert model.logits(ids).shape == (1, 5, TINY.vocab_size) and model.logits(ids).dtype == jnp.float32
