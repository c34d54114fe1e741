"""`pyper generate` and `pyper chat` with `--speculate` or `--draft`: the text is the same."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.conftest import Pyper
from pyper.generate.reading import Text
from pyper.generate.speculation import ModelDrafter, Payoff
from serve.small_server import save_small_mixture

pytestmark = pytest.mark.usefixtures("one_thread")

# So few tokens that all are guessed: after `Payoff.TRIAL` steps the time decides.
N_TOKENS = Payoff.TRIAL


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture whose router is a language model for each expert."""
    return save_small_mixture(tmp_path_factory.mktemp("drafts"), router="lm")


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every guess that was read, whether it came true."""
    outcomes: list[bool] = []
    check = Text.check_guess

    def note(text: Text, token: int) -> bool:
        outcomes.append(check(text, token))
        return outcomes[-1]

    monkeypatch.setattr(Text, "check_guess", note)
    return outcomes


def options_for(draft: str, folder: Path) -> tuple[object, ...]:
    if draft == "repetition":
        return ("--speculate",)
    return ("--draft", draft if draft == "router" else folder / draft)


Write = Callable[..., Any]


@pytest.fixture
def generate(pyper: Pyper, folder: Path) -> Write:
    """Three prompts, of which one repeats; the JSON that comes back."""

    def run(*options: object) -> Any:
        prompts = ("-p", "abc" * 5, "-p", "the fox", "-p", "x")
        done = pyper("generate", folder, *prompts, "-n", N_TOKENS, "--json", *options)
        assert done.exit_code == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture
def chat(pyper: Pyper, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Two messages from a pipe; what is printed."""

    def run(*options: object) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("abcabcabcabc\nthe fox\n/route\n"))
        done = pyper("chat", folder, "-n", N_TOKENS // 2, "--seed", 3, *options)
        assert done.exit_code == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(params=["generate", "chat"])
def write(request: pytest.FixtureRequest) -> Write:
    asked: Write = request.getfixturevalue(request.param)
    return asked


@pytest.mark.parametrize(
    ("draft", "temperature"),
    [
        ("repetition", 0),  # what these experts draw at random repeats nothing
        ("router", 0),
        ("router", 1),
        ("experts/01-maths", 0),
        ("experts/01-maths", 1),
    ],
)
def test_the_text_is_the_same_whoever_guesses(
    write: Write, folder: Path, checked: list[bool], draft: str, temperature: int
) -> None:
    plain = write("--temperature", temperature)
    assert not checked
    assert write("--temperature", temperature, *options_for(draft, folder)) == plain
    assert checked


@pytest.mark.parametrize("draft", ["router", "experts/01-maths"])
def test_an_expert_that_guesses_for_itself_is_right(
    write: Write, folder: Path, checked: list[bool], draft: str
) -> None:
    alone = ("--temperature", 0, "--expert", "maths")
    plain = write(*alone)
    assert write(*alone, *options_for(draft, folder)) == plain
    assert checked
    assert all(checked)


def test_what_streams_is_the_same(pyper: Pyper, folder: Path, checked: list[bool]) -> None:
    command = ("generate", folder, "-p", "the fox", "-n", N_TOKENS, "--temperature", 0)
    plain = pyper(*command, "--show-experts")
    drafted = pyper(*command, "--show-experts", "--draft", "router")
    assert drafted.stdout == plain.stdout
    assert checked


@pytest.mark.parametrize("n_tokens", [1, 2, 40])
def test_guesses_need_no_more_room_than_the_text(
    pyper: Pyper, folder: Path, monkeypatch: pytest.MonkeyPatch, n_tokens: int
) -> None:
    """The cache that `generate` makes holds its texts to the last token, and nothing else."""
    monkeypatch.setattr(Payoff, "end", lambda *_, **__: None)  # guessing all along
    command = ("generate", folder, "-p", "ab" * 20, "-n", n_tokens, "--temperature", 0, "--json")
    plain = pyper(*command)
    assert plain.exit_code == 0, plain.stderr
    assert pyper(*command, "--draft", "router").stdout == plain.stdout


def test_a_draft_counts_before_what_repeats(
    generate: Write, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(ModelDrafter, "guess", lambda self, text, n: asked.append(n) or [])
    generate("--speculate", *options_for("experts/01-maths", folder))
    assert asked
