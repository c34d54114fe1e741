"""README and docs/serving.md say what is so."""

import re
import shlex
from pathlib import Path

import pytest

from pyper.serve.bodies import MAX_CHOICES, ChatBody, CompletionBody
from pyper.serve.guard import KNOWN
from pyper.serve.settings import Limits
from serve.small_server import Server, serving

ROOT = Path(__file__).parents[2]
MANUAL = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def block(text: str, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_command_of_the_readme_serves(small_mixture_folder: Path) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Serve\n", 1)[1]
    lines = [shlex.split(line, comments=True) for line in block(section, "sh").splitlines()]
    serve, chat = (line for line in lines if line[0] == "pyper")
    assert (serve[1], chat[1]) == ("serve", "chat")
    port = serve.index("--port")
    with serving(small_mixture_folder, *serve[3:port], *serve[port + 2 :]) as server:
        assert server.health()["status"] == "ok"


def test_the_example_of_the_manual_runs(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    example = block(MANUAL, "python")
    own = example.replace("http://127.0.0.1:8000", server.url).replace("quickstart", "tiny")
    assert own.count(server.url) == 1
    exec(own + "\nclient.close()")
    assert "{'" in capsys.readouterr().out


def test_the_manual_names_every_endpoint_and_limit() -> None:
    for path in KNOWN:
        assert path in MANUAL or path.startswith("/page")
    limits = Limits()
    for shown in (f"{limits.header_bytes >> 10} KiB", f"{limits.body_bytes >> 20} MiB",
                  f"{limits.header_seconds:g} s (408)", f"{limits.body_seconds:g} s (408)",
                  f"{limits.queue} more wait", f"× `n` | {MAX_CHOICES}",
                  f"dropped after {limits.stall_seconds:g} s"):  # fmt: skip
        assert shown in MANUAL, shown


def test_the_manual_names_every_field_that_is_served() -> None:
    harmless = {"model", "parallel_tool_calls", "modalities", "response_format"}
    fields = {*CompletionBody.model_fields, *ChatBody.model_fields} - harmless
    unnamed = {f for f in fields if f"`{f}`" not in MANUAL}
    assert unnamed == {
        "service_tier", "safety_identifier", "prompt_cache_key",  # "and their like"
        "frequency_penalty", "presence_penalty", "suffix", "tool_choice",  # "penalties … "
    }  # fmt: skip
