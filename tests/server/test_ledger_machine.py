"""Any order of calls by two processes keeps the books of a plain model in Python."""

import contextlib
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sqlalchemy import func, select

from tests.server.billing import PRICES, add_customer, ask, end, usage
from tests.server.conftest import Clock
from thinkstack.server.accounts import LAPSE_SECONDS, Accounts
from thinkstack.server.database import Database, deposits, ledger, reservations, sqlite_url, users
from thinkstack.server.errors import InsufficientBalance, RateLimited
from thinkstack.server.limits import Limits

LIMITS = Limits(requests_per_minute=0, tokens_per_minute=0, concurrency=4, deep_think_per_day=0)
PRICE = {"hit": 70_000, "miss": 270_000, "output": 1_100_000}
TOKENS = st.integers(0, 100)


class Books(RuleBasedStateMachine):
    """The model: balances, reservations and charges of two users in dicts."""

    def __init__(self):
        super().__init__()
        self.exit = contextlib.ExitStack()
        folder = Path(self.exit.enter_context(tempfile.TemporaryDirectory()))
        self.database = self.exit.enter_context(contextlib.closing(Database(sqlite_url(folder))))
        self.clock = Clock(1740830400.0)
        self.processes = [Accounts(self.database, PRICES, LIMITS, clock=self.clock) for _ in range(2)]
        self.users = [add_customer(self.processes[0], name=name) for name in ("ann", "bob")]
        self.granted, self.topped_up = [0, 0], [0, 0]
        self.deposited, self.charged = [0, 0], [0, 0]
        self.open = {}  # request id -> [user, process, reserved, noted cost]
        self.closed = set()
        self.beats = [None, None]
        self.count = 0

    def teardown(self):
        self.exit.close()

    @rule(user=st.integers(0, 1), pico=st.integers(0, 400_000_000), is_grant=st.booleans())
    def deposit(self, user, pico, is_grant):
        self.processes[0].deposit(self.users[user].user_id, pico, "granted" if is_grant else "topped_up")
        (self.granted if is_grant else self.topped_up)[user] += pico
        self.deposited[user] += pico

    @rule(user=st.integers(0, 1), process=st.integers(0, 1), prompt=TOKENS, completion=TOKENS)
    def reserve(self, user, process, prompt, completion):
        self.count += 1
        request_id = f"r{self.count}"
        cost = prompt * PRICE["miss"] + completion * PRICE["output"]
        mine = [reserved for owner, _, reserved, _ in self.open.values() if owner == user]
        if self.granted[user] + self.topped_up[user] - sum(mine) < cost:
            expected = InsufficientBalance
        else:
            expected = RateLimited if len(mine) >= LIMITS.concurrency else None
        try:
            self.processes[process].reserve(self.users[user], ask(request_id, prompt, completion))
            assert expected is None
        except (InsufficientBalance, RateLimited) as error:
            assert type(error) is expected
        else:
            self.open[request_id] = [user, process, cost, 0]
            self.beats[process] = self.clock.seconds

    @precondition(lambda self: self.open)
    @rule(data=st.data(), hit=TOKENS, miss=TOKENS, completion=TOKENS)
    def note(self, data, hit, miss, completion):
        request_id = data.draw(st.sampled_from(sorted(self.open)))
        process = self.open[request_id][1]
        lost = self.processes[process].note({request_id: usage(hit, miss, completion), "gone": usage()})
        assert lost == ["gone"]
        self.open[request_id][3] = hit * PRICE["hit"] + miss * PRICE["miss"] + completion * PRICE["output"]
        self.beats[process] = self.clock.seconds

    @precondition(lambda self: self.open)
    @rule(data=st.data(), miss=TOKENS, completion=TOKENS, times=st.integers(1, 2))
    def settle(self, data, miss, completion, times):
        ids = data.draw(st.lists(st.sampled_from(sorted(self.open)), min_size=1, unique=True))
        for repeated in range(times):
            settled = self.processes[0].settle([end(request_id, 0, miss, completion) for request_id in ids])
            assert settled == (0 if repeated else len(ids))
        for request_id in ids:
            self.charge(request_id, miss * PRICE["miss"] + completion * PRICE["output"])

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def release(self, data):
        request_id = data.draw(st.sampled_from(sorted(self.open)))
        assert self.processes[1].release([request_id, "gone", *self.closed]) == 1
        self.charge(request_id, self.open[request_id][3])

    @rule(seconds=st.integers(1, 20))
    def wait(self, seconds):
        self.clock.seconds += seconds

    @rule(process=st.integers(0, 1))
    def lapse(self, process):
        oldest = self.clock.seconds - LAPSE_SECONDS
        lapsed = [id_ for id_, (_, owner, _, _) in self.open.items() if self.beats[owner] < oldest]
        assert self.processes[process].sweep() == len(lapsed)
        for request_id in lapsed:
            self.charge(request_id, self.open[request_id][3])

    def charge(self, request_id, cost):
        user, _, reserved, _ = self.open.pop(request_id)
        self.closed.add(request_id)
        cost = min(cost, reserved)
        from_grant = min(cost, self.granted[user])
        self.granted[user] -= from_grant
        self.topped_up[user] -= cost - from_grant
        self.charged[user] += cost

    @invariant()
    def the_books_agree(self):
        with self.database.read() as connection:
            found = connection.execute(select(users).order_by(users.c.id)).mappings().all()
            for user, row in enumerate(found):
                reserved = sum(entry[2] for entry in self.open.values() if entry[0] == user)
                assert (row["granted_pico"], row["topped_up_pico"]) == (self.granted[user], self.topped_up[user])
                assert row["reserved_pico"] == reserved <= row["granted_pico"] + row["topped_up_pico"]
                sums = [
                    connection.scalar(
                        select(func.coalesce(func.sum(column), 0)).where(column.table.c.user_id == row["id"])
                    )
                    for column in (deposits.c.amount_pico, ledger.c.cost_pico)
                ]
                assert sums == [self.deposited[user], self.charged[user]]
                assert sums[0] - sums[1] == self.granted[user] + self.topped_up[user]
            assert set(connection.scalars(select(reservations.c.request_id))) == set(self.open)
            assert set(connection.scalars(select(ledger.c.request_id))) == self.closed


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
