"""Multiple choice: rows of the published layouts, prompts, shuffled options, and the letter of an answer."""

import csv
import json

import pytest

from thinkstack.tasks.table import make_task
from thinkstack.tasks.task import TaskConfig
from thinkstack.types import ConfigError, Response

MMLU_ROWS = [
    {"question": "2+2?", "subject": "elementary_mathematics", "choices": ["3", "4", "5", "6"], "answer": "B"},
    {"question": "2+3?", "subject": "elementary_mathematics", "choices": ["3", "4", "5", "6"], "answer": 2},
    {"question": "2+3?", "subject": "elementary_mathematics", "choices": ["3", "4", "5", "6"], "answer": 2},
]
GPQA_ROWS = [
    {
        "Record ID": f"rec{number}",
        "Question": f"Invented question {number},\nin two lines?",
        "Correct Answer": f"right {number}",
        **{f"Incorrect Answer {place}": f"wrong {number}.{place}" for place in (1, 2, 3)},
        "Subdomain": "Optics",
    }
    for number in range(3)
]
REDUX_ROWS = [
    MMLU_ROWS[0] | {"answer": 1, "error_type": "ok", "correct_answer": None},
    MMLU_ROWS[1] | {"answer": 0, "error_type": "wrong_groundtruth", "correct_answer": "2"},
    MMLU_ROWS[0] | {"answer": 1, "error_type": "bad_question_clarity", "correct_answer": None},
]


def written(folder, rows, name="test.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


def read(name, data, **settings):
    task = make_task(name, TaskConfig(data=data, **settings))
    return task, task.read(task.file("test"))


def turn(text):
    return Response(text=text, answer=text.rpartition("</think>")[2].strip())


def test_an_mmlu_row_becomes_a_problem_with_the_letter_as_its_answer(tmp_path):
    task, problems = read("mmlu", written(tmp_path, MMLU_ROWS))
    assert [problem.answer for problem in problems] == ["B", "C", "C"]
    assert len({problem.key for problem in problems}) == 3
    assert task.chance == 0.25 and problems[0].metadata["choices"] == ["3", "4", "5", "6"]


@pytest.mark.parametrize(
    ("prompt", "start", "end"),
    [
        ("simple-evals", "Answer the following multiple choice question. The last line", "A) 3\nB) 4\nC) 5\nD) 6"),
        ("boxed", "2+2?\n\nA. 3\nB. 4", "the letter alone, within \\boxed{}."),
        (
            "lm-eval",
            "The following are multiple choice questions (with answers) about elementary mathematics.",
            "Answer:",
        ),
        ("{subject}: {question} {letters} {x}\n{choices}", "elementary mathematics: 2+2? ABCD {x}\nA. 3", "D. 6"),
    ],
)
def test_a_prompt_is_chosen_by_name_or_written_out(tmp_path, prompt, start, end):
    task, problems = read("mmlu", written(tmp_path, MMLU_ROWS), prompt=prompt)
    (message,), tools = task.prompt(problems[0])
    assert message.content.startswith(start) and message.content.endswith(end) and not tools
    assert problems[0].question == "2+2?"


def test_solved_examples_are_turns_and_the_description_stands_once(tmp_path):
    written(tmp_path, MMLU_ROWS)
    (tmp_path / "dev.jsonl").write_text(json.dumps(MMLU_ROWS[0] | {"question": "1+1?"}) + "\n", encoding="utf-8")
    task, problems = read("mmlu", str(tmp_path), prompt="lm-eval", num_shots=1)
    example, solution, question = task.prompt(problems[0])[0]
    assert example.content.startswith("The following are multiple choice questions") and "1+1?" in example.content
    assert (solution.role, solution.content) == ("assistant", "B")
    assert question.content == "2+2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:"


@pytest.mark.parametrize(
    ("text", "is_correct"),
    [
        ("B", True),
        ("(B)", True),
        ("**B**", True),
        ("B. 4", True),
        ("B) 4", True),
        ("\\boxed{B}", True),
        ("So \\boxed{A}, no, \\boxed{\\text{B}}", True),
        ("It is four because 2 and 2 are added, one after the other, and so on.\n\nAnswer: B", True),
        ("It is four.\n\n**Answer: B**", True),
        ("Answer: $B$", True),
        ("Answer: A\n\nWait.\n\nAnswer: B", True),
        ("<think>B</think>A", False),
        ("<think>Answer: B", False),
        ("\\boxed{B} and \\boxed{", False),
        ("A or B", False),
        ("B. 4 or A. 3", False),
        ("(B) four", True),
        ("Because", False),
        ("E", False),
        ("", False),
    ],
)
def test_the_letter_is_read_from_a_box_a_last_line_or_alone(tmp_path, text, is_correct):
    task, problems = read("mmlu", written(tmp_path, MMLU_ROWS))
    answer = None if text.startswith("<think>Ans") else turn(text).answer
    assert task.verify(problems[0], Response(text=text, answer=answer)).total == is_correct


@pytest.mark.parametrize(
    ("prompt", "text", "letter"),
    [
        ("zero-eval", '```json\n{"reasoning": "\\"answer\\": \\"A\\"", "answer": "B"}\n```', "B"),
        ("zero-eval", 'So {"answer": "A"}, no: {"answer" : "(C)"}', "C"),
        ("zero-eval", "Answer: D", "D"),
        ("simple-evals", '{"reasoning": "", "answer": "B"}', None),
        ("mmlu-pro", "Therefore the answer is (B), since it is two of 2.", "B"),
        ("mmlu-pro", "First the answer is (A). No: **The answer is (C)**.", "C"),
        ("mmlu-pro", "The answer is Bread.", None),
        ("lm-eval", "so the answer is C.", "C"),
        ("simple-evals", "Therefore the answer is (B), since it is two of 2.", None),
        ("simple-evals", "long\nANSWER: C", "C"),
    ],
)
def test_the_letter_is_read_where_the_prompt_asks_for_it(tmp_path, prompt, text, letter):
    row = {"question": "2+2?", "options": list("3456"), "answer": "B", "category": "math"}
    task, (problem,) = read("mmlu_pro", written(tmp_path, [row]), prompt=prompt)
    assert task.read_answer(problem, turn(text)) == letter
    assert task.read_answer(problem, Response(text=f"<think>{text}", answer=None)) is None


def test_a_seed_shuffles_the_choices_and_keeps_the_key(tmp_path):
    data = written(
        tmp_path, [row | {"question": f"{row['question']} {number}"} for number in range(10) for row in MMLU_ROWS]
    )
    _, plain = read("mmlu", data)
    orders = []
    for seed in (1, 2, 1):
        _, shuffled = read("mmlu", data, choice_seed=seed)
        assert [problem.key for problem in shuffled] == [problem.key for problem in plain]
        for before, after in zip(plain, shuffled, strict=True):
            assert sorted(before.metadata["choices"]) == sorted(after.metadata["choices"])
            place = "ABCD".index(after.answer)
            assert after.metadata["choices"][place] == before.metadata["choices"]["ABCD".index(before.answer)]
        orders.append([problem.answer for problem in shuffled])
    assert orders[0] == orders[2] != orders[1]
    assert len(set(orders[0])) == 4


@pytest.mark.parametrize("name", ["test.csv", "gpqa_diamond.csv", "test.jsonl"])
def test_three_invented_rows_of_gpqa_are_shuffled_by_a_seed(tmp_path, name):
    if name.endswith(".csv"):
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, GPQA_ROWS[0])
            writer.writeheader()
            writer.writerows(GPQA_ROWS)
    else:
        written(tmp_path, GPQA_ROWS)
    task, problems = read("gpqa", str(tmp_path))
    assert [problem.question for problem in problems] == [row["Question"] for row in GPQA_ROWS]
    for number, problem in enumerate(problems):
        assert problem.metadata["choices"]["ABCD".index(problem.answer)] == f"right {number}"
        assert task.verify(problem, turn(f"<think>A</think>Answer: {problem.answer}")).total == 1.0
    answers = {tuple(one.answer for one in read("gpqa", str(tmp_path), choice_seed=seed)[1]) for seed in range(5)}
    assert len(answers) > 1


def test_mmlu_redux_corrects_wrong_answers_and_leaves_bad_questions_out(tmp_path, caplog):
    caplog.set_level("INFO")
    _, problems = read("mmlu_redux", written(tmp_path, REDUX_ROWS))
    assert [(problem.question, problem.answer) for problem in problems] == [("2+2?", "B"), ("2+3?", "C")]
    assert "left out 1 bad_question_clarity" in caplog.text


def test_mmlu_pro_has_up_to_ten_options(tmp_path):
    row = {"question": "Which?", "options": list("qwertyuiop"), "answer": "J", "answer_index": 9, "category": "law"}
    task, (problem,) = read("mmlu_pro", written(tmp_path, [row]))
    assert problem.answer == "J" and task.verify(problem, turn("Answer: J")).total == 1.0
    assert "one of ABCDEFGHIJ" in task.prompt(problem)[0][0].content


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("mmlu", [MMLU_ROWS[0] | {"choices": "3, 4"}], r"line 1: choices is text; it must be a list of text"),
        ("mmlu", [MMLU_ROWS[0] | {"choices": ["3"]}], r"choices has 1 entries; use 2 to 26"),
        ("mmlu", [MMLU_ROWS[0], MMLU_ROWS[0] | {"answer": "E"}], r"line 2: answer is 'E'; it must be a letter up to D"),
        ("mmlu", [{"question": "?"}], r"line 1 has no choices, answer .*hendrycks/test"),
        ("gpqa", [GPQA_ROWS[0] | {"Correct Answer": ""}], r"line 1: Correct Answer is text, or empty; give your own"),
    ],
)
def test_a_row_of_another_shape_is_refused_with_its_line_and_field(tmp_path, name, rows, message):
    with pytest.raises(ConfigError, match=message):
        read(name, written(tmp_path, rows))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "mmlu",
            {"prompt": "simple-eval"},
            "tasks.mmlu.prompt='simple-eval' is not a prompt of mmlu; did you mean simple",
        ),
        ("chain", {"prompt": "deepseek", "data": ""}, "tasks.chain.prompt has no effect"),
        ("gsm8k", {"choice_seed": 1}, "tasks.gsm8k.choice_seed=1 has no effect: gsm8k has no choices"),
        ("gpqa", {"data": ""}, "the task gpqa needs its data: .*your own copy of gpqa_diamond.csv.*CC BY 4.0"),
    ],
)
def test_settings_that_do_not_fit_the_task_are_refused(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        make_task(name, TaskConfig(**({"data": "files"} | settings)))


def test_choices_of_your_own_file_need_no_code(tmp_path):
    rows = [
        {"question": "Red?", "choices": ["no", "yes"], "answer": "yes", "source": "me"},
        {"question": "Blue?", "choices": ["no", "yes"], "answer": "A", "language": "en"},
    ]
    task, problems = read("colors", written(tmp_path, rows), verifier="choice")
    assert [problem.answer for problem in problems] == ["B", "A"] and problems[0].metadata["source"] == "me"
    assert task.prompt(problems[0])[0][0].content == "Red?\n\nA. no\nB. yes\n\nAnswer with the letter alone."
    assert task.verify(problems[0], turn("(B)")).total == 1.0
    task, problems = read(
        "colors", written(tmp_path, rows), verifier="choice", prompt="choice-simple-evals", choice_seed=3
    )
    assert "where LETTER is one of AB." in task.prompt(problems[0])[0][0].content
    with pytest.raises(ConfigError, match=r"line 1: answer is 'blue'; it must be a letter up to B"):
        read("colors", written(tmp_path, [rows[0] | {"answer": "blue"}]), verifier="choice")
