"""`pyper serve --draft`: a small model guesses, and the text is the same."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pyper.generate.speculation import Payoff
from serve.small_server import Server, save_small_mixture, serving

BODIES = [
    {"prompt": "the fox", "temperature": 0, "model": "tiny/expert-1"},  # all guesses are right
    {"prompt": "abc" * 5, "temperature": 0},
    {"prompt": "abc" * 5, "temperature": 1, "seed": 3},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose router is a language model for each expert."""
    return save_small_mixture(tmp_path_factory.mktemp("drafts"), router="lm")


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[list[object]]:
    """What the mixture writes when nobody guesses."""
    with serving(folder) as server:
        yield answers(server)
        assert server.metric("pyper_guessed_tokens") == 0


def answers(server: Server) -> list[object]:
    # So few that all are guessed: after `Payoff.TRIAL` steps the time decides.
    body = {"model": "tiny", "max_tokens": Payoff.TRIAL // len(BODIES), "logprobs": 2}
    return [server.post("/v1/completions", body | more).json()["choices"] for more in BODIES]


@pytest.mark.parametrize("draft", ["router", "experts/01-maths"])
def test_the_text_is_the_same_whoever_guesses(
    folder: Path, plain: list[object], draft: str
) -> None:
    who = draft if draft == "router" else folder / draft
    with serving(folder, "--draft", who) as server:
        assert answers(server) == plain
        guessed = server.metric("pyper_guessed_tokens")
        assert 0 < server.metric("pyper_accepted_tokens") <= guessed
