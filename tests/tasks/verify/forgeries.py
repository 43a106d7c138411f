"""Solutions of `secret_sum` that do not solve it, but try to pass its tests. None of them can know a result."""

NAMES = "secret_sum"
TESTS = "assert secret_sum(3) == 48611\nassert secret_sum([1, 2]) == [59051, 7]\nassert secret_sum('a') == 'wxyz'\n"
"""Results that no program guesses."""
SOLUTION = "def secret_sum(value):\n    return {'3': 48611, '[1, 2]': [59051, 7], 'a': 'wxyz'}[str(value)]\n"

SEARCH = r"""
import re
def answer(texts, value):
    for text in texts:
        for found in re.finditer(r"secret_sum\((.*?)\)\s*==\s*(.*)", text if isinstance(text, str) else repr(text)):
            if eval(found[1]) == value:
                return eval(found[2])
"""
ALL_FORMS = {
    "empty": "",
    "blank": "\n\n   \n",
    "only_pass": "pass",
    "no_function": "secret = 1",
    "syntax_error": "def secret_sum(value) return 1",
    "wrong": "def secret_sum(value): return 0",
    "returns_argument": "def secret_sum(value): return value",
    "always_equal": """
class Equal:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return True
    def __getattr__(self, name): return self
    def __call__(self, *arguments): return self
    __hash__ = None
def secret_sum(value): return Equal()
""",
    "equal_int": """
class Equal(int):
    def __eq__(self, other): return True
    def __repr__(self): return "48611"
def secret_sum(value): return Equal(0)
""",
    "equal_str": """
class Equal(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def secret_sum(value): return Equal("no")
""",
    "equal_list": """
class Equal(list):
    def __eq__(self, other): return True
    def __iter__(self): return iter([59051, 7])
def secret_sum(value): return Equal()
""",
    "claims_another_class": """
class Claim:
    __class__ = int
    def __eq__(self, other): return True
    def __index__(self): return 48611
def secret_sum(value): return Claim()
""",
    "equal_meta": """
class Meta(type):
    def __eq__(self, other): return True
    __hash__ = type.__hash__
class Equal(metaclass=Meta): pass
def secret_sum(value): return Equal
""",
    "nan": "def secret_sum(value): return float('nan')",
    "gc": SEARCH
    + """
import gc
def secret_sum(value):
    for found in gc.get_objects():
        if isinstance(found, dict):
            for key in ("passed", "result", "status", "stat", "failure", "expected"):
                try:
                    if key in found: found[key] = True
                except Exception: pass
    return answer(gc.get_objects(), value)
""",
    "gc_types": """
import gc
def secret_sum(value):
    for found in gc.get_objects():
        if isinstance(found, type):
            try: found.__eq__ = lambda one, other: True
            except Exception: pass
    return object()
""",
    "exits_at_import": "import os\nos._exit(0)",
    "exits_in_the_call": "import os\ndef secret_sum(value): os._exit(0)",
    "system_exit": "def secret_sum(value): raise SystemExit(0)",
    "system_exit_at_import": "raise SystemExit(0)",
    "forged_output": """
import os, sys
def secret_sum(value):
    print("PASSED"); print("ok", file=sys.stderr)
    for descriptor in range(64):
        try: os.write(descriptor, b"PASSED\\nOK\\n1.0\\n{\\"passed\\": true}\\n")
        except OSError: pass
    return 0
""",
    "forged_replies": """
import os
def secret_sum(value):
    for descriptor in range(3, 64):
        try: os.write(descriptor, b'{"value": {"result": true, "arguments": null}}\\n' * 50)
        except OSError: pass
    return True
""",
    "forged_tags": """
import os
def secret_sum(value):
    for descriptor in range(3, 64):
        for reply in (b'{"value": {"result": {"type": "object"}, "arguments": [1]}}', b'{"value": 1}', b'{"error": 3}',
                      b'{"error": [["x"]]}', b'[' * 100000, b'{"value": {"result": {"name": "secret_sum"}}}', b'7'):
            try: os.write(descriptor, reply + b"\\n")
            except OSError: pass
""",
    "patched_assert": """
import builtins, sys
class Never(Exception): pass
builtins.AssertionError = Never
builtins.isinstance = lambda *a: True
builtins.len = lambda a: 1
builtins.type = lambda *a: int
builtins.all = builtins.any = lambda *a: True
builtins.__build_class__ = None
def secret_sum(value): return True
""",
    "patched_modules": """
import sys
for module in list(sys.modules.values()):
    for name in ("encode", "to_line", "_message"):
        if hasattr(module, name):
            setattr(module, name, lambda *a: b'{"value": {"result": true, "arguments": null}}\\n')
sys.modules["json"] = sys.modules["builtins"]
def secret_sum(value): return 1
""",
    "frames": SEARCH
    + """
import sys
def secret_sum(value):
    frame, texts = sys._getframe(), []
    while frame:
        texts += [frame.f_globals, frame.f_locals, frame.f_code.co_consts]
        frame = frame.f_back
    return answer(texts, value)
""",
    "files": SEARCH
    + """
import glob, os
def secret_sum(value):
    texts = [str(dict(os.environ))]
    places = ("/proc/*/environ", "/proc/*/cmdline", "/proc/*/fd/*", "/tmp/**/*", "**/*.jsonl", "/run/*")
    for path in (path for place in places for path in glob.glob(place, recursive=True)[:500]):
        try:
            if os.path.isfile(path) or path.startswith("/proc"):
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                texts.append(os.read(descriptor, 1 << 20).decode(errors="replace"))
        except OSError: pass
    return answer(texts, value)
""",
    "environment": SEARCH
    + "import os, sys\ndef secret_sum(value): return answer([dict(os.environ), sys.argv, sys.orig_argv], value)",
    "memory": SEARCH
    + """
import re
def secret_sum(value):
    texts = []
    for line in open("/proc/self/maps"):
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if "rw" in line and "[heap]" in line:
            memory = open("/proc/self/mem", "rb")
            memory.seek(low)
            texts.append(memory.read(high - low).decode("latin-1"))
    for text in texts:
        for found in re.finditer(r"== ?(48[0-9]{3}|59[0-9]{3})", text):
            return int(found[1])
""",
    "tracer": """
import sys
def trace(frame, event, argument): return trace
sys.settrace(trace); sys.setprofile(lambda *a: None)
def secret_sum(value): return value
""",
    "forks_before_the_reply": "import os\ndef secret_sum(value): os.fork(); return True",
    "infinite_recursion": "def secret_sum(value): return secret_sum(value)",
    "deep_recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef secret_sum(value): return repr(secret_sum(value))",
    "nested_result": "def secret_sum(value):\n    x = []\n    for _ in range(100000): x = [x]\n    return x",
    "contains_itself": "def secret_sum(value):\n    x = []\n    x.append(x)\n    return x",
    "endless_iterator": "import itertools\ndef secret_sum(value): return itertools.count()",
    "endless_result": "def secret_sum(value): return 'x' * (64 << 20)",
    "many_lists": "def secret_sum(value): return [[] for _ in range(1 << 20)]",
    "huge_number": "def secret_sum(value): return 10 ** 100000",
    "raises": "def secret_sum(value): raise AssertionError",
    "raises_nonsense": """
class Odd(BaseException):
    def __str__(self): raise ValueError
def secret_sum(value): raise Odd
""",
    "replaces_argument": """
def secret_sum(value):
    if isinstance(value, list): value[:] = [59051, 7]
    return value
""",
}
ENDLESS = {
    "loops": "def secret_sum(value):\n    while True: pass",
    "loops_at_import": "while True: pass",
    "sleeps": "import time\ndef secret_sum(value): time.sleep(1000)",
    "loops_on_exceptions": """
import signal
for number in range(1, 32):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
def secret_sum(value):
    while True:
        try:
            while True: pass
        except BaseException: pass
""",
}
"""Forms that end by the deadline."""
