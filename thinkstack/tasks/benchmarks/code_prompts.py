"""Prompts of benchmarks for code, by the name of the program or paper that published them.

Fields beside those of prompts.py: {prompt} (HumanEval: as in the file, with outer blank lines), {tests} (MBPP), {code},
{input}, {output} (CRUXEval) and {starter_code} (LiveCodeBench).
"""

from thinkstack.tasks.benchmarks.prompts import LM_EVAL, OWN, R1_PAPER, SIMPLE_EVALS, Prompt

_EVALPLUS = Prompt(
    text="Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
    "```python\n{question}\n```",
    source="evalplus/evalplus at 26d6d00, codegen.py and provider/openai.py",
)
HUMANEVAL_PROMPTS = {
    "deepseek-coder": Prompt(
        text="Please continue to complete the function. You are not allowed to modify the given code and do the "
        "completion only. Please return all completed function in a codeblock. Here is the given code to do "
        "completion:\n```python\n{question}\n```",
        source="deepseek-ai/DeepSeek-Coder at 2f9fd85, Evaluation/HumanEval/eval_instruct.py",
    ),
    "human-eval": Prompt(text="{prompt}", source="openai/human-eval at 6d43fb9, README: the prompt alone"),
    "simple-evals": Prompt(
        text="Read the following function signature and docstring, and fully implement the function described. Your "
        "response should only contain the code for this function.\n{prompt}",
        source=f"{SIMPLE_EVALS}, humaneval_eval.py",
    ),
    "lm-eval": Prompt(
        text="Write a solution to the following problem and make sure that it passes the tests:\n```python\n{prompt}\n"
        "```\n",
        source=f"{LM_EVAL}, humaneval_instruct.yaml, which also starts the answer",
    ),
    "evalplus": _EVALPLUS,
}
HUMANEVAL_PLUS_PROMPTS = {"evalplus": _EVALPLUS} | HUMANEVAL_PROMPTS
MBPP_PLUS_PROMPTS = {"evalplus": _EVALPLUS}
MBPP_PROMPTS = {
    "code-block": Prompt(
        text="You are an expert Python programmer, and here is your task: {question} Your code should pass these tests:"
        "\n\n{tests}\n\nReturn the complete program in one code block.",
        source=f"{OWN}: the MBPP paper's, with a request for a code block in place of its worked examples",
    ),
    "lm-eval": Prompt(
        text="You are an expert Python programmer, and here is your task: {question} Your code should pass these tests:"
        "\n\n{tests}\n[BEGIN]\n",
        source=f"{LM_EVAL}, mbpp.yaml, which has three examples",
    ),
    "lm-eval-instruct": Prompt(
        text="You are an expert Python programmer, and here is your task:\n{question}\nYour code should pass these "
        "tests:\n{tests}",
        source=f"{LM_EVAL}, mbpp_instruct.yaml, which has three examples and starts the answer",
    ),
}
_LCB_SYSTEM = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests."
)
_LCB_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters."
)
_LCB_STDIN = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
    "inputs, runs the algorithm and writes output to STDOUT."
)
LIVECODEBENCH_PROMPTS = {
    "livecodebench": Prompt(
        system=_LCB_SYSTEM,
        text=f"### Question:\n{{question}}\n\n### Format: {_LCB_STDIN}\n```python\n# YOUR CODE HERE\n```\n\n"
        "### Answer: (use the provided format with backticks)\n\n",
        with_starter=f"### Question:\n{{question}}\n\n### Format: {_LCB_STARTER}\n```python\n{{starter_code}}\n```\n\n"
        "### Answer: (use the provided format with backticks)\n\n",
        source="LiveCodeBench/LiveCodeBench at 28fef95, lcb_runner/prompts/code_generation.py",
    ),
    "r1": Prompt(
        text="Question: {question}\n\nPlease write a python code to solve the above problem. Your code must read the "
        "inputs from stdin and output the results to stdout.",
        with_starter=f"Question: {{question}}\n\n{_LCB_STARTER}\n```python\n{{starter_code}}\n```",
        source=f"{R1_PAPER}, Table 20, whose line breaks cannot be seen; the form with starter code, which it does not "
        "show, is LiveCodeBench's for R1",
    ),
}
_CRUXEVAL = "facebookresearch/cruxeval at 190faf1, prompts.py"
_OUTPUT_TASK = (
    "You are given a Python function and an assertion containing an input to the function. Complete the assertion with "
    "a literal (no unsimplified expressions, no function calls) containing the output when executing the provided code "
    "on the given input, even if the function is incorrect or incomplete."
)
CRUXEVAL_OUTPUT_PROMPTS = {
    "zero-shot": Prompt(
        text=f"{_OUTPUT_TASK} Provide the full "
        "assertion with the correct output in [ANSWER] and [/ANSWER] tags.\n\n[PYTHON]\n{code}\nassert f({input}) == ??"
        "\n[/PYTHON]",
        source=f"{OWN}: CRUXEval's without its examples",
    ),
    "cruxeval": Prompt(
        text=f"{_OUTPUT_TASK} Do NOT output any extra "
        "information. Provide the full assertion with the correct output in [ANSWER] and [/ANSWER] tags, following the "
        "examples.\n\n[PYTHON]\ndef f(n):\n    return n\nassert f(17) == ??\n[/PYTHON]\n[ANSWER]\nassert f(17) == 17\n"
        '[/ANSWER]\n\n[PYTHON]\ndef f(s):\n    return s + "a"\nassert f("x9j") == ??\n[/PYTHON]\n[ANSWER]\n'
        'assert f("x9j") == "x9ja"\n[/ANSWER]\n\n[PYTHON]\n{code}\nassert f({input}) == ??\n[/PYTHON]\n[ANSWER]\n',
        source=f"{_CRUXEVAL}, make_direct_output_prompt",
    ),
    "cruxeval-cot": Prompt(
        text=f"{_OUTPUT_TASK} Do NOT output any extra "
        "information. Execute the program step by step before arriving at an answer, and provide the full assertion "
        "with the correct output in [ANSWER] and [/ANSWER] tags, following the examples.\n\n[PYTHON]\ndef f(s):\n"
        '    s = s + s\n    return "b" + s + "a"\nassert f("hi") == ??\n[/PYTHON]\n[THOUGHT]\nLet\'s execute the code '
        "step by step:\n\n1. The function f is defined, which takes a single argument s.\n2. The function is called "
        'with the argument "hi", so within the function, s is initially "hi".\n3. Inside the function, s is '
        'concatenated with itself, so s becomes "hihi".\n4. The function then returns a new string that starts with '
        '"b", followed by the value of s (which is now "hihi"), and ends with "a".\n5. The return value of the '
        "function "
        'is therefore "bhihia".\n[/THOUGHT]\n[ANSWER]\nassert f("hi") == "bhihia"\n[/ANSWER]\n\n[PYTHON]\n{code}\n'
        "assert f({input}) == ??\n[/PYTHON]\n[THOUGHT]\n",
        source=f"{_CRUXEVAL}, make_cot_output_prompt",
    ),
}
CRUXEVAL_INPUT_PROMPTS = {
    "zero-shot": Prompt(
        text="You will be given a function f and an output in the form f(??) == output. Find any input such that "
        "executing f on the input leads to the given output. There may be multiple answers, but you should only output "
        "one. Provide the passing assertion in [ANSWER] and [/ANSWER] tags.\n\n[PYTHON]\n{code}\n"
        "assert f(??) == {output}\n[/PYTHON]",
        source=f"{OWN}: CRUXEval's without its examples",
    ),
    "cruxeval": Prompt(
        text="You will be given a function f and an output in the form f(??) == output. Find any input such that "
        "executing f on the input leads to the given output. There may be multiple answers, but you should only output "
        "one. In [ANSWER] and [/ANSWER] tags, complete the assertion with one such input that will produce the output "
        "when executing the function.\n\n[PYTHON]\ndef f(my_list):\n    count = 0\n    for i in my_list:\n"
        "        if len(i) % 2 == 0:\n            count += 1\n    return count\nassert f(??) == "
        "3\n[/PYTHON]\n[ANSWER]\n"
        'assert f(["mq", "px", "zy"]) == 3\n[/ANSWER]\n\n[PYTHON]\ndef f(s1, s2):\n    return s1 + s2\n'
        'assert f(??) == "banana"\n[/PYTHON]\n[ANSWER]\nassert f("ba", "nana") == "banana"\n[/ANSWER]\n\n[PYTHON]\n'
        "{code}\nassert f(??) == {output}\n[/PYTHON]\n[ANSWER]\n",
        source=f"{_CRUXEVAL}, make_direct_input_prompt",
    ),
    "cruxeval-cot": Prompt(
        text="You will be given a function f and an output in the form f(??) == output. Your task is to find any input "
        "such that executing f on the input leads to the given output. There may be multiple answers, but only output "
        "one. First, think step by step. You MUST surround the answer with [ANSWER] and [/ANSWER] tags. Express your "
        "answer as a passing assertion containing the input and the given output.\n\n[PYTHON]\ndef f(x):\n"
        "    return x + 1\nassert f(??) == 17\n[/PYTHON]\n[THOUGHT]\nTo find an input such that executing f on the "
        "input leads to the given output, we can work backwards from the given assertion. We know that f(??) == 17. \n"
        "\nSince the function f(x) returns x + 1, for f(??) to be equal to 17, the value of ?? should be 16. \n"
        "[/THOUGHT]\n[ANSWER]\nassert f(16) == 17\n[/ANSWER]\n\n[PYTHON]\n{code}\nassert f(??) == {output}\n[/PYTHON]\n"
        "[THOUGHT]\n",
        source=f"{_CRUXEVAL}, make_cot_input_prompt",
    ),
}
CODEFORCES_PROMPTS = {
    "code-block": Prompt(
        text="{question} Write a Python program that reads standard input and writes standard output. Return the "
        "complete program in one code block.",
        source=OWN,
    )
}
