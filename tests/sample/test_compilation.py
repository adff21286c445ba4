"""What is compiled once stays compiled: within a process by shape, between processes on disk."""

import contextlib
import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import FP32, TINY, tiny_tokenizer
from xprompt_jax.model.cache import empty_cache
from xprompt_jax.model.chameleon import Chameleon
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.sample.draw import image_keys
from xprompt_jax.sample.logits import Sampling
from xprompt_jax.sample.sampler import Example, XPrompt
from xprompt_jax.sample.speculative import decode_image, start

_COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: _COMPILED.append(event) if event == "/jax/core/compile/backend_compile_duration" else None
)


@contextlib.contextmanager
def compilations():
    """The programs compiled, or fetched from disk, inside."""
    count: list[str] = []
    before = len(_COMPILED)
    yield count
    count += _COMPILED[before:]


@pytest.fixture(scope="module")
def model():
    decoder, vqgan = Chameleon(dataclasses.replace(TINY, num_layers=1), jax.random.key(0)), VQGAN(TINY.vq, jax.random.key(1))
    return XPrompt(decoder, vqgan, tiny_tokenizer(), compute=FP32)


def images(seed, count):
    return list(np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8))


@pytest.mark.parametrize("decoding", ["jacobi", "speculative"])
def test_nothing_is_compiled_again_for_other_data(model, decoding):
    def draw(seed, instruction, scale, temperature, top_p, count):
        task = model.compile([Example(*images(seed, 2), instruction)])
        options = dict(seed=seed, temperature=temperature, top_p=top_p, decoding=decoding, window=4)
        model.generate(task, images(seed + 1, count), guidance=scale, **options)
        model.text_to_image([instruction] * count, guidance=scale, **options)
        for _ in model.stream(task, images(seed + 1, count), guidance=scale, **options):
            pass

    with compilations() as first:
        draw(0, "remove the rain", 2.0, 1.0, 0.9, 4)
    assert first
    with compilations() as again:
        draw(7, "paint the depth in grey, and add rain", 3.5, 0.8, 0.5, 4)
        draw(8, "", -1, 0, 0.7, 3)  # three images take the rows of four, whole numbers are no other type
    assert not again
    with compilations() as other:
        model.text_to_image(["add rain"], decoding=decoding, window=4)
    assert other, "the count sees nothing"


def test_writing_is_compiled_once(model):
    def write(seed, text, temperature, top_p, max_tokens, guidance):
        settings = dict(text=Sampling(temperature, top_p=top_p), image=Sampling(temperature, top_p=top_p))
        model.interleave(
            [text, "add rain"], seed=seed, max_tokens=max_tokens, guidance=guidance, repetition_penalty=temperature, **settings
        )

    write(0, "remove the rain", 1.0, 0.9, 40, 2.0)
    with compilations() as again:
        write(1, "paint the depth in grey, and add rain", 0.7, 0.5, 60, 3.0)
    assert not again


def test_another_model_of_the_shape_takes_the_same_programs(model):
    other = XPrompt(Chameleon(model.config, jax.random.key(5)), model.vqgan, tiny_tokenizer(), compute=FP32)
    draw = lambda m: m.generate([Example(*images(0, 2))], images(1, 1), decoding="sequential")
    draw(model)
    assert other.fingerprint and other.image_head.shape
    with compilations() as again:
        draw(other)
    assert not again


def test_a_cache_is_updated_in_place(model):
    """No second cache, neither in what a pass makes nor in what it needs meanwhile; layers have buffers of their own."""
    config, width, window = model.config, 4096, 4
    shaped = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
    state = jax.eval_shape(
        lambda: start(empty_cache(config, 1, width, jnp.float32), jnp.zeros((1, 18 + window), jnp.int32), 4, 32, window, speculative=False)
    )
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state.memory))
    memory = decode_image.lower(
        shaped(model.layers_apart), shaped(model.image_head), np.int32(4), state, np.zeros(18 + window, np.int32), np.int32(16),
        image_keys(0, [0]), np.ones(1, np.float32), Sampling(), window=window, dtype="float32",
    ).compile().memory_analysis()  # fmt: skip
    assert memory.alias_size_in_bytes >= size
    scores = config.num_heads * window * width * 4
    assert memory.temp_size_in_bytes < size / 2 + 3 * scores


@pytest.mark.parametrize("environment, flags, kept", [
    ({}, [], "home/.cache/xprompt_jax/jit"), ({"XDG_CACHE_HOME": "xdg"}, [], "xdg/xprompt_jax/jit"),
    ({"JAX_COMPILATION_CACHE_DIR": "mine"}, [], "mine"), ({"JAX_COMPILATION_CACHE_DIR": "mine"}, ["--no-compilation-cache"], None),
])  # fmt: skip
def test_commands_keep_programs_between_runs(tmp_path, environment, flags, kept):
    """A command that compiles something leaves it in the user's cache folder, unless it is told not to."""
    keep_out = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "JAX_ENABLE_COMPILATION_CACHE")
    clean = {k: v for k, v in os.environ.items() if k not in keep_out and not k.startswith("JAX_PERSISTENT")}
    clean |= {"HOME": str(tmp_path / "home"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    clean |= {name: str(tmp_path / value) for name, value in environment.items()}
    code = (
        "import dataclasses, sys, xprompt_jax.cli as cli\n"
        "@dataclasses.dataclass\n"
        "class Square:\n"
        "    'Squares.'\n"
        "    def run(self):\n"
        "        import jax, jax.numpy as jnp\n"
        "        print(jax.jit(lambda x: x @ x)(jnp.ones((8, 8))).sum())\n"
        "assert 'jax' not in sys.modules\n"
        "cli.COMMANDS['square'] = Square\n"
        "cli.main(sys.argv[1:])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "square", *flags], env=clean, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("512"), done.stderr
    written = [p for p in tmp_path.rglob("*-cache")]
    assert bool(written) == bool(kept)
    assert all(p.is_relative_to(tmp_path / kept) for p in written)
