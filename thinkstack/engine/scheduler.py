"""Choose the tokens of the next step: admission by free memory, chunked prefill with decoding, preemption.

Sequences are ordered by priority, then by turns of their tenants, then by arrival. A sequence that needs a block when
no block is free preempts the last sequence in that order, which is recomputed later; therefore the first sequence
always finishes. Prefixes are shared: a block that any sequence has computed, or computes in the same step, is not
computed again.
"""

import bisect
import heapq
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy

from thinkstack.engine.block_pool import BLOCK_SIZE, BlockPool, BlockTokens, root_hash
from thinkstack.engine.interface import Overloaded
from thinkstack.engine.sequence_table import MAX_STOP_TOKEN_IDS, Output, QueueEntry, Request, SequenceTable
from thinkstack.types import RequestError

ROWS_PER_SPARE_BLOCK = 8
"""Number of running rows per spare block: a sequence is admitted only if the spare blocks stay free, because running
rows will need them soon."""


class RowsToSample(NamedTuple):
    """The tokens to sample, (N,) int64 each; those of one row are adjacent, with ascending offsets."""

    rows: numpy.ndarray
    offsets: numpy.ndarray
    """Position of the sampled token after the row's num_tokens; above 0 after draft tokens."""
    sources: numpy.ndarray | None
    """Index of the computed token whose hidden state is used; None: all computed tokens in order."""


class BlockCopy(NamedTuple):
    """A copy of the first `num_tokens` tokens of block `source` to block `target`."""

    source: int
    target: int
    num_tokens: int


@dataclass(frozen=True)
class SchedulerOutput:
    """The tokens to compute and to sample in one step."""

    rows: numpy.ndarray
    """Rows of the sequence table that compute tokens; rows with a single token come first."""
    counts: numpy.ndarray
    """Number of tokens of each row, draft tokens included."""
    starts: numpy.ndarray
    """Position of the first token of each row: the first token that is not in the cache."""
    sampled: RowsToSample
    """Rows whose tokens are all computed after this step, with an entry per draft token, and the siblings that start
    from them."""
    copies: list[BlockCopy]
    """Partly filled blocks to copy for siblings after the pass."""


class Scheduler:
    """The queue, the running rows and the blocks of the rows."""

    def __init__(self, table: SequenceTable, pool: BlockPool, max_prefill_tokens: int, max_waiting: int = 0):
        """max_waiting: maximum number of waiting requests; 0: no limit."""
        self.table, self.pool = table, pool
        self.max_prefill_tokens, self.max_waiting = max_prefill_tokens, max_waiting
        self.queue: list[tuple[tuple[int, ...], QueueEntry]] = []  # a heap
        self.turn = 0
        """Round of the request that was admitted last."""
        self._last_turns: dict[str, int] = {}
        """Round of the last request of each tenant."""
        self.num_waiting = 0
        """Number of queue entries whose request is not aborted."""
        self.running: list[int] = []
        """Rows in use, in scheduling order."""
        self.version = 0
        self.num_preemptions = 0
        self.has_preempted = False
        """Whether the last call of `schedule` preempted a row."""
        self.is_draining = False
        """Whether to admit no new sequences, because the engine finishes the running sequences."""

    def add(self, request: Request) -> None:
        """Queue a new request. Raises RequestError if it can never be scheduled, Overloaded if too many requests
        wait."""
        sampling, num_rows = request.sampling, len(self.table.requests)
        total = len(request.prompt_token_ids) + sampling.max_tokens
        if -(-total // BLOCK_SIZE) > self.pool.num_blocks:
            raise RequestError(
                f"prompt and max_tokens={sampling.max_tokens:,} are {total:,} tokens, but the KV cache has "
                f"{self.pool.num_blocks * BLOCK_SIZE:,}; shorten them or raise cache_tokens",
                field="max_tokens",
            )
        if sampling.n > num_rows:
            raise RequestError(f"n={sampling.n} exceeds max_num_seqs={num_rows}; lower n or raise max_num_seqs", "n")
        if (count := len(sampling.stop_token_ids)) > MAX_STOP_TOKEN_IDS:
            raise RequestError(
                f"the request has {count} stop_token_ids; at most {MAX_STOP_TOKEN_IDS} are supported", "stop_token_ids"
            )
        if self.max_waiting and self.num_waiting >= self.max_waiting:
            raise Overloaded(f"{self.num_waiting:,} requests are waiting; retry later, or raise max_waiting")
        request.turn = max(self.turn, self._last_turns.get(request.tenant, -1) + 1)
        self._last_turns[request.tenant] = request.turn
        self._push(QueueEntry(request, tuple(range(request.sampling.n))))

    def schedule(self) -> SchedulerOutput:
        """Choose the tokens of the next step, allocate their blocks, and admit queued sequences that fit."""
        counts: dict[int, int] = {}
        budget, self.has_preempted = self.max_prefill_tokens, False
        table = self.table
        rows = numpy.array(self.running, dtype=numpy.int64)
        num_computed_tokens = table.num_computed_tokens[rows]
        place = num_computed_tokens % BLOCK_SIZE
        is_easy = (table.num_tokens[rows] == num_computed_tokens + 1) & (place != 0)
        is_easy &= place + table.num_draft_tokens[rows] < BLOCK_SIZE  # in the block it has
        for row in rows[~is_easy].tolist():
            if table.requests[row] is None or table.awaits_prompt[row]:
                continue  # preempted in this loop, or waiting for a sibling's prompt
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
        for row in easy[table.num_tokens[easy] % BLOCK_SIZE == 0].tolist():
            self.cache_full_blocks(row, int(table.num_tokens[row]))
        chosen, counts_of = easy, numpy.ones(len(easy), dtype=numpy.int64)
        if chunks:
            more, counts_of_more = numpy.array(chunks, dtype=numpy.int64).T
            chosen, counts_of = numpy.append(chosen, more), numpy.append(counts_of, counts_of_more)
        return self._plan(chosen, counts_of + table.num_draft_tokens[chosen])

    def _plan(self, rows: numpy.ndarray, counts: numpy.ndarray) -> SchedulerOutput:
        """Plan the step for rows that compute `counts` tokens: choose what is sampled, start siblings of completed
        prompts, and advance num_computed_tokens."""
        table = self.table
        starts, num_tokens = table.num_computed_tokens[rows], table.num_tokens[rows]
        reached = numpy.minimum(starts + counts, num_tokens)
        table.num_computed_tokens[rows] = reached
        done = (reached == num_tokens).nonzero()[0]
        offsets = numpy.zeros(len(done), dtype=numpy.int64)
        awaits_prompt = table.awaits_prompt.any()
        if len(done) == counts.sum() and not awaits_prompt:  # every row has one token and samples
            return SchedulerOutput(rows, counts, starts, RowsToSample(rows, offsets, None), [])
        last = counts.cumsum()[done] - 1
        done_rows, sources, copies = rows[done], last, list[BlockCopy]()
        if table.num_draft_tokens[done_rows].any():
            num_samples = table.num_draft_tokens[done_rows] + 1
            offsets = numpy.arange(num_samples.sum()) - (num_samples.cumsum() - num_samples).repeat(num_samples)
            sources = (last + 1 - num_samples).repeat(num_samples) + offsets
        sampled = done_rows if len(offsets) == len(done) else done_rows.repeat(num_samples)
        if awaits_prompt:
            started = [
                (sibling, source)
                for row, source in zip(done_rows.tolist(), last.tolist(), strict=True)
                for sibling in self._fork(row, copies)
            ]
            siblings, shared_sources = numpy.array(started, dtype=numpy.int64).reshape(-1, 2).T
            sampled, sources = numpy.append(sampled, siblings), numpy.append(sources, shared_sources)
            offsets = numpy.append(offsets, numpy.zeros_like(siblings))
        return SchedulerOutput(rows, counts, starts, RowsToSample(sampled, offsets, sources), copies)

    def _chunk(self, row: int, budget: int) -> int:
        """Allocate blocks for the next tokens of a row, at most `budget` prompt tokens; returns the number of tokens, 0
        if the row must wait."""
        table = self.table
        self._take_cached_blocks(row)
        start, pending = (
            int(table.num_computed_tokens[row]),
            int(table.num_tokens[row] - table.num_computed_tokens[row]),
        )
        count = pending if pending == 1 else min(pending, budget)
        while count > 0:
            missing = -(-(start + count + int(table.num_draft_tokens[row])) // BLOCK_SIZE) - len(table.blocks[row])
            if missing <= self.pool.num_free_blocks:
                break
            if table.num_draft_tokens[row]:
                table.num_draft_tokens[row] = 0  # never preempt for draft tokens
            elif not self._preempt_after(row):
                count = (len(table.blocks[row]) + self.pool.num_free_blocks) * BLOCK_SIZE - start
        if count <= 0:
            if count < 0 or (pending > 0 and budget > 0):
                self.preempt(row)
            return 0
        table.append_blocks(row, self.pool.allocate(max(missing, 0)))
        self.cache_full_blocks(row, start + count)
        return count

    def _take_cached_blocks(self, row: int) -> None:
        """Reference cached blocks that contain the next tokens of a row; the last token is always computed, and so is a
        prompt that is scored."""
        table = self.table
        while (
            not table.scores_prompt[row]
            and table.num_computed_tokens[row] == len(table.blocks[row]) * BLOCK_SIZE
            and table.num_tokens[row] - table.num_computed_tokens[row] > 1
        ):
            start = int(table.num_computed_tokens[row])
            content = BlockTokens(table.block_hashes[row][-1], table.ids[row, start : start + BLOCK_SIZE].tobytes())
            block = self.pool.find_cached(content) if start + BLOCK_SIZE <= table.num_tokens[row] else None
            if block is None:
                return
            self.pool.add_reference([block])
            table.append_blocks(row, [block])
            table.block_hashes[row].append(content.block_hash)
            table.num_computed_tokens[row] = min(start + BLOCK_SIZE, int(table.num_tokens[row]) - 1)

    def cache_full_blocks(self, row: int, end: int) -> None:
        """Register the hashes of the row's blocks that are full after `end` tokens are computed."""
        table = self.table
        for place in range(len(table.block_hashes[row]) - 1, end // BLOCK_SIZE):
            tokens = table.ids[row, place * BLOCK_SIZE : (place + 1) * BLOCK_SIZE].tobytes()
            table.block_hashes[row].append(
                self.pool.cache_block(table.blocks[row][place], BlockTokens(table.block_hashes[row][-1], tokens))
            )

    def discard_draft_tokens(self, rows: numpy.ndarray) -> None:
        """Count the rows' tokens but the last as computed, after some draft tokens were accepted; they may have filled
        a block."""
        num_computed_tokens = self.table.num_tokens[rows] - 1
        self.table.num_computed_tokens[rows] = num_computed_tokens
        for row, count in zip(rows.tolist(), num_computed_tokens.tolist(), strict=True):
            self.cache_full_blocks(row, count)

    def _admit(self, budget: int) -> int | None:
        """Assign rows to the first queue entry; returns the row that computes the prompt, None if the entry must
        wait."""
        table = self.table
        while self.queue and self.queue[0][1] not in self.queue[0][1].request.queue_entries:
            heapq.heappop(self.queue)  # aborted
        if not self.queue:
            return None
        waiting = self.queue[0][1]
        request, indices = waiting.request, waiting.indices
        chunk = min(len(request.prompt_token_ids) + len(waiting.output.token_ids), budget)
        room = -(-chunk // BLOCK_SIZE) + len(self.running) // ROWS_PER_SPARE_BLOCK
        if len(indices) > len(table.free_rows) or self.pool.num_free_blocks < room:
            return None
        heapq.heappop(self.queue)
        self.num_waiting -= 1
        request.is_started = True
        if request.turn > self.turn:
            self.turn = request.turn
            self._last_turns = {tenant: turn for tenant, turn in self._last_turns.items() if turn >= self.turn}
        request.queue_entries.remove(waiting)
        first, *others = (
            table.assign_row(waiting, index, root_hash(self.version, request.cache_salt)) for index in indices
        )
        table.sibling_rows[first] = others
        table.awaits_prompt[others] = True
        for row in (first, *others):
            bisect.insort(self.running, row, key=table.priority_key)
        self._take_cached_blocks(first)
        if not waiting.output.token_ids:
            request.weights_version = self.version
            request.num_cached_tokens = int(table.num_computed_tokens[first]) // BLOCK_SIZE * BLOCK_SIZE
        return first

    def _fork(self, row: int, copies: list[BlockCopy]) -> list[int]:
        """Start the siblings of a row whose prompt is computed in this step, and return the siblings. Each sibling
        references the shared full blocks and gets a new block for a copy of a partly filled last block, which is
        appended to `copies`; if no block is free, the sibling is requeued."""
        table, started = self.table, []
        prompt = int(table.num_prompt_tokens[row])
        shared, rest = divmod(prompt, BLOCK_SIZE)
        for sibling in table.sibling_rows[row]:
            if rest and not self.pool.num_free_blocks:
                self.preempt(sibling)
                continue
            own = self.pool.allocate(1) if rest else []
            self.pool.add_reference(table.blocks[row][:shared])
            table.append_blocks(sibling, table.blocks[row][:shared] + own)
            table.block_hashes[sibling] = list(table.block_hashes[row])
            table.num_computed_tokens[sibling] = prompt
            table.awaits_prompt[sibling] = False
            copies += [BlockCopy(table.blocks[row][shared], block, rest) for block in own]
            started.append(sibling)
        table.sibling_rows[row] = []
        return started

    def _preempt_after(self, row: int) -> bool:
        """Preempt the last row in scheduling order that has blocks, unless that is `row` or a row before it; returns
        whether a row was preempted."""
        table = self.table
        for last in reversed(self.running):
            if last == row:
                return False
            if table.blocks[last]:
                self.preempt(last)
                return True
        return False

    def preempt(self, row: int) -> None:
        """Requeue a row, and the siblings that wait for its prompt."""
        table = self.table
        request, index = table.request_at(row)
        followers = table.sibling_rows[row]
        indices = (index, *(table.request_at(other)[1] for other in followers))
        self._push(QueueEntry(request, indices, table.output_of(row)))
        self.has_preempted = True
        self.num_preemptions += 1
        for each in (*followers, row):
            self.close(each)

    def close(self, row: int) -> None:
        """Free a row and its blocks."""
        self.running.remove(row)
        self.pool.free(self.table.blocks[row])
        self.table.clear(row)

    def _push(self, waiting: QueueEntry) -> None:
        heapq.heappush(self.queue, (waiting.priority_key, waiting))
        self.num_waiting += 1
        waiting.request.queue_entries.append(waiting)

    def forget_waiting(self, request: Request) -> list[QueueEntry]:
        """Remove the entries of an aborted request and return them; they are removed from the heap lazily."""
        found, request.queue_entries = request.queue_entries, []
        self.num_waiting -= len(found)
        if len(self.queue) > 2 * self.num_waiting + 64:
            self.queue = [each for each in self.queue if each[1] in each[1].request.queue_entries]
            heapq.heapify(self.queue)
        return found

    def forget_completion(self, request: Request, index: int) -> Output:
        """Remove a waiting completion and return its output."""
        (entry,) = (each for each in request.queue_entries if index in each.indices)
        others = tuple(each for each in entry.indices if each != index)
        request.queue_entries.remove(entry)
        self.num_waiting -= 1
        self.queue = [each for each in self.queue if each[1] is not entry]
        heapq.heapify(self.queue)
        if others:
            self._push(replace(entry, indices=others))
        return entry.output

    def preempt_all(self) -> None:
        """Requeue all running rows."""
        for row in reversed(list(self.running)):
            if self.table.requests[row] is not None and not self.table.awaits_prompt[row]:
                self.preempt(row)  # and the siblings of the row

    def check_invariants(self) -> None:
        """Raise AssertionError if the blocks of all rows and the pool disagree."""
        self.pool.check_invariants()
        held = numpy.zeros_like(self.pool.ref_count)
        for row in self.running:
            numpy.add.at(held, self.table.blocks[row], 1)
            assert len(self.table.blocks[row]) * BLOCK_SIZE >= self.table.num_computed_tokens[row]
        assert (held == self.pool.ref_count).all(), "a referenced block belongs to no row"
        assert len(self.running) + len(self.table.free_rows) == len(self.table.requests)
        assert self.num_waiting == sum(each in each.request.queue_entries for _, each in self.queue)
