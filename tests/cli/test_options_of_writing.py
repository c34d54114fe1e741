"""Options that several commands share: each is the same one everywhere."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from pyper.cli.chat import chat
from pyper.cli.generate import generate
from pyper.cli.serve import serve

SAMPLING = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
OPENING = {"model", "mixing", "resident", "weights", "device", "speculate", "draft"}
COMMANDS = {"chat": chat, "generate": generate, "serve": serve}


def options_of(command: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Of each option the type with its help, and the default."""
    parameters = inspect.signature(command).parameters.values()
    return {p.name: (p.annotation, p.default) for p in parameters}


@pytest.mark.parametrize(
    ("command", "names"),
    [("chat", SAMPLING | OPENING | {"expert"}), ("serve", OPENING)],
)
def test_an_option_means_the_same_to_every_command_that_writes(
    command: str, names: set[str]
) -> None:
    here, there = options_of(COMMANDS[command]), options_of(generate)
    assert {name: here[name] for name in names} == {name: there[name] for name in names}


def test_how_tokens_are_drawn_where_nothing_is_said() -> None:
    defaults = {name: default for name, (_, default) in options_of(generate).items()}
    assert {name: defaults[name] for name in SAMPLING} == {
        "temperature": 0.8,
        "top_k": None,
        "top_p": 0.95,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    assert (defaults["max_new_tokens"], options_of(chat)["max_new_tokens"][1]) == (128, 256)
