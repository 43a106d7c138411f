"""The program of the sandboxed process: it runs the candidate's code and answers calls from outside.

Only this file and values.py exist in that process; no test and no expected value does. The first argument is JSON:
`uid` and `max_processes`, 0 where the process outside has set them, and `script_bytes`, the size of a program that
starts standard input and reads the rest of it; 0 for a program whose functions are called. Requests and replies are
lines of values.py on the first standard input and output, which the candidate's code sees replaced by empty ones.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import types
from typing import Any, BinaryIO

from thinkstack.tasks.verify.values import CannotCross, decode, encode, from_line, to_line


def give_up_rights(uid: int, max_processes: int) -> None:
    """Become the user `uid`, if not 0, and limit the processes of that user, if not 0."""
    if max_processes:
        resource.setrlimit(resource.RLIMIT_NPROC, (max_processes, max_processes))
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


class Server:
    """Runs one program and keeps the objects that only this process can have, by number."""

    def __init__(self) -> None:
        self.module = types.ModuleType("solution")
        self.objects: list[Any] = []

    def run(self, code: str) -> None:
        """Run the program as a module that is not __main__, as the published harnesses do."""
        sys.modules["solution"] = self.module
        exec(compile(code, "solution.py", "exec"), self.module.__dict__)

    def find(self, name: str) -> Any:
        """Return what the program calls `name`; a method of a class (Solution.solve) belongs to a new instance."""
        first, _, rest = name.partition(".")
        if first not in self.module.__dict__:
            raise NameError(f"name {first!r} is not defined")
        found = self.module.__dict__[first]
        return getattr(found() if isinstance(found, type) else found, rest) if rest else found

    def encode_object(self, value: Any) -> dict[str, Any]:
        """Keep an object and return its number."""
        self.objects.append(value)
        return {"object": len(self.objects) - 1}

    def decode_object(self, tag: str, body: Any) -> Any:
        """Return a kept object, or what the program calls a name."""
        if tag == "object":
            return self.objects[body]
        if tag == "name":
            return self.find(body)
        raise CannotCross(tag)

    def handle(self, request: dict[str, Any]) -> Any:
        """Carry out a request: run, names, call, truth, getattr or setattr."""
        kind = request["kind"]
        if kind == "run":
            return self.run(request["code"])
        if kind == "names":
            return [name for name in request["names"] if name in self.module.__dict__]
        target = decode(request["target"], self.decode_object)
        if kind == "truth":
            return bool(target)
        if kind == "getattr":
            return encode(getattr(target, request["name"]), self.encode_object)
        value = decode(request["value"], self.decode_object)
        if kind == "setattr":
            return setattr(target, request["name"], value)
        arguments, keywords = value
        result = encode(target(*arguments, **keywords), self.encode_object)
        # arguments that the call changed in place; what cannot cross is left as it was
        try:
            changed = encode(arguments, self.encode_object) if request["returns_arguments"] else None
        except CannotCross:
            changed = None
        return {"result": result, "arguments": changed}


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until their end. Whatever the program raises crosses as the name of its type."""
    server = Server()
    for line in requests:
        try:
            reply = {"value": server.handle(from_line(line))}
        except BaseException as error:  # SystemExit and KeyboardInterrupt of the program are its errors too
            names = [kind.__name__ for kind in type(error).__mro__]
            reply = {"error": names, "message": _message(error)}
        try:
            data = to_line(reply)
        except CannotCross as error:
            data = to_line({"error": ["CannotCross"], "message": str(error)})
        replies.write(data)
        replies.flush()


def _message(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:  # a program's own exception may fail to describe itself
        return ""


def read_exactly(num_bytes: int) -> bytes:
    """Return the first bytes of standard input and leave the rest to the program."""
    data = b""
    while len(data) < num_bytes and (part := os.read(0, num_bytes - len(data))):
        data += part
    return data


def run_script(code: bytes) -> None:
    """Run the program as a script that reads standard input and writes standard output."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    exec(compile(code, "solution.py", "exec"), module.__dict__)


def main() -> None:
    cfg = json.loads(sys.argv[1])
    give_up_rights(cfg["uid"], cfg["max_processes"])
    sys.argv = ["solution.py"]
    if cfg["script_bytes"]:
        os.write(1, b"\n")  # the time of the script starts here
        run_script(read_exactly(cfg["script_bytes"]))
        return
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    empty = os.open(os.devnull, os.O_RDWR)
    os.dup2(empty, 0)
    os.dup2(empty, 1)
    serve(requests, replies)
