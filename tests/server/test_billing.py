"""The ledger beside the event loop."""

import asyncio
import time

from tests.server.billing import COST, PRICES, add_customer, ask
from thinkstack.server.accounts import Accounts
from thinkstack.server.billing import Billing, Charge
from thinkstack.server.database import Database, sqlite_url
from thinkstack.server.errors import InsufficientBalance
from thinkstack.server.prices import FREE, Usage, format_amount


def test_a_request_whose_reservation_is_lost_ends_without_a_settlement(tmp_path):
    """`note` gives up such a request; its stream still settles at its end, when nothing else is being written."""
    accounts = Accounts(Database(sqlite_url(tmp_path)))

    async def main() -> None:
        billing = Billing(accounts)
        async with billing.running():
            await asyncio.wait_for(billing.settle(Charge("lost", FREE, Usage, lambda: None), "stop"), 5)

    asyncio.run(main())
    assert accounts.usage("user") == []


def open_customer(tmp_path, num_requests):
    """Accounts with a customer whose balance is enough for so many requests."""
    accounts = Accounts(Database(sqlite_url(tmp_path)), PRICES)
    return accounts, add_customer(accounts, topped_up=format_amount(COST * num_requests))


def admit(billing, customer, request_id):
    return billing.admit(customer, ask(request_id), Usage, lambda: None)


def test_requests_that_arrive_together_are_admitted_as_far_as_the_balance_goes(tmp_path):
    """In one transaction, or one by one after a refusal."""
    accounts, customer = open_customer(tmp_path, 10)

    async def main(count: int, name: str) -> int:
        billing = Billing(accounts)
        async with billing.running():
            asked = (admit(billing, customer, f"{name}{number}") for number in range(count))
            found = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(each, Charge | InsufficientBalance) for each in found)
        return sum(isinstance(each, Charge) for each in found)

    assert asyncio.run(main(8, "few")) == 8
    assert asyncio.run(main(30, "many")) == 10
    assert accounts.balance(customer.user_id).reserved_pico == 0


def test_a_client_that_leaves_during_its_admission_leaves_no_reservation(tmp_path):
    """While the transaction is written, and between its end and the request's."""
    accounts, customer = open_customer(tmp_path, 100)

    class Leaving(Billing):
        task: asyncio.Task

        async def call(self, function, *arguments):
            if function == accounts.reserve_all and self.at == "before":
                self.task.cancel()
            found = await super().call(function, *arguments)
            if function == accounts.reserve_all and self.at == "after":
                asyncio.get_running_loop().call_soon(self.task.cancel)
            return found

    async def main(at: str) -> None:
        billing = Leaving(accounts)
        billing.at = at
        async with billing.running():
            billing.task = asyncio.create_task(admit(billing, customer, at))
            await asyncio.gather(billing.task, return_exceptions=True)
            assert billing.task.cancelled()

    asyncio.run(main("before"))
    asyncio.run(main("after"))
    assert accounts.balance(customer.user_id).reserved_pico == 0


def test_a_settlement_waits_for_its_own_transaction_and_not_for_the_next_ones(tmp_path):
    accounts, customer = open_customer(tmp_path, 1000)

    async def main() -> float:
        billing = Billing(accounts)
        async with billing.running():
            charges = [await admit(billing, customer, f"request {number}") for number in range(60)]

            async def go_on() -> None:
                for charge in charges[1:]:
                    billing.settle_soon(charge, "stop")
                    await asyncio.sleep(0.005)

            others = asyncio.create_task(go_on())
            began = time.monotonic()
            await billing.settle(charges[0], "stop")
            waited = time.monotonic() - began
            assert not others.done()
            await others
        return waited

    assert asyncio.run(main()) < 0.15
