"""Fixtures of the tests of adapters: images, a small Hub, and processes with the real client."""

import socket

import pytest
import torch

from ..hub_server import Hub
from .hub_client import Client, adapter


@pytest.fixture
def images():
    """Two random 32 x 32 images."""
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def server():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="session")
def process(server, tmp_path_factory):
    client = Client(server.url, tmp_path_factory.mktemp("home"))
    yield client
    client.close()


@pytest.fixture
def hub(server):
    """The server, empty."""
    server.repos.clear()
    server.blobs.clear()
    server.log.clear()
    server.refusal = None
    yield server
    server.refusal = None


@pytest.fixture
def client(process, hub, tmp_path):
    """Evaluates an expression in the client's process; `{cache}` is a cache of this test's own."""
    return lambda expression: process(expression.replace("{cache}", repr(str(tmp_path / "cache"))))


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter, and the digest that it has."""
    return adapter().save(tmp_path / "saved"), adapter().digest()


@pytest.fixture(scope="session")
def unreachable(tmp_path_factory):
    """A client whose Hub is a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    client = Client(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("home"))
    yield client
    client.close()
