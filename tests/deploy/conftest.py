"""PostgreSQL of the tests of the server."""

from tests.server.conftest import postgres

__all__ = ["postgres"]
