"""Eight virtual CPU devices, a compilation cache, no network."""

import gc
import os
import tempfile
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most programs here run once on tiny shapes: optimising them takes longer than running them.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["HF_HUB_OFFLINE"] = "1"

# In the environment, so that processes that tests start have the same cache. Small programs too: each operation outside jit is one.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
    "XPROMPT_TEST_CACHE", os.path.join(tempfile.gettempdir(), f"xprompt-test-cache-{version('jax')}")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Thousands of small programs would stay in memory until the end; the next module finds what it needs in the cache on disk."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a random tiny model; to read."""
    from tests.helpers import FP32, TINY, tiny_tokenizer
    from xprompt_jax import XPrompt
    from xprompt_jax.model.chameleon import Chameleon
    from xprompt_jax.model.vqgan import VQGAN

    path = tmp_path_factory.mktemp("m") / "tiny"
    XPrompt(Chameleon(TINY, jax.random.key(0)), VQGAN(TINY.vq, jax.random.key(1)), tiny_tokenizer(), compute=FP32).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def world_store(tmp_path_factory):
    """A token store of 18 pairs of 16 px in 6 groups, two of them held out."""
    from tests.helpers import TINY_VQ, tiny_tokenizer
    from xprompt_jax.data.sources import world_pairs
    from xprompt_jax.data.tokenise import tokenize
    from xprompt_jax.model.vqgan import VQGAN

    path = tmp_path_factory.mktemp("world") / "tokens"
    records = world_pairs(groups=6, pairs_per_group=3, size=16, tasks=["invert", "sepia"], eval_fraction=0.34)
    tokenize(records, VQGAN(TINY_VQ, jax.random.key(1)), tiny_tokenizer(), path, progress=False)
    return path
