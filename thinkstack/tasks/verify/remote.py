"""The judge's side of a candidate: functions that run in its sandboxed process, called as if they were here.

Tests call a `RemoteFunction` like the function itself. Arguments and results cross as values.py says, an exception
crosses as the names of its types, and arguments that the call changed in place are changed here too. An object that
cannot cross stays in its process; here it is a `RemoteObject`, which equals itself alone.
"""

from __future__ import annotations

import builtins
import time
from collections.abc import Sequence
from typing import Any

from thinkstack.tasks.verify.rungs import Rung
from thinkstack.tasks.verify.sandbox import START_SECONDS, SandboxedProcess, SandboxError, SandboxLimits
from thinkstack.tasks.verify.values import CannotCross, decode, encode, from_line, to_line


class CandidateError(Exception):
    """The candidate raised an exception whose type is not a builtin one."""


class Candidate:
    """One program in a sandboxed process. After `failure` is set, the process has ended and no call succeeds."""

    def __init__(self, rung: Rung, limits: SandboxLimits):
        self.rung = rung
        self.failure: str | None = None
        """Why the process ended: a limit, or "ended"; None while it answers."""
        self.num_calls = 0
        self.num_objects = 0
        """Objects that stayed in the process, beside those that tests made from its classes."""
        self.end = time.monotonic() + START_SECONDS
        """Monotonic second at which the time of all requests ends; `set_deadline` moves it."""
        self._process = SandboxedProcess(rung, limits)
        self._request({"kind": "names", "names": []})  # the time of the code starts after that of the process

    def __enter__(self) -> Candidate:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.close()

    @property
    def peak_bytes(self) -> int:
        """Largest measured memory of the tree; known after the end."""
        return int(self._process.report.get("peak_bytes", 0))

    def set_deadline(self, seconds: float) -> None:
        """Give the requests from now on this time together."""
        self.end = time.monotonic() + seconds

    def run(self, code: str) -> None:
        """Run the program; raises what it raises."""
        self._request({"kind": "run", "code": code})

    def has(self, names: Sequence[str]) -> bool:
        """Whether the program has defined all the names, or the classes of methods (Solution.solve)."""
        wanted = [name.partition(".")[0] for name in names]
        return bool(self._request({"kind": "names", "names": wanted}) == wanted)

    def call(self, target: Any, arguments: Sequence[Any], keywords: dict[str, Any]) -> Any:
        """Call a name or an object of the program; raises what it raises, and changes arguments as it does."""
        self.num_calls += 1
        value = self._encode((list(arguments), keywords))
        changes = any(isinstance(argument, list | dict | set | bytearray) for argument in arguments)
        reply = self._request({"kind": "call", "target": target, "value": value, "returns_arguments": changes})
        try:
            result, changed = self._decode(reply["result"]), self._decode(reply["arguments"])
        except (KeyError, TypeError) as error:  # the code wrote a reply of its own
            raise CannotCross("a wrong reply") from error
        if changes and isinstance(changed, list) and len(changed) == len(arguments):
            for argument, other in zip(arguments, changed, strict=True):
                _change(argument, other)
        return result

    def get(self, target: Any, name: str) -> Any:
        """Return an attribute of an object of the program."""
        return self._decode(self._request({"kind": "getattr", "target": target, "name": name}))

    def truth(self, target: Any) -> bool:
        """Whether an object of the program counts as true there; the program could as well return True or False."""
        return self._request({"kind": "truth", "target": target}) is True

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set an attribute of an object of the program."""
        self._request({"kind": "setattr", "target": target, "name": name, "value": self._encode(value)})

    def _request(self, request: dict[str, Any]) -> Any:
        """Send a request and return the value of the reply; raises what the program raised."""
        if self.failure is not None:
            raise SandboxError(self.failure)
        try:
            reply = from_line(self._process.exchange(to_line(request), self.end, until=b"\n"))
        except SandboxError as error:
            self._process.close()
            reason = self._process.report.get("reason") or error.reason
            self.failure = error.reason if reason == "closed" else reason
            raise SandboxError(self.failure) from error
        if isinstance(reply, dict) and "value" in reply:
            return reply["value"]
        raise _exception_of(reply)

    def _encode(self, value: Any) -> Any:
        return encode(value, _target)

    def _decode(self, data: Any) -> Any:
        return decode(data, self._remote_object)

    def _remote_object(self, tag: str, body: Any) -> RemoteObject:
        if tag != "object" or type(body) is not int:
            raise CannotCross(str(tag)[:100])
        self.num_objects += 1
        return RemoteObject(self, {"object": body})


class RemoteObject:
    """An object of the program. Attributes, calls and its truth value reach it; it equals itself alone."""

    def __init__(self, candidate: Candidate, target: dict[str, Any]):
        vars(self)["_candidate"], vars(self)["_target"] = candidate, target

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._candidate.call(self._target, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._candidate.get(self._target, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._candidate.set(self._target, name, value)

    def __bool__(self) -> bool:
        return self._candidate.truth(self._target)


class RemoteFunction:
    """A name of the program: a function, a class, or a method of a class (Solution.solve)."""

    def __init__(self, candidate: Candidate, name: str):
        self._candidate, self._target, self.__name__ = candidate, {"name": name}, name.rpartition(".")[2]

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._candidate.call(self._target, arguments, keywords)


def _target(value: Any) -> dict[str, Any]:
    """Return the address of a remote object; nothing else of ours crosses."""
    if isinstance(value, RemoteObject | RemoteFunction):
        found: dict[str, Any] = value._target
        return found
    raise CannotCross(type(value).__name__)


def _change(argument: Any, other: Any) -> None:
    """Give a container the contents that it has on the other side."""
    if type(argument) is not type(other):
        return
    if isinstance(argument, list | bytearray):
        if argument != other:
            argument[:] = other
    elif isinstance(argument, dict | set) and argument != other:
        argument.clear()
        argument.update(other)


def _exception_of(reply: Any) -> Exception:
    """Return the exception of a reply: the nearest builtin type that is an Exception, else CandidateError."""
    names = reply.get("error") if isinstance(reply, dict) else None
    if not isinstance(names, list):
        return CannotCross("a wrong reply")
    message = str(reply.get("message", ""))[:200]
    for name in names:
        kind = getattr(builtins, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, Exception) and kind is not Exception:
            try:
                return kind(message)
            except TypeError:  # UnicodeDecodeError and the like take other arguments
                continue
    return CandidateError(f"{str(names[0])[:100] if names else ''}: {message}")
