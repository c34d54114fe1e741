"""A real `pyper serve` on a small mixture, in a process of its own."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from mixture.small_mixtures import NAMES, small_counts, small_experts, small_settings
from pyper.checkpoint import write_folder_atomically, write_tensors
from pyper.data import TextTokenizer
from pyper.mixture import ExpertSource, save_mixture
from pyper.mixture.expert_folder import model_tensors

CONTEXT = 2048
KEY = "a-key-of-the-tests"
_CLEAN = {"PYPER_API_KEY": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def save_small_mixture(folder: Path, **changes: Any) -> Path:
    """Four random experts over bytes, which do not end a document by themselves for long."""
    tokenizer = TextTokenizer.bytes_only()
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
        router="unigram",
        prune=1e-3,
        top_k=2,
        **changes,
    )
    save_mixture(
        folder / "tiny", settings, sources, tokenizer, counts=small_counts(4, tokenizer.vocab_size)
    )
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

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=30, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=10, **options)

    def health(self) -> dict[str, Any]:
        health: dict[str, Any] = self.get("/health").json()
        return health

    def wait_until_idle(self, seconds: float = 5) -> None:
        """Slots return to zero."""
        deadline = time.monotonic() + seconds
        while (now := self.health())["running"] + now["waiting"] > 0:
            assert time.monotonic() < deadline, now
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


@contextmanager
def serving(model: Path, *options: object, **variables: str) -> Iterator[Server]:
    """`pyper serve MODEL` on a free port; killed at the end if it is still there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pyper.cli.main", "serve", str(model), "--port", "0"]
        + [str(option) for option in options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ
        | {"PYPER_API_KEY": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        | variables,
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
