"""`pyper chat`, piped and at a terminal."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyper.data.chat_template import ChatTemplate
from pyper.errors import PromptError
from pyper.generate import SamplingConfig, complete
from pyper.stages.chat import Conversation
from pyper.stages.typed import CtrlC, Keyboard, read_message
from pyper.stages.write import open_model, visible
from serve.small_server import save_small_mixture

Chat = Callable[..., list[str]]
PATIENCE = 60
"""Seconds of silence at a terminal."""


@pytest.fixture
def chat(pyper: Callable[..., Any], finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """Pipe lines into `pyper chat`; the lines that come back."""

    def run(lines: str, *options: object, code: int = 0) -> list[str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        done = pyper("chat", finished_run, "--seed", 3, "-n", 6, *options)
        assert done.exit_code == code, done.stderr
        told: list[str] = (done.stdout + done.stderr).splitlines()
        return told

    return run


def test_answers_messages_of_a_pipe_one_per_line_the_same_for_the_same_seed(chat: Chat) -> None:
    told = chat("the fox\n1 +\n/route\n/quit\nnever read\n")
    assert told == chat("the fox\n1 +\n/route\n")
    assert told != chat("the fox\n1 +\n/route\n", "--seed", "4")
    sums, tales = told[-2:]
    assert sums.startswith("0 sums ")
    assert tales.startswith("1 tales ")
    assert sum(int(line.split()[-2]) for line in (sums, tales)) <= 6
    assert 99 <= sum(int(line.split("%")[0].split()[-1]) for line in (sums, tales)) <= 101


def test_commands_choose_an_expert_and_a_system_message(chat: Chat) -> None:
    told = chat(
        "/route\n/expert tales\n1 + 1\n/route\n/expert 0\nhello\n/route\n/expert 7\n/expert\n"
        "/system be\n/system\n/clear\n/nonsense\n/help\n"
    )
    text = "\n".join(told)
    assert told[0] == "nothing was written yet"
    assert "1 tales  100%" in text
    assert "0 sums   100%" in text
    assert "there is no expert `7`: 0 … 1, or sums, tales" in told
    for line in ("tales writes", "sums writes", "the mixture writes", "system message set",
                 "no system message", "a new conversation"):  # fmt: skip
        assert line in told
    assert any(line.startswith("there is no /nonsense; /help") for line in told)
    assert any(line.startswith("/expert N ") for line in told)


def test_the_model_goes_on_from_all_that_was_said(tmp_path: Path) -> None:
    model = open_model(
        save_small_mixture(tmp_path), expert=None, mixing=None, resident=None, device="cpu"
    )
    sampling = SamplingConfig(max_new_tokens=8, seed=5)
    talk = Conversation(model, ChatTemplate(None), sampling)
    talk.system = "be"
    first = "".join(event.text for event in talk.answer("the fox"))
    second = "".join(event.text for event in talk.answer("and"))

    texts = ["be\nthe fox", f"be\nthe fox\n{first}\nand"]
    for text, answer, seed in zip(texts, (first, second), (5, 6), strict=True):
        expected = complete(model.mixture, model.tokenizer, [text], replace(sampling, seed=seed))[0]
        assert answer == expected.text
    talk.clear()
    assert "".join(event.text for event in talk.answer("the fox")) not in (first, second)


def test_a_message_that_is_refused_is_forgotten(tmp_path: Path) -> None:
    model = open_model(
        save_small_mixture(tmp_path), expert=None, mixing=None, resident=None, device="cpu"
    )
    source = (
        "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    talk = Conversation(model, ChatTemplate(source), SamplingConfig(max_new_tokens=2))
    for text in ("bad", "half \ud83d"):
        with pytest.raises(PromptError):
            list(talk.answer(text))
        assert list(talk.answer("good"))


def test_a_conversation_may_grow_beyond_the_context(chat: Chat) -> None:
    told = chat("the fox and the crow met by a mill near the sea\n" * 5 + "/route\n")
    assert told[-1].startswith("1 tales")


@pytest.mark.parametrize(
    ("options", "complaint", "code"),
    [
        (("--expert", "x"), "error: there is no expert `x`", 1),
        (("--temperature", -1), "error: `temperature` must be", 2),
        (
            ("--chat-template", "nowhere.jinja"),
            "error: cannot read the chat template nowhere.jinja",
            1,
        ),
    ],
)
def test_mistakes_are_explained(
    chat: Chat, options: tuple[object, ...], complaint: str, code: int
) -> None:
    assert chat("a\n", *options, code=code)[0].startswith(complaint)


def messages_of(text: str) -> list[str]:
    lines = iter(text.splitlines(keepends=True))
    found = []
    while (message := read_message(lambda prompt: next(lines, ""))) is not None:
        found.append(message)
    return found


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("a\nb\n", ["a", "b"]),
        ("a\\\nb\\\nc\nd\n", ["a\nb\nc", "d"]),
        ('"""a\n\nb"""\nc\n', ["a\n\nb", "c"]),
        ('"""\na\n"""\nc\n', ["a", "c"]),
        ('"""never\nclosed\n', ["never\nclosed"]),
        ("\n \n", ["", " "]),
        ("no end", ["no end"]),
        ("goes on\\", ["goes on\\"]),
        ("", []),
    ],
)
def test_messages_of_several_lines(typed: str, expected: list[str]) -> None:
    assert messages_of(typed) == expected


def test_a_model_cannot_steer_the_terminal() -> None:
    assert visible("a\x1b[2Jb\tc\r\nd\x07\x9b") == "a␛[2Jb\tc\nd␇\ufffd"
    assert visible("Grüße, 世界\n") == "Grüße, 世界\n"


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator["Terminal"]:
    """`pyper chat` at a terminal; its history is in `tmp_path`."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pyper.cli.main", "chat", str(save_small_mixture(tmp_path)),
         "-n", "1900"],
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        env=os.environ | {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm-256color"},
    )  # fmt: skip
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


class Terminal:
    """The other end of a terminal: what was shown is read once, in order."""

    def __init__(self, process: "subprocess.Popen[bytes]", file: int) -> None:
        self.process = process
        self._file, self._unread = file, b""

    def until(self, wanted: str, again: Callable[[], object] = lambda: None) -> str:
        """What is shown up to `wanted`; fails after a silent minute.

        `again` is done at first and after every silent second: `input` notices a Ctrl-C that falls
        between its prompt and its wait for a key at the next key only; a person presses again.
        """
        again()
        silent = 0
        while wanted.encode() not in self._unread:
            if select.select([self._file], [], [], 1)[0]:
                self._unread += os.read(self._file, 4096)
                silent = 0
            else:
                silent += 1
                assert silent < PATIENCE, self._unread
                again()
        shown, found, self._unread = self._unread.partition(wanted.encode())
        return (shown + found).decode(errors="replace")

    def type(self, keys: bytes) -> None:
        """Wait for the prompt first: keys pressed before do not reach it."""
        os.write(self._file, keys)

    def press_ctrl_c(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def leave(self) -> int:
        """Ctrl-D at the prompt, again while nothing happens; the exit code."""
        for _ in range(PATIENCE):
            self.type(b"\x04")
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(timeout=1)
        raise AssertionError(self._unread)


def test_at_a_terminal_ctrl_c_stops_an_answer_and_lines_are_remembered(
    terminal: Terminal, tmp_path: Path
) -> None:
    assert "4 experts: law, maths, novels, code" in terminal.until("› ")
    terminal.type(b"the fox\n")
    terminal.until("\x1b[3")  # coloured text
    terminal.press_ctrl_c()
    n_tokens = re.search(r"(\d+) tokens, ", terminal.until("/s\x1b[0m"))
    assert n_tokens is not None
    assert int(n_tokens[1]) < 1000
    terminal.until("› ")
    assert terminal.leave() == 0
    assert (tmp_path / "pyper" / "chat-history").read_text().splitlines() == ["the fox"]


def test_ctrl_c_at_the_prompt_says_how_to_leave(terminal: Terminal) -> None:
    terminal.until("› ")
    terminal.until("/quit or Ctrl-D leaves", again=terminal.press_ctrl_c)
    terminal.until("› ")  # before its prompt, keys do not reach it
    assert terminal.leave() == 0


def test_ctrl_c_outside_of_a_wait_for_a_line_breaks_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody presses whenever something happens: before the wait, in it, and in what follows."""
    answers = iter(["", "", "the fox"])

    def press(*shown: object, **others: object) -> None:
        signal.raise_signal(signal.SIGINT)

    def type_or_press(prompt: str) -> str:
        answer = next(answers)
        if not answer:
            press()
        return answer

    monkeypatch.setattr("builtins.input", type_or_press)
    monkeypatch.setattr("builtins.print", press)
    ctrl_c = CtrlC()
    before = signal.getsignal(signal.SIGINT)
    with ctrl_c.handled():
        press()
        assert Keyboard(ctrl_c).read("› ") == "the fox\n"
        assert not ctrl_c.pressed
        press()
        assert ctrl_c.pressed
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_ends_the_answers_to_a_pipe(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pyper.cli.main", "chat", str(save_small_mixture(tmp_path)),
         "-n", "1900"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"the fox\nand the crow\n")
        process.stdin.flush()
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=PATIENCE)
    finally:
        process.kill()
        _, complaint = process.communicate()
    assert (process.returncode, complaint) == (130, b"")
