"""What the tests of data share: one VQGAN of each kind, its compiled encoder, a server that speaks a model's protocol."""

import threading

import jax
import pytest

from tests.data.endpoint_server import Server, make_manifest
from tests.helpers import TINY_VQ
from xprompt_jax.data.images import to_pixels
from xprompt_jax.model.vqgan import VQGAN


@pytest.fixture(scope="session")
def vqgan():
    return VQGAN(TINY_VQ, jax.random.key(1))


@pytest.fixture(scope="session")
def other_vqgan():
    """The same, with other weights."""
    return VQGAN(TINY_VQ, jax.random.key(2))


@pytest.fixture(scope="session")
def encode(vqgan):
    """Codes [rows, columns] of uint8 [16, 16, 3]: the VQGAN itself, one picture at a time."""
    compiled = jax.jit(lambda model, pixels: model.encode(pixels))
    return lambda picture: compiled(vqgan, to_pixels(picture)[None])[0]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("XPROMPT_API_KEY", raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def manifest(tmp_path):
    return make_manifest(tmp_path, 12)
