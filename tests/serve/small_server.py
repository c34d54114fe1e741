"""A real `pyper serve` on a small mixture, in a process of its own."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the tests' folder, as pytest has it
    sys.path[0] = str(Path(__file__).parents[1])

import httpx
from rich.console import Console

from mixture.small_mixtures import NAMES, small_counts, small_experts, small_settings
from pyper.checkpoint import write_folder_atomically, write_tensors
from pyper.data import TextTokenizer
from pyper.generate import EngineLimits
from pyper.mixture import ExpertSource, save_mixture
from pyper.mixture.expert_folder import model_tensors
from pyper.serve.settings import Limits, ServeSettings
from pyper.stages.serve import serve_model

CONTEXT = 2048
KEY = "a-key-of-the-tests"
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'forbidden' %}{{ raise_exception('not that word') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
)
_CLEAN = {"PYPER_API_KEY": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def save_small_mixture(
    folder: Path,
    tokenizer: TextTokenizer | None = None,
    router: str = "unigram",
    **changes: Any,
) -> Path:
    """Four random experts over bytes, which do not end a document by themselves for long."""
    tokenizer = tokenizer or TextTokenizer.bytes_only()
    sources = []
    experts = small_experts(vocab_size=tokenizer.vocab_size, seq_len=CONTEXT)
    for index, model in enumerate(experts):
        own = folder / f"expert{index}"
        with write_folder_atomically(own) as temporary:
            (temporary / "config.json").write_text(model.config.model_dump_json())
            write_tensors(temporary / "model.safetensors", model_tensors(model))
        sources.append(ExpertSource(model.config, own))
    settings = small_settings(
        tokenizer_fingerprint=tokenizer.fingerprint,
        seq_len=CONTEXT,
        router=router,
        temperature=0.02,  # nobody wins at once: several experts write
        top_k=2,
        **changes,
    )
    n_tokens = tokenizer.vocab_size
    of_router: dict[str, Any] = {"counts": small_counts(4, n_tokens)}
    if router == "lm":
        of_router = {"router_models": experts}
    save_mixture(folder / "tiny", settings, sources, tokenizer, **of_router)
    return folder / "tiny"


@dataclass
class Server:
    """A server that runs."""

    url: str
    process: "subprocess.Popen[str]"
    printed: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def experts(self) -> tuple[str, ...]:
        return NAMES

    def connect(self, *, timeout: float = 15) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)

    @cached_property
    def client(self) -> httpx.Client:
        # Connections are not kept: the server may close an idle one at any moment.
        limits = httpx.Limits(max_keepalive_connections=0)
        return httpx.Client(
            base_url=self.url, trust_env=False, verify=False, limits=limits, timeout=30
        )

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.client.get(path, **options)

    def metric(self, name: str) -> float:
        """A value of /metrics, by its name and labels as they are printed."""
        lines = self.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith(f"{name} ")]
        return float(found[0].split()[-1]) if found else 0.0

    def health(self) -> dict[str, Any]:
        health: dict[str, Any] = self.get("/health").json()
        return health

    def wait_until_idle(self, seconds: float = 15) -> None:
        """Slots return to zero."""
        wait_until(lambda: self.health()["running"] + self.health()["waiting"] == 0, seconds)


def wait_until(condition: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def serving(
    model: Path,
    *options: object,
    limits: dict[str, float] | None = None,
    api_key: str | None = None,
    max_running: int = 64,
    **variables: str,
) -> Iterator[Server]:
    """`pyper serve MODEL` on a free port; killed at the end if it is still there.

    `limits` are not on the command line: with them, the same function is called without it.
    """
    command = ["-m", "pyper.cli.main", "serve", str(model), "--port", "0", *map(str, options)]
    if limits is not None:
        values = {"model": str(model), "limits": limits, "key": api_key, "running": max_running}
        command = [__file__, json.dumps(values)]
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | _CLEAN | variables,
    )
    try:
        yield _when_ready(process)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _when_ready(process: "subprocess.Popen[str]") -> Server:
    printed: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        printed.append(line)
        if found := re.search(r"http://\S+:\d+", line):
            threading.Thread(target=_keep_reading, args=(process, printed), daemon=True).start()
            return Server(found[0].replace("0.0.0.0", "127.0.0.1"), process, printed)
    raise AssertionError("".join(printed))


def _keep_reading(process: "subprocess.Popen[str]", printed: list[str]) -> None:
    assert process.stdout is not None
    with suppress(ValueError):  # closed at the end of the test
        printed.extend(process.stdout)


def _serve_with_limits(model: str, limits: dict[str, Any], key: str | None, running: int) -> None:
    settings = ServeSettings(name="tiny", port=0, api_key=key, limits=Limits(**limits))
    template = Path(model).with_name("template.jinja")
    template.write_text(TEMPLATE)
    serve_model(
        Path(model),
        settings,
        EngineLimits(max_running=running),
        Console(width=200),
        mixing=None,
        resident=None,
        device="cpu",
        chat_template=template,
    )


if __name__ == "__main__":
    _serve_with_limits(**json.loads(sys.argv[1]))
