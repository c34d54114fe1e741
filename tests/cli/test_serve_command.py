"""`pyper serve`: what it refuses before it listens. How it answers: tests/serve."""

import importlib.util
import io
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyper.serve.settings import is_loopback
from pyper.stages.serve import name_of, read_key

Pyper = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_key_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYPER_API_KEY", raising=False)


def test_help_has_an_example(pyper: Pyper) -> None:
    for command in ("serve", "chat"):
        done = pyper(command, "--help")
        assert done.exit_code == 0
        assert f"Example: pyper {command}" in done.stdout.replace("`", "")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_machines_need_a_key(pyper: Pyper, finished_run: Path, host: str) -> None:
    done = pyper("serve", finished_run, "--host", host)
    assert done.exit_code == 1
    assert "there is no API key" in done.complaint[0]
    assert "PYPER_API_KEY" in done.complaint[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_this_machine_needs_none(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("key", ["two words", "ümlaut", "line\nend"])
def test_a_key_that_no_header_can_carry_is_refused(
    pyper: Pyper, finished_run: Path, key: str
) -> None:
    done = pyper("serve", finished_run, "--api-key", key)
    assert done.exit_code == 1
    assert "visible ASCII" in done.complaint[0]
    assert key not in done.stderr


def test_a_port_that_is_taken_is_named_before_anything_is_loaded(
    pyper: Pyper, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = pyper("serve", tmp_path / "no-model", "--port", port)
    assert done.exit_code == 1
    assert f"127.0.0.1:{port}" in done.complaint[0]
    assert "--port" in done.complaint[1]


def test_a_folder_without_a_model_is_refused(pyper: Pyper, tmp_path: Path) -> None:
    done = pyper("serve", tmp_path, "--port", 0)
    assert done.exit_code == 1
    assert "neither a run nor a mixture" in done.complaint[0]


def test_a_damaged_expert_is_found_before_it_is_asked_for(
    pyper: Pyper, finished_run: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(finished_run / "mixture", tmp_path / "mixture")
    weights = next(copy.glob("experts/01-*/model.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()
    weights.write_bytes(content)
    done = pyper("serve", copy, "--port", 0)
    assert done.exit_code == 1
    assert "is damaged" in done.complaint[0]


@pytest.mark.parametrize("command", ["serve", "generate", "chat"])
def test_help_says_who_can_draft(pyper: Pyper, command: str) -> None:
    help_text = pyper(command, "--help").stdout
    assert "--draft" in help_text
    assert "router" in help_text


@pytest.mark.parametrize("command", [("serve", "--port", 0), ("generate",), ("chat",)])
@pytest.mark.parametrize(
    ("draft", "complaint"),
    [
        ("router", "`--draft router`: the mixture's router is `unigram`"),
        ("mixture", "is a mixture of 2 experts, not one model"),
        ("nowhere", "`--draft`: there is no "),
    ],
)
def test_a_draft_that_cannot_guess_is_refused(
    pyper: Pyper, finished_run: Path, command: tuple[object, ...], draft: str, complaint: str
) -> None:
    who = draft if draft == "router" else finished_run / draft
    name, *options = command
    done = pyper(name, finished_run, *options, "--draft", who)
    assert done.exit_code == 1
    assert complaint in done.complaint[0]
    assert len(done.complaint) == 2


@pytest.mark.parametrize(
    "options",
    [("--port", "70000"), ("--port", "http"), ("--max-running", "0"), ("--queue", "-1")],
)
def test_numbers_out_of_range_are_wrong_usage(
    pyper: Pyper, finished_run: Path, options: tuple[str, str]
) -> None:
    assert pyper("serve", finished_run, *options).exit_code == 2


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_without_the_extra_it_says_what_to_install(
    pyper: Pyper, finished_run: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name)
    )
    done = pyper("serve", finished_run, "--port", 0)
    assert done.exit_code == 1
    assert f"`{package}`" in done.complaint[0]
    assert "pip install 'pyper[serve]'" in done.complaint[1]


def test_chatting_needs_no_server(
    pyper: Pyper, finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("fastapi", "uvicorn", "starlette", "prometheus_client"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))
    assert pyper("chat", finished_run).exit_code == 0


class TestKeys:
    """Where the key comes from."""

    def test_a_file_an_option_or_the_environment(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "key"
        file.write_text("from-the-file\n")
        assert read_key(None, None) is None
        monkeypatch.setenv("PYPER_API_KEY", "from-the-environment")
        assert read_key(None, None) == "from-the-environment"
        assert read_key(None, "given") == "given"
        assert read_key(file, None) == "from-the-file"

    def test_a_file_without_one_is_refused(
        self, pyper: Pyper, finished_run: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "empty").write_text("\n")
        for file, complaint in (("empty", "is empty"), ("nowhere", "cannot read the API key")):
            done = pyper("serve", finished_run, "--api-key-file", tmp_path / file)
            assert done.exit_code == 1
            assert complaint in done.complaint[0]


@pytest.mark.parametrize(
    ("path", "name"), [("runs/mine", "mine"), ("runs/mine/mixture", "mine"), ("/", "model")]
)
def test_the_model_is_called_like_its_folder(path: str, name: str) -> None:
    assert name_of(Path(path)) == name
