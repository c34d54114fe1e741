"""The body of one request: bounded in size and time, JSON, typed."""

import asyncio
from typing import TypeVar

from fastapi import Request

from pyper.serve.api_error import ApiError
from pyper.serve.bodies import Body, read_body
from pyper.serve.settings import Limits
from pyper.serve.strict_json import parse_object

AnyBody = TypeVar("AnyBody", bound=Body)


async def receive_body(request: Request, kind: type[AnyBody], limits: Limits) -> AnyBody:
    """Raises ApiError 400, 408, 413 or 415."""
    _check_kind(request)
    content = await _receive(request, limits)
    return read_body(kind, parse_object(content))


def _check_kind(request: Request) -> None:
    media, *options = request.headers.get("content-type", "").lower().split(";")
    charsets = [o.split("=", 1)[1].strip(' "') for o in options if o.strip().startswith("charset=")]
    if media.strip() != "application/json" or any(c not in ("utf-8", "utf8") for c in charsets):
        raise ApiError(415, "the body must be JSON in UTF-8: `Content-Type: application/json`")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ApiError(415, "the body must not be compressed")


async def _receive(request: Request, limits: Limits) -> bytes:
    length = request.headers.get("content-length", "0")
    if int(length) > limits.body_bytes:
        raise _too_large(limits)
    content = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                content += chunk
                if len(content) > limits.body_bytes:
                    raise _too_large(limits)
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {limits.body_seconds:g} seconds",
            headers={"connection": "close"},
        ) from None
    return bytes(content)


def _too_large(limits: Limits) -> ApiError:
    return ApiError(413, f"the body is larger than {limits.body_bytes:,} bytes")
