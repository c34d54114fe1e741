"""What a person types, or a pipe brings: lines, messages of several lines, and Ctrl-C."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_HISTORY_LINES = 1000


class CtrlC:
    """Ctrl-C ends a wait for a line with KeyboardInterrupt; else it is only noted.

    Python's own way, an exception wherever the program is, would break into a step of the engine,
    or end a conversation because somebody pressed twice.
    """

    def __init__(self) -> None:
        self.pressed = False
        """Since this was last made False."""
        self._breaks = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Within this, in the main thread, Ctrl-C is handled so."""
        before = signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def breaks(self, wait: Callable[[], str]) -> str:
        """What `wait` gives. Raises KeyboardInterrupt when Ctrl-C is or was pressed."""
        self._breaks = True
        try:
            if self.pressed:
                raise KeyboardInterrupt
            return wait()
        finally:
            self._breaks = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        # At every press: one that is only noted while an exception leaves `input` would make it
        # a SystemError.
        if self._breaks:
            raise KeyboardInterrupt


class Keyboard:
    """Lines that a person types."""

    def __init__(self, ctrl_c: CtrlC) -> None:
        self._ctrl_c = ctrl_c

    def read(self, prompt: str) -> str:
        """A line with its end; "" at Ctrl-D. Forgets a Ctrl-C from before the prompt."""
        while True:
            self._ctrl_c.pressed = False
            try:
                return self._ctrl_c.breaks(lambda: input(prompt)) + "\n"
            except EOFError:
                print()
                return ""
            except KeyboardInterrupt:
                print("\n(/quit or Ctrl-D leaves)")


class Pipe:
    """Lines of standard input."""

    def __init__(self, ctrl_c: CtrlC) -> None:
        self._ctrl_c = ctrl_c

    def read(self, prompt: str) -> str:
        """A line with its end; "" after the last one.

        Raises KeyboardInterrupt, also when an answer was stopped: nobody wants the next one.
        """
        return self._ctrl_c.breaks(sys.stdin.readline)


def read_message(read: Callable[[str], str]) -> str | None:
    """One message of one or several lines; None at the end of the input."""
    line = read("› ")
    if not line.endswith("\n"):
        return line or None
    line = line[:-1]
    if line.lstrip().startswith('"""'):
        return _read_block(read, line.lstrip()[3:])
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read("… ").removesuffix("\n"))
    return "\n".join(lines)


def _read_block(read: Callable[[str], str], first: str) -> str:
    lines = [first]
    while '"""' not in lines[-1]:
        line = read("… ")
        lines.append(line.removesuffix("\n") if line else '"""')
    lines[-1] = lines[-1].split('"""', 1)[0]
    return "\n".join(lines).strip("\n")


def with_history(file: Path, work: Callable[[], None]) -> None:
    """Run `work` with line editing, and the lines of earlier conversations at the arrow keys."""
    try:
        import readline
    except ImportError:  # not on every system; lines can be typed all the same
        work()
        return
    readline.set_history_length(_HISTORY_LINES)
    if file.is_file():
        readline.read_history_file(file)
    try:
        work()
    finally:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
            file.chmod(0o600)
        except OSError:  # a read-only home: the conversation mattered, its lines do not
            pass
