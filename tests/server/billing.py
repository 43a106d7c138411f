"""What the tests of the accounts share: prices, a user with a key, and requests."""

from decimal import Decimal

from thinkstack.server.ledger import Admission, Settlement
from thinkstack.server.prices import PriceTable, Usage, parse_amount

V3 = {"input_hit": Decimal("0.07"), "input_miss": Decimal("0.27"), "output": Decimal("1.10")}
PRICES = PriceTable({"currency": "USD", "models": {"deepseek-chat": [V3]}})
COST = 100 * 270_000 + 100 * 1_100_000
"""Largest cost of `ask` with V3's prices: 100 + 100 tokens."""


def add_customer(accounts, granted="0", topped_up="0", name="ann", **values):
    """A user with a key and a balance, as its principal."""
    user_id = accounts.add_user(name)
    accounts.deposit(user_id, parse_amount(granted), "granted")
    accounts.deposit(user_id, parse_amount(topped_up), "topped_up")
    return accounts.authenticate(accounts.add_key(user_id, **values))


def ask(request_id, prompt_tokens=100, max_completion_tokens=100, **values):
    return Admission(
        request_id=request_id,
        model="deepseek-chat",
        prompt_tokens=prompt_tokens,
        max_completion_tokens=max_completion_tokens,
        **values,
    )


def end(request_id, hit=0, miss=0, completion=0, reasoning=0, status="stop"):
    return Settlement(request_id=request_id, usage=usage(hit, miss, completion, reasoning), status=status)


def usage(hit=0, miss=0, completion=0, reasoning=0):
    return Usage(
        prompt_cache_hit_tokens=hit,
        prompt_cache_miss_tokens=miss,
        completion_tokens=completion,
        reasoning_tokens=reasoning,
    )
