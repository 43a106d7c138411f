"""Errors of the page, with their HTTP status and the code by which the page finds its words."""

from typing import ClassVar


class PageError(Exception):
    """An error of the page alone."""

    status: ClassVar[int]
    code: ClassVar[str]

    def body(self) -> dict[str, object]:
        """The body of the reply."""
        return {"error": {"code": self.code, "message": str(self)}}


class NotFound(PageError):
    """There is no such conversation or message, or it belongs to somebody else."""

    status, code = 404, "not_found"


class Conflict(PageError):
    """The state of the conversation does not permit this now."""

    status, code = 409, "conflict"


class WrongPassword(PageError):
    """The name or password of a sign-in is wrong."""

    status, code = 401, "wrong_password"


class Forbidden(PageError):
    """The request does not come from the page, or is for others."""

    status, code = 403, "forbidden"


class TooLarge(PageError):
    """A message or an import is too large."""

    status, code = 413, "too_large"
