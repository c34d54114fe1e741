"""What many clients do to `pyper serve`: memory, `/health`, and whether every place comes back.

    python benchmarks/serve_load.py [--minutes 30] [--streams 200] [--slow 20] [--json FILE]

Of the streams half hang up in the middle, `--slow` hardly read, the others read to the end; they
come one by one, fifty a second. The targets: memory flat (< 5 % after warm-up), 99 % of the answers
of /health within 100 ms, no 5xx, and nothing left running at the end. Without `--model` a small
random mixture is served.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _record import add_json_option, write_record

from pyper.checkpoint import write_folder_atomically, write_tensors
from pyper.config import ExpertConfig
from pyper.data import TextTokenizer
from pyper.mixture import ExpertSource, MixtureSettings, save_mixture
from pyper.mixture.expert_folder import model_tensors
from pyper.nn import Transformer

CONTEXT = 1024
LONGEST = 300
ARRIVALS_PER_SECOND = 50
SLOW_BYTES_PER_SECOND = 400


@dataclass
class Load:
    """What the clients saw."""

    port: int
    model: str
    ends_at: float
    statuses: Counter[str] = field(default_factory=Counter)
    n_bytes: int = 0
    health_seconds: list[float] = field(default_factory=list)
    resident: list[tuple[float, int]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.ends_at


def make_model(folder: Path) -> Path:
    """Four random experts over bytes."""
    tokenizer = TextTokenizer.bytes_only()
    config = ExpertConfig(
        vocab_size=tokenizer.vocab_size, bos_id=tokenizer.bos_id, seq_len=CONTEXT,
        d_model=32, n_layers=2, n_heads=4, d_ff=64,
    )  # fmt: skip
    sources = []
    for index in range(4):
        torch.manual_seed(index)
        with write_folder_atomically(folder / f"expert{index}") as temporary:
            (temporary / "config.json").write_text(config.model_dump_json())
            write_tensors(temporary / "model.safetensors", model_tensors(Transformer(config)))
        sources.append(ExpertSource(config, folder / f"expert{index}"))
    settings = MixtureSettings(
        experts=("a", "b", "c", "d"), tokenizer_fingerprint=tokenizer.fingerprint,
        bos_id=tokenizer.bos_id, seq_len=CONTEXT, router="experts",
    )  # fmt: skip
    save_mixture(folder / "model", settings, sources, tokenizer)
    return folder / "model"


def start_server(model: Path, n_streams: int) -> tuple["subprocess.Popen[str]", int]:
    """The process and its port."""
    command = [sys.executable, "-m", "pyper.cli.main", "serve", str(model), "--name", "served"]
    process = subprocess.Popen(
        [*command, "--port", "0", "--queue", str(2 * n_streams)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    found = re.search(r"http://[^:]+:(\d+)", process.stdout.readline())
    if found is None:
        raise SystemExit("the server did not start")
    return process, int(found[1])


def request_of(load: Load, path: str, body: dict[str, Any] | None) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    lines = [
        f"{'GET' if body is None else 'POST'} {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        "Connection: close",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + content


async def client(load: Load, kind: str, number: int) -> None:
    """One stream after another until the time is up."""
    await asyncio.sleep(number / ARRIVALS_PER_SECOND)
    rng = random.Random(number)
    while not load.is_over:
        try:
            load.statuses[await one_stream(load, kind, rng)] += 1
        except (ConnectionError, asyncio.IncompleteReadError):
            load.statuses[f"{kind}: connection ended"] += 1
            await asyncio.sleep(0.1)


async def one_stream(load: Load, kind: str, rng: random.Random) -> str:
    body = {
        "model": load.model,
        "messages": [{"role": "user", "content": "x" * rng.randrange(1, CONTEXT // 4)}],
        "max_tokens": rng.randrange(1, LONGEST),
        "stream": True,
    }
    connection = socket.socket()
    connection.setblocking(False)
    if kind == "slow":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", load.port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=4096)
    try:
        writer.write(request_of(load, "/v1/chat/completions", body))
        status = (await reader.readline()).decode().split()[1]
        end = await read(load, reader, kind, rng) if status == "200" else "refused"
        return f"{kind}: {status} {end}"
    finally:
        writer.close()


async def read(load: Load, reader: asyncio.StreamReader, kind: str, rng: random.Random) -> str:
    hangs_up_after = rng.randrange(1, 60_000) if kind == "leaving" else sys.maxsize
    n_read, last = 0, b""
    while n_read < hangs_up_after:
        part = await reader.read(SLOW_BYTES_PER_SECOND if kind == "slow" else 4096)
        if not part:
            return "whole" if b"[DONE]" in last else "cut"
        n_read, last = n_read + len(part), (last + part)[-64:]
        load.n_bytes += len(part)
        if kind == "slow":
            await asyncio.sleep(1)
            if load.is_over:
                break
    return "left"


async def watch_health(load: Load) -> None:
    while not load.is_over:
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", load.port)
        writer.write(request_of(load, "/health", None))
        await reader.read()
        load.health_seconds.append(time.perf_counter() - began)
        writer.close()
        await asyncio.sleep(0.2)


async def watch_memory(load: Load, pid: int) -> None:
    while not load.is_over:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        load.resident.append((time.monotonic(), 4096 * pages))
        await asyncio.sleep(1)


async def health(port: int) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    state: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return state


async def run_clients(load: Load, pid: int, n_streams: int, n_slow: int) -> dict[str, Any]:
    """The whole load; what still runs when all clients are gone."""
    kinds = ["slow"] * n_slow + ["leaving"] * (n_streams // 2)
    kinds += ["reading"] * (n_streams - len(kinds))
    clients = [client(load, kind, i) for i, kind in enumerate(kinds)]
    await asyncio.gather(*clients, watch_health(load), watch_memory(load, pid))
    state = await health(load.port)
    for _ in range(100):
        if state["running"] + state["waiting"] == 0:
            break
        await asyncio.sleep(0.1)
        state = await health(load.port)
    return state


def summarise(load: Load, left: dict[str, Any], seconds: float) -> dict[str, Any]:
    begun = load.resident[0][0]
    early = [b for t, b in load.resident if 0.3 <= (t - begun) / seconds < 0.5]
    late = [b for t, b in load.resident if (t - begun) / seconds >= 0.8]
    latencies = sorted(load.health_seconds)
    return {
        "seconds": seconds,
        "streams": dict(sorted(load.statuses.items())),
        "answers_5xx": sum(
            n for status, n in load.statuses.items() if re.search(r": 5\d\d", status)
        ),
        "megabytes_read": round(load.n_bytes / 1e6, 1),
        "resident_mb": [
            round(statistics.median(early) / 1e6, 1),
            round(statistics.median(late) / 1e6, 1),
        ],
        "resident_growth": round(statistics.median(late) / statistics.median(early) - 1, 4),
        "health_ms": {
            f"p{p}": round(1e3 * latencies[min(len(latencies) - 1, len(latencies) * p // 100)], 1)
            for p in (50, 90, 99)
        },
        "left_running": left["running"] + left["waiting"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--slow", type=int, default=20)
    parser.add_argument(
        "--model", type=Path, help="a run or a mixture (default: a small random one)"
    )
    add_json_option(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or make_model(Path(folder))
        process, port = start_server(model, options.streams)
        try:
            load = Load(port, "served", time.monotonic() + 60 * options.minutes)
            left = asyncio.run(run_clients(load, process.pid, options.streams, options.slow))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
    results = summarise(load, left, 60 * options.minutes)
    for name, value in results.items():
        print(f"{name:16} {value}")
    write_record(options.json, results)


if __name__ == "__main__":
    main()
