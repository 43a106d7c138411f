"""The ledger beside the event loop: admission, what running requests have delivered, and their settlement."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from thinkstack.server.accounts import Accounts
from thinkstack.server.errors import DatabaseUnavailable
from thinkstack.server.keys import Principal
from thinkstack.server.ledger import Admission, Settlement
from thinkstack.server.prices import Price, Usage

log = logging.getLogger(__name__)
T = TypeVar("T")
NOTE_SECONDS = 1.0
"""How often delivered tokens are noted: a crash charges at most what was noted."""
SWEEP_SECONDS = 5.0
"""How often the reservations of dead processes are looked for."""
NUM_THREADS = 2
RETRY_SECONDS = 0.2
"""Wait after a settlement that failed because the database was unavailable."""


class Charge:
    """The reservation of one running request."""

    def __init__(self, request_id: str, price: Price, usage: Callable[[], Usage], end: Callable[[], None]):
        """usage: what was delivered so far. end: called if the reservation is lost, so that the request cannot be
        charged any more."""
        self.request_id, self.price, self.usage, self.end = request_id, price, usage, end


class Billing:
    """Calls `Accounts` in threads. Requests that arrive together are admitted in one transaction; ends likewise."""

    def __init__(self, accounts: Accounts):
        self.accounts = accounts
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="accounts")
        self._charges: dict[str, Charge] = {}
        self._arrivals: list[tuple[Principal, Admission, asyncio.Future[Price]]] = []
        self._admitter: asyncio.Task[None] | None = None
        self._ends: list[tuple[Settlement, asyncio.Future[None]]] = []
        """Settlements to write, each with what is done when it is written."""
        self._flusher: asyncio.Task[None] | None = None

    async def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a method of `Accounts` in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Note deliveries and sweep while the server runs; settle everything at the end."""
        tasks = [
            asyncio.create_task(_repeat(self._note, NOTE_SECONDS)),
            asyncio.create_task(_repeat(self._sweep, SWEEP_SECONDS)),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for charge in list(self._charges.values()):
                self.settle_soon(charge, "abort")
            while pending := [task for task in (self._admitter, self._flusher) if task is not None]:
                await asyncio.gather(*pending)
            self._threads.shutdown()

    async def admit(
        self, principal: Principal, admission: Admission, usage: Callable[[], Usage], end: Callable[[], None]
    ) -> Charge:
        """Reserve the largest cost of a request; the functions are those of `Charge`. Raises like
        `Accounts.reserve`."""
        admitted = asyncio.get_running_loop().create_future()
        self._arrivals.append((principal, admission, admitted))
        if self._admitter is None:
            self._admitter = asyncio.create_task(self._admit())
        try:
            price = await admitted
        except asyncio.CancelledError:
            if not admitted.cancelled() and admitted.exception() is None:  # the client left after the admission
                self._release(admission)
            raise
        charge = self._charges[admission.request_id] = Charge(admission.request_id, price, usage, end)
        return charge

    async def _admit(self) -> None:
        """Reserve for all who wait, and for those who arrive meanwhile."""
        try:
            while self._arrivals:
                arrivals, self._arrivals = self._arrivals, []
                try:
                    found = await self.call(self.accounts.reserve_all, [arrival[:2] for arrival in arrivals])
                except Exception as error:
                    found = [error] * len(arrivals)
                    for _, admission, _ in arrivals:  # which may have been written if the end of the commit is unknown
                        self._release(admission)
                for (_, admission, admitted), price in zip(arrivals, found, strict=True):
                    if isinstance(price, Exception):
                        if not admitted.done():
                            admitted.set_exception(price)
                    elif admitted.done():  # the client has left
                        self._release(admission)
                    else:
                        admitted.set_result(price)
        finally:
            self._admitter = None

    async def settle(self, charge: Charge, status: str) -> None:
        """Charge what was delivered; `settle_soon`, then wait until it is written, or for RETRY_SECONDS."""
        written = self.settle_soon(charge, status)
        if written is not None:
            await asyncio.wait([written], timeout=RETRY_SECONDS)

    def settle_soon(self, charge: Charge, status: str) -> "asyncio.Future[None] | None":
        """Charge what was delivered, once, in the background; returns what is done when it is written."""
        if self._charges.pop(charge.request_id, None) is None:
            return None
        return self._settle(Settlement(request_id=charge.request_id, usage=charge.usage(), status=status))

    def _release(self, admission: Admission) -> None:
        """Free the reservation of a request that has delivered nothing."""
        self._settle(Settlement(request_id=admission.request_id, usage=Usage(), status="abort"))

    def _settle(self, end: Settlement) -> "asyncio.Future[None]":
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._ends.append((end, written))
        if self._flusher is None:
            self._flusher = asyncio.create_task(self._flush())
        return written

    async def _flush(self) -> None:
        """Write the settlements, again and again until the database takes them."""
        try:
            while self._ends:
                ends = list(self._ends)
                try:
                    await self.call(self.accounts.settle, [end for end, _ in ends])
                except DatabaseUnavailable as error:
                    log.warning("%d settlements wait for the database: %s", len(ends), error)
                    await asyncio.sleep(RETRY_SECONDS)
                else:
                    del self._ends[: len(ends)]
                    for _, written in ends:
                        written.set_result(None)
        finally:
            self._flusher = None

    async def _note(self) -> None:
        usages = {charge.request_id: charge.usage() for charge in self._charges.values()}
        for request_id in await self.call(self.accounts.note, usages):
            if request_id in self._charges:
                log.error("the reservation of %s is lost; the request ends", request_id)
                self._charges.pop(request_id).end()

    async def _sweep(self) -> None:
        if count := await self.call(self.accounts.sweep):
            log.warning("settled %d requests of a process that died", count)


async def _repeat(work: Callable[[], Any], seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except DatabaseUnavailable as error:
            log.warning("%s", error)
