"""Who computes what in the next step: admission by memory, chunks of prompts beside decoding, preemption.

Everything goes by one order: priority, then arrival. A sequence that needs a block when none is left takes those of the
last one in that order, which computes its tokens again later; so the first one always gets to its end. Blocks are found
by content: what any sequence has computed, or computes in this very step, is not computed again.
"""

import bisect
import heapq
from dataclasses import dataclass

import numpy

from thinkstack.engine.block_pool import BLOCK, BlockPool, BlockTokens, root_hash
from thinkstack.engine.sequence_table import Request, SequenceTable, Waiting
from thinkstack.types import RequestError

ROWS_PER_SPARE_BLOCK = 8
"""Nobody is admitted unless a block stays free for every so many running rows: they will need it soon."""


@dataclass(frozen=True)
class SchedulerOutput:
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
        self.num_waiting = 0
        """Entries of the queue whose request was not aborted."""
        self.running: list[int] = []
        """Rows in use, in order."""
        self.version = 0
        self.num_preemptions = 0
        self.has_preempted = False
        """Whether the last plan sent somebody back."""
        self.is_draining = False
        """Admit nobody: the engine drains."""

    def add(self, request: Request) -> None:
        """Queue a new request. Raises RequestError if too many wait."""
        if self.max_waiting and self.num_waiting >= self.max_waiting:
            raise RequestError(f"{self.num_waiting:,} requests wait already; ask again later, or raise max_waiting")
        self._push(Waiting(request, tuple(range(request.sampling.n))))

    def schedule(self) -> SchedulerOutput:
        """Choose the tokens of the next step, hold blocks for them, admit whom there is room for."""
        counts: dict[int, int] = {}
        budget, self.has_preempted = self.max_prefill_tokens, False
        table = self.table
        rows = numpy.array(self.running, dtype=numpy.int64)
        num_computed_tokens = table.num_computed_tokens[rows]
        place = num_computed_tokens % BLOCK
        is_easy = (table.num_tokens[rows] == num_computed_tokens + 1) & (place != 0)
        is_easy &= place + table.num_draft_tokens[rows] < BLOCK  # in the block it has
        for row in rows[~is_easy].tolist():
            if table.requests[row] is None or table.awaits_prompt[row]:
                continue  # preempted above, or computes nothing itself
            counts[row] = self._chunk(row, budget)
            budget -= counts[row] if table.num_tokens[row] - table.num_computed_tokens[row] > 1 else 0
        while self.queue and budget > 0 and not self.has_preempted and not self.is_draining:
            row = self._admit(budget)
            if row is None:
                break
            counts[row] = self._chunk(row, budget)
            budget -= counts[row]
        chunks = [(row, count) for row, count in counts.items() if count and table.requests[row] is not None]
        chunks.sort(key=lambda each: each[1] > 1)
        easy = rows[is_easy]
        if self.has_preempted:
            easy = numpy.array([row for row in easy.tolist() if table.requests[row] is not None], dtype=numpy.int64)
        for row in easy[table.num_tokens[easy] % BLOCK == 0].tolist():
            self.cache_full_blocks(row, int(table.num_tokens[row]))
        chosen, counts_of = easy, numpy.ones(len(easy), dtype=numpy.int64)
        if chunks:
            more, counts_of_more = numpy.array(chunks, dtype=numpy.int64).T
            chosen, counts_of = numpy.append(chosen, more), numpy.append(counts_of, counts_of_more)
        return SchedulerOutput(chosen, counts_of + table.num_draft_tokens[chosen], table.num_computed_tokens[chosen])

    def _chunk(self, row: int, budget: int) -> int:
        """Tokens that a row computes now, at most `budget` of a prompt; holds their blocks, or 0 if it has to wait."""
        table = self.table
        self._take_cached_blocks(row)
        start, pending = (
            int(table.num_computed_tokens[row]),
            int(table.num_tokens[row] - table.num_computed_tokens[row]),
        )
        count = pending if pending == 1 else min(pending, budget)
        while count > 0:
            missing = -(-(start + count + int(table.num_draft_tokens[row])) // BLOCK) - len(table.blocks[row])
            if missing <= self.pool.num_free_blocks:
                break
            if table.num_draft_tokens[row]:
                table.num_draft_tokens[row] = 0  # nobody is sent away for a guess
            elif not self._preempt_after(row):
                count = (len(table.blocks[row]) + self.pool.num_free_blocks) * BLOCK - start
        if count <= 0:
            if count < 0 or (pending > 0 and budget > 0):
                self._preempt(row)
            return 0
        table.append_blocks(row, self.pool.allocate(max(missing, 0)))
        self.cache_full_blocks(row, start + count)
        return count

    def _take_cached_blocks(self, row: int) -> None:
        """Take over blocks that hold what the row would compute next; its last token is always computed."""
        table = self.table
        while (
            table.num_computed_tokens[row] == len(table.blocks[row]) * BLOCK
            and table.num_tokens[row] - table.num_computed_tokens[row] > 1
        ):
            start = int(table.num_computed_tokens[row])
            content = BlockTokens(table.block_hashes[row][-1], table.ids[row, start : start + BLOCK].tobytes())
            block = self.pool.find_cached(content) if start + BLOCK <= table.num_tokens[row] else None
            if block is None:
                return
            self.pool.add_reference([block])
            table.append_blocks(row, [block])
            table.block_hashes[row].append(content.block_hash)
            table.num_computed_tokens[row] = min(start + BLOCK, int(table.num_tokens[row]) - 1)

    def cache_full_blocks(self, row: int, end: int) -> None:
        """Make the row's blocks findable that are full once `end` tokens are computed."""
        table = self.table
        for place in range(len(table.block_hashes[row]) - 1, end // BLOCK):
            tokens = table.ids[row, place * BLOCK : (place + 1) * BLOCK].tobytes()
            table.block_hashes[row].append(
                self.pool.cache_block(table.blocks[row][place], BlockTokens(table.block_hashes[row][-1], tokens))
            )

    def _admit(self, budget: int) -> int | None:
        """Open rows for the first of the queue; returns the one that computes the prompt, None if it has to wait."""
        table = self.table
        while self.queue and self.queue[0][1] not in self.queue[0][1].request.queue_entries:
            heapq.heappop(self.queue)  # aborted
        if not self.queue:
            return None
        waiting = self.queue[0][1]
        request, indices = waiting.request, waiting.indices
        chunk = min(len(request.prompt_token_ids) + len(waiting.output_token_ids), budget)
        room = -(-chunk // BLOCK) + len(self.running) // ROWS_PER_SPARE_BLOCK
        if len(indices) > len(table.free_rows) or self.pool.num_free_blocks < room:
            return None
        heapq.heappop(self.queue)
        self.num_waiting -= 1
        request.queue_entries.remove(waiting)
        first, *others = (
            table.assign_row(waiting, index, root_hash(self.version, request.cache_salt)) for index in indices
        )
        table.sibling_rows[first] = others
        table.awaits_prompt[others] = True
        for row in (first, *others):
            bisect.insort(self.running, row, key=table.key)
        self._take_cached_blocks(first)
        if not waiting.output_token_ids:
            request.weights_version = self.version
            request.num_cached_tokens = int(table.num_computed_tokens[first]) // BLOCK * BLOCK
        return first

    def fork(self, row: int) -> list[int]:
        """Start the followers of a row whose prompt is computed. Returns the rows that did, each holding the shared
        blocks and one of its own for the copy of a half-full last one; without a block left, one waits again."""
        table, started = self.table, []
        prompt = int(table.num_prompt_tokens[row])
        shared, rest = divmod(prompt, BLOCK)
        for follower in table.sibling_rows[row]:
            if rest and not self.pool.num_free_blocks:
                self._preempt(follower)
                continue
            own = self.pool.allocate(1) if rest else []
            self.pool.add_reference(table.blocks[row][:shared])
            table.append_blocks(follower, table.blocks[row][:shared] + own)
            table.block_hashes[follower] = list(table.block_hashes[row])
            table.num_computed_tokens[follower] = prompt
            table.awaits_prompt[follower] = False
            started.append(follower)
        table.sibling_rows[row] = []
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
        request, index = table.request_at(row)
        followers = table.sibling_rows[row]
        indices = (index, *(table.request_at(other)[1] for other in followers))
        self._push(Waiting(request, indices, *table.output_of(row)))
        self.has_preempted = True
        self.num_preemptions += 1
        for each in (*followers, row):
            self.close(each)

    def close(self, row: int) -> None:
        """Free a row and let go of its blocks."""
        self.running.remove(row)
        self.pool.free(self.table.blocks[row])
        self.table.clear(row)

    def _push(self, waiting: Waiting) -> None:
        heapq.heappush(self.queue, (waiting.key, waiting))
        self.num_waiting += 1
        waiting.request.queue_entries.append(waiting)

    def forget_waiting(self, request: Request) -> list[Waiting]:
        """What an aborted request has in the queue; it leaves the queue when its turn comes, or much has gathered."""
        found, request.queue_entries = request.queue_entries, []
        self.num_waiting -= len(found)
        if len(self.queue) > 2 * self.num_waiting + 64:
            self.queue = [each for each in self.queue if each[1] in each[1].request.queue_entries]
            heapq.heapify(self.queue)
        return found

    def preempt_all(self) -> None:
        """Send everybody back to the queue."""
        for row in reversed(list(self.running)):
            if self.table.requests[row] is not None and not self.table.awaits_prompt[row]:
                self._preempt(row)  # and its followers

    def check_invariants(self) -> None:
        """Raise AssertionError if blocks and rows do not add up."""
        self.pool.check_invariants()
        held = numpy.zeros_like(self.pool.ref_count)
        for row in self.running:
            numpy.add.at(held, self.table.blocks[row], 1)
            assert len(self.table.blocks[row]) * BLOCK >= self.table.num_computed_tokens[row]
        assert (held == self.pool.ref_count).all(), "a block is held by nobody's row"
        assert len(self.running) + len(self.table.free_rows) == len(self.table.requests)
        assert self.num_waiting == sum(each in each.request.queue_entries for _, each in self.queue)
