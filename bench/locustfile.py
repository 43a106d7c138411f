"""Streams without a pause by locust, for `python bench/server.py load`; writes what each one saw as JSON.

The environment has KEY, BODY (the request as JSON) and OUT (the file).
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from locust import HttpUser, constant, events, task

STREAMS: list[dict[str, Any]] = []


class StreamingUser(HttpUser):
    """One stream after the other."""

    wait_time = constant(0)

    @task
    def chat(self) -> None:
        """Read a stream to its end."""
        began, last, found = time.perf_counter(), 0.0, {"gaps": [], "usage": None, "is_done": False, "id": ""}
        headers = {"Authorization": f"Bearer {os.environ['KEY']}", "Content-Type": "application/json"}
        with self.client.post(
            "/chat/completions", data=os.environ["BODY"], headers=headers, stream=True, catch_response=True
        ) as reply:
            found["status"] = reply.status_code
            for line in reply.iter_lines():  # of bytes: text would be split at U+2028 too
                now = time.perf_counter()
                if line.startswith(b"data: [DONE]"):
                    found["is_done"] = True
                elif line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    found["id"], found["usage"] = chunk.get("id", ""), chunk.get("usage") or found["usage"]
                    if last:
                        found["gaps"].append(now - last)
                    elif chunk.get("choices") and chunk["choices"][0]["delta"].get("content"):
                        found["first"] = now - began
                        last = now
                    last = now if last else 0.0
            if not found["is_done"]:
                reply.failure("the stream has no end")
        STREAMS.append(found)


@events.quitting.add_listener
def write(**_: Any) -> None:
    """Write what the streams saw."""
    Path(os.environ["OUT"]).write_text(json.dumps(STREAMS), encoding="utf-8")
