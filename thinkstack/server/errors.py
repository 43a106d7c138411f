"""Errors of the accounts; the routes map each class to an HTTP status."""


class AuthenticationError(Exception):
    """The key or password is missing, unknown, revoked or expired, or its user is disabled (401)."""


class PermissionDenied(Exception):
    """The key is valid, but not for this scope or model (403)."""


class InsufficientBalance(Exception):
    """The balance does not cover the largest possible cost of the request (402)."""


class RateLimited(Exception):
    """A limit of the user or key is reached (429)."""

    def __init__(self, message: str, limit: str, value: int, retry_after_seconds: int):
        """limit: name of the limit, a field of `Limits`; value: its value."""
        super().__init__(message)
        self.limit, self.value, self.retry_after_seconds = limit, value, retry_after_seconds


class DatabaseUnavailable(Exception):
    """The database is locked, full or out of reach (503).

    Nothing was written, unless the connection broke during the commit: then the outcome is open. `note`, `settle` and
    `release` may be repeated; after a `reserve` that failed, release the request as after one that succeeded.
    """
