"""The cache by content: what a key holds, damaged files, several caches in one folder."""

import json
import os
import threading

import pytest

from tests.endpoint.fake import URL, FakeServer, answer, answered, ask, asks, connect, delta, end, error, streamed
from thinkstack.endpoint.cache import CompletionCache
from thinkstack.endpoint.config import EndpointConfig
from thinkstack.endpoint.requests import chat_call
from thinkstack.types import ConfigError, RequestError

KEYS = [f"{number:064x}" for number in range(10)]


def test_a_second_run_asks_nothing_and_gives_the_same(tmp_path):
    server = FakeServer(lambda body, times: answer(f"{body['messages'][-1]['content']} {times}"))
    with connect(server, cache=str(tmp_path)) as endpoint:
        first = endpoint.complete(asks(20))
        again = endpoint.complete(asks(20))
    with connect(FakeServer(lambda body, times: 1 / 0), cache=str(tmp_path)) as endpoint:
        second = endpoint.complete(asks(20))
        assert endpoint.spent.from_cache == 20 and endpoint.spent.requests == 0
    assert [one.content for one in first] == [one.content for one in second] == [one.content for one in again]
    assert all(one.from_cache for one in second) and not any(one.from_cache for one in first)
    assert len(server.bodies) == 20


def test_how_thinking_is_read_is_no_part_of_the_content(tmp_path):
    server = FakeServer(lambda body, times: streamed(delta(content="so</think>Paris"), end()))
    with connect(server, cache=str(tmp_path)) as endpoint:
        assert endpoint.complete([ask()])[0].content == "so</think>Paris"
    with connect(server, cache=str(tmp_path), opens_thinking=True) as endpoint:
        assert endpoint.complete([ask()])[0].content == "Paris"
    assert len(server.bodies) == 1


def key_of(url=URL, request=None, model="small", **settings):
    return chat_call(request or ask(), EndpointConfig(url=url, **settings), model).key(url)


def test_a_key_holds_all_that_is_sent_and_where_to_and_nothing_else():
    different = [
        key_of(),
        key_of(url="http://other:8000/v1"),
        key_of(url="http://host:8001/v1"),
        key_of(url="http://host:8000/v2"),
        key_of(model="large"),
        key_of(request=ask("other")),
        key_of(request=ask(index=1)),
        key_of(request=ask(seed=1)),
        key_of(request=ask(temperature=0.5)),
        key_of(request=ask(max_tokens=21)),
        key_of(request=ask(stop=("a",))),
        key_of(thinking=True),
        key_of(extra_body={"top_k": 1}),
        key_of(max_tokens_field="max_completion_tokens"),
    ]
    assert len(set(different)) == len(different)
    same = key_of(request=ask(temperature=1))
    assert key_of(request=ask(temperature=1.0)) == same
    assert key_of() == key_of(url="https://HOST:8000/v1", concurrency=3, max_cost=1.0, prompt_price=2.0, retries=1)


def test_a_line_without_its_end_is_ignored_and_later_ones_are_not_joined_to_it(tmp_path):
    cache = CompletionCache(tmp_path)
    for number, key in enumerate(KEYS[:3]):
        cache.put(key, {"number": number})
    cache.close()
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        found = CompletionCache(tmp_path)
        whole = data[:size].count(b"\n")
        assert [found.get(key) for key in KEYS[:3]] == [{"number": n} if n < whole else None for n in range(3)]
    path.write_bytes(data[:-10])
    cache = CompletionCache(tmp_path)
    cache.put(KEYS[2], {"number": 2})
    cache.close()
    assert [CompletionCache(tmp_path).get(key) for key in KEYS[:3]] == [{"number": n} for n in range(3)]


def test_a_line_that_another_process_writes_is_read_when_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("thinkstack.endpoint.cache.REFRESH_SECONDS", 0.0)
    one, other = CompletionCache(tmp_path), CompletionCache(tmp_path)
    one.put(KEYS[0], {"text": "a"})
    assert other.get(KEYS[0]) == {"text": "a"}
    (path,) = tmp_path.iterdir()
    line = path.read_bytes().replace(KEYS[0].encode(), KEYS[1].encode())
    with path.open("ab") as file:
        file.write(line[:30])
        file.flush()
        assert other.get(KEYS[1]) is None
        file.write(line[30:])
    assert other.get(KEYS[1]) == {"text": "a"}


def test_what_another_process_finished_in_the_meantime_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("thinkstack.endpoint.cache.REFRESH_SECONDS", 0.0)
    server = FakeServer()
    with connect(server, cache=str(tmp_path)) as one, connect(server, cache=str(tmp_path)) as other:
        one.complete(asks(5))
        assert all(completion.from_cache for completion in other.complete(asks(5)))
    assert len(server.bodies) == 5


def test_what_another_process_finishes_while_a_request_waits_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("thinkstack.endpoint.cache.REFRESH_SECONDS", 0.0)
    others = FakeServer()

    def reply(body, times):
        with connect(others, cache=str(tmp_path)) as other:
            other.complete(asks(3)[1:])
        return answer()

    server = FakeServer(reply)
    with connect(server, cache=str(tmp_path), concurrency=1) as endpoint:
        assert [completion.from_cache for completion in endpoint.complete(asks(3))] == [False, True, True]
    assert len(server.bodies) == 1 and len(others.bodies) == 2


def test_of_two_rows_of_a_key_the_first_one_counts_in_each_process(tmp_path):
    one, other = CompletionCache(tmp_path), CompletionCache(tmp_path)
    one.put(KEYS[0], {"by": "one"})
    other.put(KEYS[0], {"by": "other"})
    one.put(KEYS[0], {"by": "one, again"})
    assert one.get(KEYS[0]) == {"by": "one"}
    one.close()
    other.close()
    assert CompletionCache(tmp_path).get(KEYS[0]) == CompletionCache(tmp_path).get(KEYS[0])


@pytest.mark.parametrize("damage", [b"garbage\n", b"\xff\xfe\n", b'{"key": "short", "row": 1}\n', b"\n"])
def test_a_damaged_line_is_reported_and_the_others_are_kept(tmp_path, caplog, damage):
    cache = CompletionCache(tmp_path)
    cache.put(KEYS[0], 1)
    cache.put(KEYS[1], 2)
    cache.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage + path.read_bytes())
    found = CompletionCache(tmp_path)
    assert (found.get(KEYS[0]), found.get(KEYS[1])) == (1, 2)
    assert "has a damaged line at byte 0" in caplog.text


@pytest.mark.parametrize("row", ['{"content": "x"}', "null", "[1]", '{"a": '])
def test_a_row_of_another_form_is_asked_for_again(tmp_path, row):
    server = FakeServer()
    assert answered(connect(server, cache=str(tmp_path)), [ask()]) == ["Paris"]
    (path,) = tmp_path.iterdir()
    path.write_text(f'{{"key": "{json.loads(path.read_text())["key"]}", "row": {row}}}\n')
    assert answered(connect(server, cache=str(tmp_path)), [ask()]) == ["Paris"]
    assert len(server.bodies) == 2


def test_a_full_disk_ends_the_run_and_loses_no_paid_completion(tmp_path, monkeypatch):
    server, found, write = FakeServer(), [], os.write

    def write_half(file, data):
        if len(server.bodies) < 3 or threading.current_thread().name != "endpoint":
            return write(file, data)
        if not data.startswith(b'{"key"'):
            raise OSError(28, "No space left on device")
        return write(file, data[:50])

    monkeypatch.setattr("thinkstack.endpoint.cache.os.write", write_half)
    full = pytest.raises(ConfigError, match=r"cannot write .*: No space left on device; free space")
    with connect(server, cache=str(tmp_path), concurrency=1) as endpoint, full:
        endpoint.complete(asks(9), on_finish=lambda place, completion: found.append(place))
    assert found == [0, 1, 2] and len(server.bodies) == 3
    (path,) = tmp_path.iterdir()
    assert len(path.read_bytes().splitlines()) == 2 and path.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_cache_that_cannot_be_a_folder_is_an_error(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="choose another folder as cache"):
        CompletionCache(tmp_path / place)


def test_a_run_without_answers_leaves_no_file(tmp_path):
    server = FakeServer(lambda body, times: error(400))
    with connect(server, cache=str(tmp_path)) as endpoint, pytest.raises(RequestError):
        endpoint.complete([ask()])
    assert list(tmp_path.iterdir()) == []
