"""Errors in OpenAI's shape, and text that forges no line of a log. It knows no starlette."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.responses import JSONResponse


class ApiError(Exception):
    """What a client did wrong or cannot have. status: HTTP's. param: the field. code: one word."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str = "invalid_value",
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the reply."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": printable(self.message), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> "JSONResponse":
        from starlette.responses import JSONResponse

        headers = self.headers
        if self.status >= 500 or self.status == 409:
            headers = {"x-should-retry": "false", **headers}  # OpenAI's clients would run it three times
        return JSONResponse(self.body, self.status, headers)


def printable(text: str) -> str:
    """One line in which nothing obeys a terminal or forges another line."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)[:2000]
