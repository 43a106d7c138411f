"""Small programs: predict the output, or find the faulty line. The programs are never executed."""

import random
from collections.abc import Sequence
from typing import ClassVar

from thinkstack.tasks.puzzles.puzzle import Puzzle

State = tuple[int, int, int]
"""Values of a and b, and the index (0 or 1) of the variable of the last statement."""
VARIABLES = ("a", "b")


class Program:
    """The state contains the variables; an operation is one statement on variable `target` (0 or 1).

    ("set", target, source, sign, number or variable); ("if", target, limit, sign, number): only if target > limit;
    ("for", target, times, number): add the number `times` times.
    """

    name = "program"
    levels = (2, 3, 4, 5, 6)
    chance = 0.02
    wordings: ClassVar[dict[str, tuple[str, ...]]] = {
        "en": (
            "What does this program print?\n{code}",
            "{code}\nWhat is printed?",
            "Read the program and give its output.\n{code}",
            "Run this in your head. What is the output?\n{code}",
            "Here is a program:\n{code}\nTell what it prints.",
            "Which number does it print?\n{code}",
        ),
        "zh": (
            "这个程序打印什么?\n{code}",
            "{code}\n输出是什么?",
            "读程序,写出它的输出。\n{code}",
            "在脑中运行下面的程序,结果是几?\n{code}",
            "有一个程序:\n{code}\n说出它打印的内容。",
            "它会打印哪个数?\n{code}",
        ),
    }

    def generate(self, rng: random.Random, level: int) -> Puzzle:
        """Generate statements that keep the values small and that all affect the output."""
        while True:
            start = (rng.randrange(1, 20), rng.randrange(1, 20))
            ops = tuple(self._statement(rng) for _ in range(level))
            state, is_small = (*start, 0), True
            for op in ops:
                state = self.advance(state, op)
                is_small = is_small and all(-99 <= value <= 300 for value in state[:2])
            if is_small and _every_statement_matters(ops):
                return Puzzle(start, ops)

    @staticmethod
    def _statement(rng: random.Random) -> tuple:
        target, kind = rng.randrange(2), rng.random()
        if kind < 0.2:
            return "if", target, rng.randrange(1, 30), rng.choice("+-"), rng.randrange(2, 10)
        if kind < 0.4:
            return "for", target, rng.randrange(2, 6), rng.randrange(2, 10)
        source, sign = rng.randrange(2), rng.choice("+-*")
        if sign != "*" and rng.random() < 0.5 and source == target:
            return "set", target, source, sign, VARIABLES[1 - source]
        return "set", target, source, sign, rng.randrange(2, 6 if sign == "*" else 15)

    def first_state(self, puzzle: Puzzle) -> State:
        return (*puzzle.start, 0)

    def advance(self, state: State, op: tuple) -> State:
        kind, target = op[:2]
        value = state[target]
        if kind == "for":
            value += op[2] * op[3]
        elif kind == "set":
            value = _apply(state[op[2]], op[3], _number(state, op[4]))
        elif value > op[2]:
            value = _apply(value, op[3], op[4])
        return (value, state[1], 0) if target == 0 else (state[0], value, 1)

    def other_states(self, state: State) -> Sequence[State]:
        """Return states with a small error in the variable of the last statement."""
        a, b, target = state
        return [(a + slip, b, 0) if target == 0 else (a, b + slip, 1) for slip in (-10, -2, -1, 1, 2, 10)]

    def operands(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        lines = [f"{name} = {value}" for name, value in zip(VARIABLES, puzzle.start, strict=True)]
        for kind, target, *rest in puzzle.ops:
            name = VARIABLES[target]
            if kind == "for":
                lines.append(f"for i in range({rest[0]}): {name} = {name} + {rest[1]}")
            elif kind == "if":
                lines.append(f"if {name} > {rest[0]}: {name} = {name} {rest[1]} {rest[2]}")
            else:
                lines.append(f"{name} = {VARIABLES[rest[0]]} {rest[1]} {rest[2]}")
        return {"code": "\n".join((*lines, f"print({VARIABLES[puzzle.ops[-1][1]]})"))}

    def line(self, state: State, op: tuple, result: State, language: str) -> str:
        kind, target = op[:2]
        name, before, after = VARIABLES[target], state[target], result[target]
        if kind == "for":
            return f"{name}={before}+{op[2]}*{op[3]}={after}"
        if kind == "set":
            number = _number(state, op[4])
            return f"{name}={state[op[2]]}{op[3]}{f'({number})' if number < 0 else number}={after}"
        if before > op[2]:
            return f"{before}>{op[2]} True: {name}={before}{op[3]}{op[4]}={after}"
        return f"{before}>{op[2]} False: {name}={after}"

    def answer(self, puzzle: Puzzle, state: State, language: str) -> str:
        return str(state[state[2]])


def _every_statement_matters(ops: Sequence[tuple]) -> bool:
    """Whether the printed value depends on every statement (for an "if", at least on its condition)."""
    needed = {ops[-1][1]}
    for kind, target, *rest in reversed(ops):
        if target not in needed:
            return False
        if kind == "set":
            needed = needed - {target} | {rest[0]}
            needed |= {VARIABLES.index(rest[2])} if isinstance(rest[2], str) else set()
    return True


def _apply(left: int, sign: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


def _number(state: State, operand: int | str) -> int:
    return state[VARIABLES.index(operand)] if isinstance(operand, str) else operand


Instruction = tuple
"""("start", n), ("add", n), ("subtract", n), ("times", n), ("repeat", times, n) or ("print", name)."""
PHRASES = {
    "start": {"en": "start with {0}", "zh": "从{0}开始"},
    "add": {"en": "add {0}", "zh": "加{0}"},
    "subtract": {"en": "subtract {0}", "zh": "减{0}"},
    "times": {"en": "multiply by {0}", "zh": "乘以{0}"},
    "repeat": {"en": "repeat {0} times: add {1}", "zh": "重复{0}次加{1}"},
    "print": {"en": "print {0}", "zh": "打印{0}"},
}
CODE = {
    "start": "x = {0}",
    "add": "x = x + {0}",
    "subtract": "x = x - {0}",
    "times": "x = x * {0}",
    "repeat": "for i in range({0}): x = x + {1}",
    "print": "print({0})",
}


class Bug:
    """A plan in words and a program with one line per step of the plan. One line is wrong; its number is the answer.

    An operation is (line number, planned instruction, actual instruction); the state is the number of the faulty line,
    0 until it is found.
    """

    name = "bug"
    levels = (4, 5, 6)
    chance = 0.21
    wordings: ClassVar[dict[str, tuple[str, ...]]] = {
        "en": (
            "The plan: {plan}.\n{code}\nWhich line is wrong?",
            "This program should {plan}.\n{code}\nIn which line is the bug?",
            "Find the bug. Wanted: {plan}.\n{code}\nGive the number of the line.",
            "{code}\nIt was meant to {plan}. Which line has to be repaired?",
            "One line is not as planned ({plan}).\n{code}\nName its number.",
            "Task: {plan}.\n{code}\nWhich of the lines does not do its part?",
        ),
        "zh": (
            "计划:{plan}。\n{code}\n哪一行错了?",
            "这个程序应该{plan}。\n{code}\n错误在第几行?",
            "找错误。要求:{plan}。\n{code}\n写出行号。",
            "{code}\n本来要{plan}。哪一行需要修改?",
            "有一行与计划({plan})不符。\n{code}\n是第几行?",
            "任务:{plan}。\n{code}\n哪一行没有做对?",
        ),
    }

    def generate(self, rng: random.Random, level: int) -> Puzzle:
        steps = [
            ("start", rng.randrange(1, 20)),
            *(self._random_instruction(rng) for _ in range(level - 2)),
            ("print", "x"),
        ]
        faulty = rng.randrange(level)
        found = [self._with_bug(step, rng) if place == faulty else step for place, step in enumerate(steps)]
        return Puzzle(level, tuple((place + 1, steps[place], found[place]) for place in range(level)))

    @staticmethod
    def _random_instruction(rng: random.Random) -> Instruction:
        kind = rng.choice(("add", "subtract", "times", "repeat"))
        return (
            ("repeat", rng.randrange(2, 6), rng.randrange(2, 10)) if kind == "repeat" else (kind, rng.randrange(2, 10))
        )

    @staticmethod
    def _with_bug(step: Instruction, rng: random.Random) -> Instruction:
        """Return the instruction with an off-by-one number, the wrong operation, or the wrong printed expression."""
        kind, number = step[0], step[1]
        if kind == "print":
            return "print", rng.choice(("i", "x - 1", "x + 1", "2"))
        if kind == "repeat":
            return "repeat", number + rng.choice((-1, 1)), step[2]
        if kind != "start" and rng.random() < 0.5:
            return rng.choice([other for other in ("add", "subtract", "times") if other != kind]), number
        return kind, number + rng.choice((-1, 1))

    def first_state(self, puzzle: Puzzle) -> int:
        return 0

    def advance(self, state: int, op: tuple[int, Instruction, Instruction]) -> int:
        place, wanted, found = op
        return state or (place if wanted != found else 0)

    def other_states(self, state: int) -> Sequence[int]:
        return [other for other in range(min(self.levels) + 1) if other != state]

    def operands(self, puzzle: Puzzle, language: str) -> dict[str, str]:
        plan = (", " if language == "en" else ",").join(_in_words(wanted, language) for _, wanted, _ in puzzle.ops)
        return {"plan": plan, "code": "\n".join(f"{place}: {_in_code(found)}" for place, _, found in puzzle.ops)}

    def line(self, state: int, op: tuple[int, Instruction, Instruction], result: int, language: str) -> str:
        place, wanted, found = op
        return f"{place}: {_in_words(wanted, language)}, {_in_code(found)}: {state} > {result}"

    def answer(self, puzzle: Puzzle, state: int, language: str) -> str:
        return str(state)


def _in_words(step: Instruction, language: str) -> str:
    return PHRASES[step[0]][language].format(*step[1:])


def _in_code(step: Instruction) -> str:
    return CODE[step[0]].format(*step[1:])
