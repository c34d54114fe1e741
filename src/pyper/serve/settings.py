"""How the server behaves, apart from the model."""

import ipaddress
from dataclasses import dataclass

from pyper.errors import ConfigError, UsageError


@dataclass(frozen=True)
class Limits:
    """What one client can cost; sizes in bytes, times in seconds."""

    header_bytes: int = 16 << 10
    header_seconds: float = 10
    body_bytes: int = 1 << 20
    body_seconds: float = 30
    stall_seconds: float = 30
    """A client that does not read for this long is dropped."""
    linger_seconds: float = 5
    """A client still sends what was refused: closing at once would reset the connection, and take
    the answer with it."""
    keep_alive_seconds: int = 5
    shutdown_seconds: float = 30
    """Running requests may take this long once the server was told to stop."""
    queue: int = 64
    """Sequences that wait while `max_running` are being written."""

    def __post_init__(self) -> None:
        """Raises UsageError for a time that is none."""
        if not 0 <= self.shutdown_seconds < float("inf"):
            raise UsageError(
                "`--shutdown-seconds` must be a finite number, 0 or more, not "
                f"{self.shutdown_seconds:g}",
                hint="`30` is usual, `0` waits for nobody",
            )


@dataclass(frozen=True)
class ServeSettings:
    """Where to listen, and to whom. Raises ConfigError when that would be unsafe."""

    name: str
    """The model's name in the API."""
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    """Names in the Host header beside localhost and the addresses listened on."""
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if self.api_key is not None and not _is_key(self.api_key):
            raise ConfigError(
                "the API key must be visible ASCII characters without spaces",
                hint="make one with `openssl rand -hex 24`",
            )
        if self.api_key is None and not is_loopback(self.host):
            raise ConfigError(
                f"`--host {self.host}` can be reached from other machines, and there is no API key",
                hint="set PYPER_API_KEY or `--api-key-file`, or listen on 127.0.0.1",
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_key(key: str) -> bool:
    return bool(key) and all("!" <= char <= "~" for char in key)
