"""Start a server: accounts, models, and the address it listens on."""

import asyncio
import contextlib
import datetime
import errno
import functools
import gc
import logging
import signal
import socket
import time
from pathlib import Path
from typing import Any, cast

import torch
import uvicorn

from thinkstack.machine import describe_machine, instruction_set, prepare_machine
from thinkstack.server.accounts import Accounts
from thinkstack.server.app import Server, create_app
from thinkstack.server.database import Database, data_folder, sqlite_url
from thinkstack.server.keys import Principal
from thinkstack.server.limits import LIMITS
from thinkstack.server.middleware import JsonFormatter, Overload, is_loopback
from thinkstack.server.middleware import log as requests_log
from thinkstack.server.prices import PriceTable
from thinkstack.server.protocol import LimitedProtocol
from thinkstack.server.served import ServeConfig, ServedModels, load_member
from thinkstack.types import ConfigError

log = logging.getLogger(__name__)
ADMIN = "admin"
"""The user that the first start creates, and who sends the requests of a server without keys."""
NO_KEYS = "no-keys"
"""Name of the administrator's key to which a server without keys books its requests; nobody knows it."""
UNWILLING_SECONDS = 5
"""How much longer than drain_seconds a client that does not read is waited for."""


def run_server(
    config: ServeConfig,
    host: str,
    port: int,
    data: Path | None = None,
    database: str = "",
    prices: Path | None = None,
    no_keys: bool = False,
    log_json: bool = False,
) -> None:
    """Serve until SIGTERM or Ctrl-C. port: 0 for a free one. Prints the address on stdout when it is ready.

    Raises ConfigError.
    """
    if no_keys and not is_loopback(host):
        raise ConfigError(f"--no-keys with --host {host} would answer everybody; use keys, or --host 127.0.0.1")
    log_requests(log_json)
    began = time.monotonic()
    with contextlib.closing(listen(host, port)) as listener:
        server = build_server(config, data, database, prices, no_keys)
        gc.collect()
        gc.freeze()  # what is loaded stays: going through it again and again takes a quarter of a request's time
        log.info("models: %s; ready after %.1f s", ", ".join(config.models), time.monotonic() - began)
        # uvicorn raises SIGTERM again at its end, which would be the end of this process without an exit status of 0
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        ApiProcess(server).run(sockets=[listener])


def build_server(
    config: ServeConfig,
    data: Path | None = None,
    database: str = "",
    prices: Path | None = None,
    no_keys: bool = False,
) -> Server:
    """Open the accounts and load the models; `create_app` makes an ASGI application of the result, whose lifespan must
    run. Prints the first key. no_keys=True answers everybody who reaches the application. Raises ConfigError."""
    prepare_machine()
    log.info("%s, %s, %d threads", describe_machine(), instruction_set().name, torch.get_num_threads())
    began = time.monotonic()
    accounts = open_accounts(data, database, prices)
    principal = first_key(accounts, no_keys)
    log.info("accounts: %s; opened in %.1f s", accounts.database.name, time.monotonic() - began)
    check_prices(accounts, config)
    members = {name: load_member(name, member) for name, member in config.members.items()}
    return Server(ServedModels(members, config.models), accounts, config.server, principal)


class ApiProcess(uvicorn.Server):
    """The HTTP server. At SIGTERM it refuses new connections, and running requests end within drain_seconds."""

    def __init__(self, api: Server):
        self.api = api
        overload = Overload(api.models.members, api.metrics.count_request)
        protocol = functools.partial(
            LimitedProtocol, header_seconds=api.settings.header_seconds, refusal=overload.refusal
        )
        super().__init__(
            uvicorn.Config(
                create_app(api),
                log_config=None,
                access_log=False,
                http=cast(Any, protocol),
                loop="uvloop",
                lifespan="on",
                timeout_graceful_shutdown=int(api.settings.drain_seconds) + UNWILLING_SECONDS,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start and print the address."""
        await super().startup(sockets)
        if self.started:
            for each in sockets or []:
                print(f"listening on {address_of(each)}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish running requests, or end them with an error when the time is over; then settle all of them."""
        drain = asyncio.create_task(self.api.drain())
        await super().shutdown(sockets)
        await drain


def listen(host: str, port: int) -> socket.socket:
    """Open the socket before anything that takes long; connections wait until the server is ready. Raises
    ConfigError."""
    if not 0 <= port <= 65_535:
        raise ConfigError(f"cannot listen on --port {port}; use 1 to 65535, or 0 for a free port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on --host {host} --port {port}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} of {host} is in use; stop the other server, or use --port 0") from error
        raise ConfigError(f"cannot listen on --host {host} --port {port}: {error.strerror or error}") from error
    return listener


def address_of(listener: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def log_requests(as_json: bool) -> None:
    """Log every line as JSON with one line per request, or none for requests."""
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    requests_log.setLevel(logging.INFO if as_json else logging.WARNING)
    if as_json:
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonFormatter())


def open_accounts(data: Path | None, database: str, prices: Path | None) -> Accounts:
    """Open the accounts, and create or update their database. Raises ConfigError."""
    folder = data or data_folder()
    opened = Database(database or sqlite_url(folder))
    return Accounts(opened, None if prices is None else PriceTable.read(prices))


def check_prices(accounts: Accounts, config: ServeConfig) -> None:
    """Raise ConfigError if a model has no price now."""
    now = datetime.datetime.now(datetime.UTC)
    for name, model in config.models.items():
        if accounts.prices is not None:
            accounts.prices.price(model.price or name, now)


def first_key(accounts: Accounts, no_keys: bool) -> Principal | None:
    """At the first start create the administrator, who has no limits, and a key, which is printed once. Returns the
    administrator for a server without keys, else None."""
    names = [user["name"] for user in accounts.list_users()]
    if not names or (no_keys and ADMIN not in names):
        accounts.change_user(accounts.add_user(ADMIN, is_admin=True), **dict.fromkeys(LIMITS, 0))
    if no_keys:
        if NO_KEYS not in _key_ids(accounts):
            accounts.add_key(accounts.user_id(ADMIN), NO_KEYS)
        return accounts.principal(_key_ids(accounts)[NO_KEYS])
    if not names:
        key = accounts.add_key(accounts.user_id(ADMIN), "first")
        print(f"the first API key, on the page the password of {ADMIN}, which is shown only now: {key}", flush=True)
    return None


def _key_ids(accounts: Accounts) -> dict[str, int]:
    """The ids of the administrator's keys that are not revoked, by name."""
    rows = accounts.list_keys()
    return {row["name"]: row["id"] for row in rows if row["user_name"] == ADMIN and row["revoked_ms"] is None}
