"""Settings of the server process, apart from its models and accounts."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits of the server itself."""

    max_body_bytes: int = 16 * 2**20
    """Largest body of a request."""
    header_seconds: float = 10.0
    """Seconds in which the head of a request must arrive."""
    body_seconds: float = 30.0
    """Seconds in which a body must arrive."""
    max_wait: float = 60.0
    """Seconds that a request may wait for its start."""
    keep_alive_seconds: float = 10.0
    """Seconds of silence after which a stream sends a comment, and a whole reply a blank line."""
    stream_interval: float = 0.02
    """Shortest time in seconds between two chunks of a stream; faster tokens come together, except those of vLLM.
    0: a chunk for each."""
    max_step_seconds: float = 120.0
    """Duration of a step after which the engine is taken for dead."""
    health_seconds: float = 10.0
    """Seconds in which each engine must answer /health/generate."""
    drain_seconds: float = 30.0
    """Seconds that running requests may take after SIGTERM."""
    page: bool = True
    """Whether there is a chat page at /."""
    sign_up: Literal["off", "invitation", "open"] = "invitation"
    """Who may make an account on the page."""
    unread_seconds: float = 60.0
    """Time without a reader after which an answer of the page ends."""
