"""What goes wrong with a request, in the shape that OpenAI's clients understand."""

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """An answer other than 200: {"error": {"message", "type", "param", "code"}}."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer."""
        return error_body(self.status, self.message, param=self.param, code=self.code)


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's shape; `type` follows from the status."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400."""
    return ApiError(400, message, param=param, code=code)


def overloaded() -> ApiError:
    """429, with the time after which to try again."""
    return ApiError(
        429,
        "every place is taken, those to wait in as well",
        code="overloaded",
        headers={"retry-after": "1"},
    )


def shutting_down() -> ApiError:
    """503, for what could not be finished in time."""
    return ApiError(
        503, "the server is shutting down", code="shutting_down", headers={"retry-after": "5"}
    )
