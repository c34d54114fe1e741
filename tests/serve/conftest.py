"""Servers that many tests share, and a client of them."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from pyper.data import TextTokenizer
from pyper.mixture import Mixture, load_mixture
from serve.small_server import KEY, Server, save_small_mixture, serving


@pytest.fixture(scope="session")
def small_mixture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_mixture(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def shared_server(small_mixture_folder: Path) -> Iterator[Server]:
    with serving(small_mixture_folder) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """As users start it. After every test: nobody is left, nothing failed."""
    n_printed = len(shared_server.printed)
    yield shared_server
    printed = "".join(shared_server.printed[n_printed:])
    assert shared_server.process.poll() is None, printed
    shared_server.wait_until_idle()
    assert printed == ""


@pytest.fixture(scope="module")
def loaded(small_mixture_folder: Path) -> tuple[Mixture, TextTokenizer]:
    """The served mixture, in this process."""
    return load_mixture(small_mixture_folder)


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def hasty_server(small_mixture_folder: Path) -> Iterator[Server]:
    """With a key, two places to write, two to wait, and no patience."""
    limits = {
        "header_seconds": 0.6,
        "body_seconds": 0.6,
        "stall_seconds": 1.0,
        "linger_seconds": 0.5,
        "keep_alive_seconds": 1,
        "queue": 2,
    }
    with serving(small_mixture_folder, limits=limits, api_key=KEY, max_running=2) as server:
        yield server
