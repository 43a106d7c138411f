"""Documents to rows: nothing lost, nothing crossed, and a stream that resumes."""

import random

import pytest
import torch

from tests.tiny import random_examples
from thinkstack.data import Example, PackedStream, collate, collate_values, pack, text_source
from thinkstack.types import ConfigError


def source(index: int) -> Example:
    rng = random.Random(index)
    ids = (0, *(rng.randrange(1, 40) for _ in range(rng.randrange(1, 13))), index + 100)
    return Example(ids, (0,) + (1,) * (len(ids) - 1))


def test_packing_puts_every_sample_in_exactly_one_row_that_holds_it():
    examples = random_examples([random.Random(i).randrange(2, 20) for i in range(200)])
    rows = pack(examples, 24)
    assert sorted(index for row in rows for index in row) == list(range(200))
    assert all(sum(examples[index].width for index in row) <= 24 for row in rows)


def test_packing_leaves_little_room():
    examples = random_examples([random.Random(i).randrange(2, 20) for i in range(200)])
    assert sum(example.width for example in examples) / (24 * len(pack(examples, 24))) > 0.95


def test_a_sample_fills_the_fullest_row_that_takes_it():
    """Widths 5, 4, 3, 2 in rows of 7: the 2 goes beside the 5, the 3 beside the 4."""
    assert pack(random_examples([6, 5, 4, 3]), 7) == [[0, 3], [1, 2]]


def test_a_sample_wider_than_a_row_is_refused():
    with pytest.raises(ConfigError, match="a document of 9 tokens exceeds row_tokens=7"):
        pack(random_examples([9]), 7)


def test_a_row_of_two_documents_written_out():
    batch = collate([Example((7, 8, 9), (0, 1, 1)), Example((5, 6), (0, 1))], [[1, 0]], 5)
    assert batch.ids.tolist() == [[5, 7, 8, 0, 0]]
    assert batch.targets.tolist() == [[6, 8, 9, 0, 0]]
    assert batch.positions.tolist() == [[0, 0, 1, 0, 0]]
    assert batch.document_ids.tolist() == [[2, 1, 1, 0, 0]]
    assert batch.loss_mask.tolist() == [[1, 1, 1, 0, 0]]


def test_only_trained_tokens_are_targets():
    """A prompt is read, not learned: the mask is that of the token predicted, not of the token read."""
    batch = collate([Example((7, 8, 9, 4), (0, 0, 1, 0))], [[0]], 3)
    assert batch.loss_mask.tolist() == [[0, 1, 0]]


def test_no_target_crosses_a_border():
    """The last token of a document predicts nothing, certainly not the first of the next."""
    examples = random_examples([5, 3, 6])
    batch = collate(examples, [[0, 1, 2]], 16)
    assert int(batch.loss_mask.sum()) == sum(example.width for example in examples)
    for index, example in enumerate(examples):
        inside = batch.document_ids[0] == index + 1
        assert batch.targets[0, inside].tolist() == list(example.ids[1:])


def test_numbers_are_spread_as_tokens_are():
    examples, rows = random_examples([5, 3, 6]), [[2, 0], [1]]
    batch = collate(examples, rows, 10)
    values = [[float(token) for token in example.ids[1:]] for example in examples]
    assert torch.equal(collate_values(values, examples, rows, 10), batch.targets.float())


def test_numbers_that_do_not_fit_their_tokens_are_a_bug():
    """One log-probability too few would shift all that follow."""
    examples = random_examples([5])
    with pytest.raises(AssertionError, match="one value per prediction"):
        collate_values([[1.0] * 3], examples, [[0]], 10)


def test_a_document_that_predicts_nothing_is_a_bug():
    with pytest.raises(AssertionError):
        Example((1,), (0,))


def same(first, second) -> bool:
    names = ("ids", "positions", "document_ids", "targets", "loss_mask")
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_stream_gives_the_batches_of_an_uninterrupted_one(stop):
    straight = PackedStream(source, 4, 16)
    batches = [straight.take() for _ in range(8)]
    first = PackedStream(source, 4, 16)
    for _ in range(stop):
        first.take()
    second = PackedStream(source, 4, 16)
    second.restore(first.state())
    assert all(same(second.take(), batch) for batch in batches[stop:])


def test_a_stream_loses_and_repeats_no_document():
    """Each document carries its index as last token; what did not fit waits for the next batch."""
    stream = PackedStream(source, 4, 16)
    seen = []
    for _ in range(30):
        seen += [token - 100 for token in stream.take().targets.flatten().tolist() if token >= 100]
    assert len(seen) == len(set(seen))
    assert sorted(seen + stream.waiting) == list(range(stream.position))
    assert len(stream.waiting) < 20


def test_ranks_read_disjoint_documents():
    seen = []
    for rank in range(3):
        stream = PackedStream(source, 4, 16, rank=rank, world_size=3)
        for _ in range(5):
            seen.append({token - 100 for token in stream.take().targets.flatten().tolist() if token >= 100})
        assert all(index % 3 == rank for found in seen[-5:] for index in found)
    assert sum(map(len, seen)) == len(set().union(*seen))


def test_rows_are_full():
    batch = PackedStream(source, 8, 64).take()
    assert batch.ids.shape == (8, 64)
    assert float((batch.document_ids > 0).float().mean()) > 0.95


def letters(text: str) -> list[int]:
    return [ord(character) for character in text]


def test_text_files_become_chunks_that_begin_with_bos(tmp_path):
    (tmp_path / "a.txt").write_text("abcde", encoding="utf-8")
    found = text_source([tmp_path / "a.txt"], letters, bos_id=0, row_tokens=3)
    assert [example.ids for example in found] == [(0, 97, 98, 99), (0, 100, 101)]
    assert [example.loss_mask for example in found] == [(0, 1, 1, 1), (0, 1, 1)]
    assert max(example.width for example in found) <= 3


def test_files_that_are_no_text_are_named(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"a\.bin"):
        text_source([tmp_path / "a.bin"], letters, 0, 3)
    with pytest.raises(ConfigError, match="missing"):
        text_source([tmp_path / "missing"], letters, 0, 3)


def test_cutting_a_batch_keeps_what_is_missing_missing():
    batch = collate(random_examples([5, 3, 6]), [[0], [1], [2]], 6)
    piece = batch.with_weights(batch.loss_mask).rows([2, 0])
    assert torch.equal(piece.ids, batch.ids[[2, 0]])
    assert torch.equal(piece.weights, batch.loss_mask[[2, 0]])
    assert piece.advantages is None


def ramped(stream: PackedStream, rows: list[int]) -> list:
    return [stream.take(count) for count in rows]


RAMP = [2, 2, 3, 3, 4, 6, 8, 8]


@pytest.mark.parametrize("stop", [1, 3, 6])
def test_a_ramped_stream_resumes_in_the_middle_of_its_ramp(stop):
    batches = ramped(PackedStream(source, 8, 16), RAMP)
    assert [len(batch.ids) for batch in batches] == RAMP
    first, second = PackedStream(source, 8, 16), PackedStream(source, 8, 16)
    ramped(first, RAMP[:stop])
    second.restore(first.state())
    resumed = ramped(second, RAMP[stop:])
    assert all(same(mine, theirs) for mine, theirs in zip(resumed, batches[stop:], strict=True))


def test_a_ramp_loses_and_repeats_no_document():
    stream = PackedStream(source, 8, 16)
    seen = [int(t) - 100 for b in ramped(stream, RAMP * 3) for t in b.targets.flatten() if t >= 100]
    assert len(seen) == len(set(seen))
    assert sorted(seen + stream.waiting) == list(range(stream.position))


def test_without_isolation_a_row_is_one_document_whose_positions_run_on():
    """V3 packs so: tokens see what stands before them in the row; targets still stop at the borders."""
    examples = random_examples([5, 3, 6])
    alone, joined = (collate(examples, [[0, 1], [2]], 8, isolated=isolated) for isolated in (True, False))
    assert joined.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 0], [0, 1, 2, 3, 4, 0, 0, 0]]
    assert joined.document_ids.tolist() == [[1] * 6 + [0] * 2, [1] * 5 + [0] * 3]
    for name in ("ids", "targets", "loss_mask"):
        assert torch.equal(getattr(alone, name), getattr(joined, name))
