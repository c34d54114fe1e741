"""Talk to a model in the terminal."""

import secrets
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pyper.data.chat_template import ChatTemplate
from pyper.errors import PyperError
from pyper.generate import BatchEngine, EngineLimits, Event, Request, SamplingConfig
from pyper.serve.prompts import encode_messages
from pyper.stages.typed import CtrlC, Keyboard, Pipe, read_message, with_history
from pyper.stages.write import OpenModel, find_expert, legend, style_of, visible

HELP = """\
/expert N   write with one expert, by number or name; /expert alone: with all
/route      who wrote the last answer, and with what weight each would go on
/system T   a message before the conversation; /system alone: none
/clear      a new conversation
/help       this
/quit       leave (so does Ctrl-D); Ctrl-C stops an answer
A line that ends in \\ goes on in the next; \"\"\" begins and ends a message of several lines."""
_BAR_WIDTH = 24


class Conversation:
    """What was said, and who is to write."""

    def __init__(self, model: OpenModel, template: ChatTemplate, sampling: SamplingConfig) -> None:
        self.model = model
        self.expert: int | None = None
        """The one that writes; None: the mixture."""
        self.system = ""
        self.last: list[Event] = []
        """The last answer."""
        self._template, self._sampling = template, sampling
        self._messages: list[dict[str, str]] = []
        self._n_answers = 0
        limits = EngineLimits(max_running=1)
        self._engine = BatchEngine(model.mixture, model.tokenizer, limits, drafter=model.drafter)

    def answer(self, text: str) -> Generator[Event, None, None]:
        """Say something; the answer as it is written. Closing the iterator stops it."""
        self._messages.append({"role": "user", "content": text})
        self.last = []
        try:
            request_id = self._engine.submit(self._request())
        except PyperError:  # or every later message would be refused with this one
            self._messages.pop()
            raise
        try:
            while not self._engine.idle:
                for event in self._engine.step():
                    self.last.append(event)
                    yield event
        finally:
            self._engine.cancel(request_id)
            self._n_answers += 1
            said = "".join(event.text for event in self.last)
            self._messages.append({"role": "assistant", "content": said})

    def clear(self) -> None:
        """Forget everything but the system message."""
        self._messages, self.last = [], []

    def _request(self) -> Request:
        system = [{"role": "system", "content": self.system}] if self.system else []
        context = self.model.mixture.settings.seq_len
        # A long conversation keeps its end, and the answer always has room.
        keep = context - min(self._sampling.max_new_tokens, context // 2)
        messages = [*system, *self._messages]
        prompt = encode_messages(
            self.model.tokenizer, self._template, messages, context, keep=max(1, keep)
        )
        mark = self._template.end_mark
        stop = (*self._sampling.stop, mark) if mark else self._sampling.stop
        seed = (self._sampling.seed + self._n_answers) % 2**63
        sampling = replace(self._sampling, seed=seed, stop=stop)
        return Request(prompt, sampling, self.expert)


class TerminalChat:
    """A conversation, and the commands that steer it."""

    def __init__(self, conversation: Conversation, console: Console, ctrl_c: CtrlC) -> None:
        self._talk, self._console, self._ctrl_c = conversation, console, ctrl_c
        self._commands: dict[str, Callable[[str], None]] = {
            "/expert": self._choose_expert,
            "/route": self._show_route,
            "/system": self._set_system,
            "/clear": self._clear,
            "/help": lambda rest: self._console.print(Text(HELP), soft_wrap=True),
        }

    def run(self, read: Callable[[str], str]) -> None:
        """Until /quit or the end of the input. `read` shows its argument and gives a line."""
        while (message := read_message(read)) is not None:
            command, _, rest = message.strip().partition(" ")
            if command == "/quit":
                return
            if message.startswith("/"):
                self._obey(command, rest.strip())
            elif message.strip():
                self._say(message)

    def _obey(self, command: str, rest: str) -> None:
        if command not in self._commands:
            self._note(
                f"there is no {command}; /help lists what there is (a space before it sends it)"
            )
            return
        try:
            self._commands[command](rest)
        except PyperError as error:
            self._note(f"{error.message}: {error.hint}")

    def _say(self, message: str) -> None:
        answer, began = self._talk.answer(message), time.perf_counter()
        try:
            for event in answer:
                text = Text(visible(event.text), style=style_of(event.expert))
                self._console.print(text, end="", soft_wrap=True)
                if self._ctrl_c.pressed:
                    break
        except PyperError as error:
            self._note(f"{error.message}: {error.hint}")
        finally:
            answer.close()
        self._console.print()
        if self._console.is_terminal and self._talk.last:
            self._summarise(time.perf_counter() - began)

    def _summarise(self, seconds: float) -> None:
        last = self._talk.last
        line = legend(self._talk.model.names, self._tokens_by_expert())
        line.append(f"{len(last)} tokens, {len(last) / seconds:.0f}/s", style="dim")
        self._console.print(line)

    def _tokens_by_expert(self) -> list[int]:
        tokens = [0] * len(self._talk.model.names)
        for event in self._talk.last:
            tokens[event.expert] += 1
        return tokens

    # Commands

    def _choose_expert(self, rest: str) -> None:
        names = self._talk.model.names
        self._talk.expert = find_expert(names, rest) if rest else None
        self._note(f"{names[self._talk.expert]} writes" if self._talk.expert is not None
                   else "the mixture writes")  # fmt: skip

    def _show_route(self, rest: str) -> None:
        last = self._talk.last
        if not last:
            self._note("nothing was written yet")
            return
        rows = zip(self._talk.model.names, self._tokens_by_expert(), last[-1].weights, strict=True)
        width = max(map(len, self._talk.model.names))
        for index, (name, tokens, weight) in enumerate(rows):
            bar = "█" * round(weight * _BAR_WIDTH)
            line = f"{index} {name:<{width}}  {weight:4.0%} {bar:<{_BAR_WIDTH}}  {tokens} tokens"
            self._console.print(Text(line.rstrip(), style=style_of(index)), soft_wrap=True)

    def _set_system(self, rest: str) -> None:
        self._talk.system = rest
        self._note("system message set" if rest else "no system message")

    def _clear(self, rest: str) -> None:
        self._talk.clear()
        self._note("a new conversation")

    def _note(self, text: str) -> None:
        self._console.print(Text(text, style="dim"), soft_wrap=True)


def chat_in_terminal(
    model: OpenModel,
    template: ChatTemplate,
    sampling: SamplingConfig,
    console: Console,
    *,
    expert: str | None,
    system: str,
    history: Path,
) -> None:
    """Read messages from standard input and answer them. Raises ConfigError."""
    conversation = Conversation(model, template, sampling)
    conversation.system = system
    if expert is not None:
        conversation.expert = find_expert(model.names, expert)
    ctrl_c = CtrlC()
    chat = TerminalChat(conversation, console, ctrl_c)
    with ctrl_c.handled():
        if not sys.stdin.isatty():
            chat.run(Pipe(ctrl_c).read)
            return
        names = model.names
        shown = f"{len(names)} experts: {', '.join(names)}. /help lists the commands."
        console.print(Text(shown, "dim"))
        with_history(history, lambda: chat.run(Keyboard(ctrl_c).read))


def new_seed() -> int:
    """For a conversation that is not to be repeated."""
    return secrets.randbits(62)
