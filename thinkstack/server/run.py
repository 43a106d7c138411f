"""Start a server: accounts, models, and the address it listens on."""

import ipaddress
import logging
import time
from pathlib import Path

import torch
import uvicorn

from thinkstack.engine.block_pool import BLOCK_SIZE
from thinkstack.machine import prepare_machine
from thinkstack.server.accounts import Accounts
from thinkstack.server.app import Server, ServerSettings, create_app
from thinkstack.server.database import Database, data_folder, sqlite_url
from thinkstack.server.keys import Principal
from thinkstack.server.prices import PriceTable
from thinkstack.server.served import Member, ServeConfig, ServedModels, load_member
from thinkstack.types import ConfigError

log = logging.getLogger(__name__)
ADMIN = "admin"
"""The user that the first start creates, and who sends the requests of a server without keys."""


def run_server(
    config: ServeConfig,
    host: str,
    port: int,
    data: Path | None = None,
    database: str = "",
    prices: Path | None = None,
    no_keys: bool = False,
) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises ConfigError."""
    if no_keys and not is_loopback(host):
        raise ConfigError(f"--no-keys with --host {host} would answer everybody; use keys, or --host 127.0.0.1")
    prepare_machine()
    accounts = open_accounts(data, database, prices)
    principal = first_key(accounts, no_keys)
    began = time.monotonic()
    members = {}
    for name, member in config.members.items():
        members[name] = load_member(member)
        log.info("%s", describe(name, members[name], time.monotonic() - began))
    server = Server(ServedModels(members, config.models), accounts, ServerSettings(), principal)
    log.info("models: %s", ", ".join(config.models))
    log.info("listening on http://%s:%d", host, port)
    uvicorn.run(create_app(server), host=host, port=port, log_level="warning", access_log=False, lifespan="on")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_accounts(data: Path | None, database: str, prices: Path | None) -> Accounts:
    """Open the accounts, and create or update their database. Raises ConfigError."""
    folder = data or data_folder()
    opened = Database(database or sqlite_url(folder))
    return Accounts(opened, None if prices is None else PriceTable.read(prices))


def first_key(accounts: Accounts, no_keys: bool) -> Principal | None:
    """At the first start create the administrator and a key, which is printed once. Returns the administrator for a
    server without keys, else None."""
    is_first = not accounts.list_users()
    user_id = accounts.add_user(ADMIN, is_admin=True) if is_first else accounts.user_id(ADMIN)
    if no_keys:
        return accounts.authenticate(accounts.add_key(user_id, "no-keys"))
    if is_first:
        key = accounts.add_key(user_id, "first")
        print(f"the first API key, which is shown only now: {key}", flush=True)
    return None


def describe(name: str, member: Member, seconds: float) -> str:
    """One line on a member: precision, cache, threads, time to load."""
    config, status = member.config, member.service.status
    return (
        f"{name}: {config.model}, {config.dtype}, quantization {config.quantization}, "
        f"context {member.service.max_model_len:,}, cache {status.num_blocks * BLOCK_SIZE:,} tokens, "
        f"{torch.get_num_threads()} threads, loaded after {seconds:.1f} s"
    )
