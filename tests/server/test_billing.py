"""The ledger beside the event loop."""

import asyncio

from thinkstack.server.accounts import Accounts
from thinkstack.server.billing import Billing, Charge
from thinkstack.server.database import Database, sqlite_url
from thinkstack.server.prices import Usage


def test_a_request_whose_reservation_is_lost_ends_without_a_settlement(tmp_path):
    """`note` gives up such a request; its stream still settles at its end, when nothing else is being written."""
    accounts = Accounts(Database(sqlite_url(tmp_path)))

    async def main() -> None:
        billing = Billing(accounts)
        async with billing.running():
            await asyncio.wait_for(billing.settle(Charge("lost", Usage, lambda: None), "stop"), 5)

    asyncio.run(main())
    assert accounts.usage("user") == []
