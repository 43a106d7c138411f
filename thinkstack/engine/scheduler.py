"""Who computes what in the next step: admission by memory, chunks of prompts beside decoding, preemption.

Everything goes by one order: priority, then arrival. A sequence that needs a block when none is left takes those of the
last one in that order, which computes its tokens again later; so the first one always gets to its end. Blocks are found
by content: what any sequence has computed, or computes in this very step, is not computed again.
"""

import bisect
import heapq
from dataclasses import dataclass

import numpy

from thinkstack.engine.block_pool import BLOCK, BlockPool, Content, root_name
from thinkstack.engine.sequence_table import Request, SequenceTable, Waiting
from thinkstack.types import RequestError

ROWS_PER_SPARE_BLOCK = 8
"""Nobody is admitted unless a block stays free for every so many running rows: they will need it soon."""


@dataclass(frozen=True)
class Plan:
    """The tokens of one step."""

    rows: numpy.ndarray
    """Rows that compute something, those with one token first."""
    counts: numpy.ndarray
    """Tokens of each, drafts included."""
    starts: numpy.ndarray
    """The first of them, which is not in the cache."""


class Scheduler:
    """The queue, the running rows and the blocks they hold."""

    def __init__(self, table: SequenceTable, pool: BlockPool, max_prefill_tokens: int, max_waiting: int = 0):
        """max_waiting: requests that may wait; 0 for any number."""
        self.table, self.pool = table, pool
        self.max_prefill_tokens, self.max_waiting = max_prefill_tokens, max_waiting
        self.queue: list[tuple[tuple[int, int, int], Waiting]] = []  # a heap
        self.waiting = 0
        """Entries of the queue whose request was not aborted."""
        self.running: list[int] = []
        """Rows in use, in order."""
        self.version = 0
        self.preemptions = 0
        self.preempted = False
        """Whether the last plan sent somebody back."""
        self.holds_back = False
        """Admit nobody: the engine drains."""

    def add(self, request: Request) -> None:
        """Queue a new request. Raises RequestError if too many wait."""
        if self.max_waiting and self.waiting >= self.max_waiting:
            raise RequestError(f"{self.waiting:,} requests wait already; ask again later, or raise max_waiting")
        self._push(Waiting(request, tuple(range(request.sampling.n))))

    def plan(self) -> Plan:
        """Choose the tokens of the next step, hold blocks for them, admit whom there is room for."""
        counts: dict[int, int] = {}
        budget, self.preempted = self.max_prefill_tokens, False
        table = self.table
        rows = numpy.array(self.running, dtype=numpy.int64)
        computed = table.computed[rows]
        place = computed % BLOCK
        is_easy = (table.known[rows] == computed + 1) & (place != 0)
        is_easy &= place + table.drafts[rows] < BLOCK  # in the block it has
        for row in rows[~is_easy].tolist():
            if table.owner[row] is None or table.follows[row]:
                continue  # preempted above, or computes nothing itself
            counts[row] = self._chunk(row, budget)
            budget -= counts[row] if table.known[row] - table.computed[row] > 1 else 0
        while self.queue and budget > 0 and not self.preempted and not self.holds_back:
            row = self._admit(budget)
            if row is None:
                break
            counts[row] = self._chunk(row, budget)
            budget -= counts[row]
        chunks = [(row, count) for row, count in counts.items() if count and table.owner[row] is not None]
        chunks.sort(key=lambda each: each[1] > 1)
        easy = rows[is_easy]
        if self.preempted:
            easy = numpy.array([row for row in easy.tolist() if table.owner[row] is not None], dtype=numpy.int64)
        for row in easy[table.known[easy] % BLOCK == 0].tolist():
            self.name_blocks(row, int(table.known[row]))
        chosen, counts_of = easy, numpy.ones(len(easy), dtype=numpy.int64)
        if chunks:
            more, counts_of_more = numpy.array(chunks, dtype=numpy.int64).T
            chosen, counts_of = numpy.append(chosen, more), numpy.append(counts_of, counts_of_more)
        return Plan(chosen, counts_of + table.drafts[chosen], table.computed[chosen])

    def _chunk(self, row: int, budget: int) -> int:
        """Tokens that a row computes now, at most `budget` of a prompt; holds their blocks, or 0 if it has to wait."""
        table = self.table
        self._reuse(row)
        start, pending = int(table.computed[row]), int(table.known[row] - table.computed[row])
        count = pending if pending == 1 else min(pending, budget)
        while count > 0:
            missing = -(-(start + count + int(table.drafts[row])) // BLOCK) - len(table.blocks[row])
            if missing <= self.pool.available:
                break
            if table.drafts[row]:
                table.drafts[row] = 0  # nobody is sent away for a guess
            elif not self._preempt_after(row):
                count = (len(table.blocks[row]) + self.pool.available) * BLOCK - start
        if count <= 0:
            if count < 0 or (pending > 0 and budget > 0):
                self._preempt(row)
            return 0
        table.hold(row, self.pool.take(max(missing, 0)))
        self.name_blocks(row, start + count)
        return count

    def _reuse(self, row: int) -> None:
        """Take over blocks that hold what the row would compute next; its last token is always computed."""
        table = self.table
        while table.computed[row] == len(table.blocks[row]) * BLOCK and table.known[row] - table.computed[row] > 1:
            start = int(table.computed[row])
            content = Content(table.names[row][-1], table.ids[row, start : start + BLOCK].tobytes())
            block = self.pool.find(content) if start + BLOCK <= table.known[row] else None
            if block is None:
                return
            self.pool.share([block])
            table.hold(row, [block])
            table.names[row].append(content.name)
            table.computed[row] = min(start + BLOCK, int(table.known[row]) - 1)

    def name_blocks(self, row: int, end: int) -> None:
        """Make the row's blocks findable that are full once `end` tokens are computed."""
        table = self.table
        for place in range(len(table.names[row]) - 1, end // BLOCK):
            tokens = table.ids[row, place * BLOCK : (place + 1) * BLOCK].tobytes()
            table.names[row].append(self.pool.name(table.blocks[row][place], Content(table.names[row][-1], tokens)))

    def _admit(self, budget: int) -> int | None:
        """Open rows for the first of the queue; returns the one that computes the prompt, None if it has to wait."""
        table = self.table
        while self.queue and self.queue[0][1] not in self.queue[0][1].request.queued:
            heapq.heappop(self.queue)  # aborted
        if not self.queue:
            return None
        waiting = self.queue[0][1]
        request, answers = waiting.request, waiting.answers
        chunk = min(len(request.prompt_token_ids) + len(waiting.drawn), budget)
        room = -(-chunk // BLOCK) + len(self.running) // ROWS_PER_SPARE_BLOCK
        if len(answers) > len(table.free) or self.pool.available < room:
            return None
        heapq.heappop(self.queue)
        self.waiting -= 1
        request.queued.remove(waiting)
        first, *others = (
            table.open(waiting, answer, root_name(self.version, request.cache_salt)) for answer in answers
        )
        table.followers[first] = others
        table.follows[others] = True
        for row in (first, *others):
            bisect.insort(self.running, row, key=table.key)
        self._reuse(first)
        if not waiting.drawn:
            request.weights_version = self.version
            request.cached_tokens = int(table.computed[first]) // BLOCK * BLOCK
        return first

    def fork(self, row: int) -> list[int]:
        """Start the followers of a row whose prompt is computed. Returns the rows that did, each holding the shared
        blocks and one of its own for the copy of a half-full last one; without a block left, one waits again."""
        table, started = self.table, []
        prompt = int(table.prompt[row])
        shared, rest = divmod(prompt, BLOCK)
        for follower in table.followers[row]:
            if rest and not self.pool.available:
                self._preempt(follower)
                continue
            own = self.pool.take(1) if rest else []
            self.pool.share(table.blocks[row][:shared])
            table.hold(follower, table.blocks[row][:shared] + own)
            table.names[follower] = list(table.names[row])
            table.computed[follower] = prompt
            table.follows[follower] = False
            started.append(follower)
        table.followers[row] = []
        return started

    def _preempt_after(self, row: int) -> bool:
        """Take the blocks of the last row in order that holds some, if that is not `row` or one before it."""
        table = self.table
        for last in reversed(self.running):
            if last == row:
                return False
            if table.blocks[last]:
                self._preempt(last)
                return True
        return False

    def _preempt(self, row: int) -> None:
        """Send a row, and those that wait for its prompt, back to the queue."""
        table = self.table
        request, answer = table.held(row)
        followers = table.followers[row]
        answers = (answer, *(table.held(other)[1] for other in followers))
        self._push(Waiting(request, answers, *table.drawn(row)))
        self.preempted = True
        self.preemptions += 1
        for each in (*followers, row):
            self.close(each)

    def close(self, row: int) -> None:
        """Free a row and let go of its blocks."""
        self.running.remove(row)
        self.pool.release(self.table.blocks[row])
        self.table.clear(row)

    def _push(self, waiting: Waiting) -> None:
        heapq.heappush(self.queue, (waiting.key, waiting))
        self.waiting += 1
        waiting.request.queued.append(waiting)

    def forget_waiting(self, request: Request) -> list[Waiting]:
        """What an aborted request has in the queue; it leaves the queue when its turn comes, or much has gathered."""
        found, request.queued = request.queued, []
        self.waiting -= len(found)
        if len(self.queue) > 2 * self.waiting + 64:
            self.queue = [each for each in self.queue if each[1] in each[1].request.queued]
            heapq.heapify(self.queue)
        return found

    def preempt_all(self) -> None:
        """Send everybody back to the queue."""
        for row in reversed(list(self.running)):
            if self.table.owner[row] is not None and not self.table.follows[row]:
                self._preempt(row)  # and its followers

    def check(self) -> None:
        """Raise AssertionError if blocks and rows do not add up."""
        self.pool.check()
        held = numpy.zeros_like(self.pool.holders)
        for row in self.running:
            numpy.add.at(held, self.table.blocks[row], 1)
            assert len(self.table.blocks[row]) * BLOCK >= self.table.computed[row]
        assert (held == self.pool.holders).all(), "a block is held by nobody's row"
        assert len(self.running) + len(self.table.free) == len(self.table.owner)
        assert self.waiting == sum(each in each.request.queued for _, each in self.queue)
