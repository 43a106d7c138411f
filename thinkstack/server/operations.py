"""Routes for operators: health, metrics, the state of the engines and new weights."""

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

import thinkstack
from thinkstack.engine.interface import Overloaded, WhileRunning
from thinkstack.server.keys import Principal
from thinkstack.server.metrics import kv_cache_usage
from thinkstack.server.middleware import has_local_host, is_loopback
from thinkstack.server.openapi import Declared, HealthReply, OpenAIError, errors
from thinkstack.server.served import Member
from thinkstack.types import RequestError, SamplingParams

if TYPE_CHECKING:
    from thinkstack.server.app import Server

HEALTH: Declared = {
    200: {"model": HealthReply},
    503: {"model": HealthReply, "description": "What failed, by member."},
}
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def operation_routes(server: "Server") -> APIRouter:
    """Health for load balancers, which needs no key, and metrics, which need none on this machine."""
    routes = APIRouter(responses=errors(OpenAIError))

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """The process runs."""
        return {"status": "ok"}

    @routes.get("/ready", responses=HEALTH)
    async def ready() -> JSONResponse:
        """All engines are able to answer."""
        limit, failures = server.settings.max_step_seconds, {}
        for name, member in server.models.members.items():
            status = member.service.status
            if status.failure is not None or status.seconds_since_heartbeat > limit:
                failures[name] = status.failure or "the engine does not respond"
        return _health(failures)

    @routes.get("/health/generate", responses=HEALTH)
    async def health_generate() -> JSONResponse:
        """Each engine samples a token in time."""
        members = server.models.members
        found = await asyncio.gather(
            *(_generate(member, server.settings.health_seconds) for member in members.values())
        )
        return _health({name: failure for name, failure in zip(members, found, strict=True) if failure})

    @routes.get("/metrics", response_class=Response, responses={200: {"content": {METRICS_TYPE: {}}}})
    async def metrics(request: Request) -> Response:
        """Metrics for Prometheus; from elsewhere with a key of the scope admin."""
        client = request.client
        if client is None or not is_loopback(client.host) or not has_local_host(request.scope):
            await server.admin(request)
        return Response(server.metrics.text(), media_type=METRICS_TYPE)

    return routes


def _health(failures: dict[str, str]) -> JSONResponse:
    if failures:
        return JSONResponse({"status": "failed", "members": failures}, 503)
    return JSONResponse({"status": "ok"})


async def _generate(member: Member, seconds: float) -> str | None:
    """Let an engine sample a token. Returns what went wrong."""
    prompt, reasons = member.chat.tokenizer.begin_ids or [0], []
    try:
        async with asyncio.timeout(seconds):
            generation = await member.service.submit(
                prompt, SamplingParams(max_tokens=1), priority=-1, max_wait=seconds
            )
            try:
                async for updates in generation:
                    reasons += [update.finish_reason for update in updates if update.finish_reason is not None]
            finally:
                generation.abort()
    except TimeoutError:
        return f"no token within {seconds:g} seconds"
    except Overloaded as error:
        return str(error)
    return None if reasons[-1:] in (["length"], ["stop"]) else "the engine failed"


class WeightsRequest(BaseModel):
    """The body of POST /admin/weights."""

    model_config = ConfigDict(extra="forbid")

    model: str
    """What `thinkstack serve` takes as MODEL, of the configuration that the member has."""
    member: str = "default"
    """Name of the member."""
    running: WhileRunning = "drain"
    """What happens to running requests."""


def admin_routes(server: "Server") -> APIRouter:
    """The state of the engines and new weights, for keys of the scope admin."""
    routes = APIRouter(prefix="/admin", responses=errors(OpenAIError))
    admin = Annotated[Principal, Depends(server.admin)]

    @routes.get("/status")
    async def status(principal: admin) -> dict[str, Any]:
        """The state of the members."""
        members = {}
        for name, member in server.models.members.items():
            found = member.service.status
            members[name] = {"model": member.source, "weights_version": member.weights_version} | asdict(found)
            members[name]["kv_cache_usage"] = kv_cache_usage(found)
        return {
            "version": thinkstack.__version__, "started": server.started, "requests": len(server.turns),
            "models": [model.name for model in server.models], "members": members,
        }  # fmt: skip

    @routes.post("/weights")
    async def weights(body: WeightsRequest, principal: admin) -> dict[str, Any]:
        """Load another checkpoint of the same configuration into a member; the old weights stay if it does not fit."""
        members = server.models.members
        if body.member not in members:
            raise RequestError(f"no member {body.member!r}; there are {', '.join(members)}", "member")
        member = members[body.member]
        await member.load_weights(body.model, body.running)
        return {"member": body.member, "model": member.source, "weights_version": member.weights_version}

    return routes
