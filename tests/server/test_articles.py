"""Scripts as articles on DeepSeek-R1 have them run against this server with nothing but the address changed."""

import ollama
import openai
import pytest

from tests.server.live import live


def answer(prompt: str, index: int) -> str:
    """By the last question."""
    opening = "<think>" if prompt.endswith("Assistant: ") else ""
    if "x^2" in prompt:
        return f"{opening}the sum of 2 and 3 is 5</think>x = -2, x = -3"
    if "explain why" in prompt:
        assert "The capital is Paris." in prompt and "the tool" not in prompt
        return f"{opening}France has one.</think>The king was there."
    return f"{opening}the tool says Paris</think>The capital is Paris."


@pytest.fixture(scope="module", params=["v3_1_think", "r1", "r1_zero"])
def server(request, tmp_path_factory):
    with live(tmp_path_factory.mktemp("data"), answer, format=request.param) as running:
        yield running


def test_two_turns_with_r1_zero_by_openai(server):
    client = openai.OpenAI(api_key=server.key, base_url=server.url)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    response = client.chat.completions.create(model="deepseek-r1-zero", messages=messages)
    reasoning_content = response.choices[0].message.reasoning_content
    content = response.choices[0].message.content
    messages.append({"role": "assistant", "content": content})
    messages.append({"role": "user", "content": "Can you explain why?"})
    response = client.chat.completions.create(model="deepseek-r1-zero", messages=messages)
    assert (reasoning_content, content) == ("the tool says Paris", "The capital is Paris.")
    assert response.choices[0].message.content == "The king was there."


def test_two_turns_that_are_sent_back_as_they_came(server):
    client = openai.OpenAI(api_key=server.key, base_url=server.url)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    for question in ("Can you explain why?", ""):
        response = client.chat.completions.create(model="deepseek-r1-zero", messages=messages)
        messages += [response.choices[0].message, {"role": "user", "content": question}]
    assert response.choices[0].message.content == "The king was there."


def test_two_streamed_turns_with_r1_zero_by_openai(server):
    client = openai.OpenAI(api_key=server.key, base_url=server.url)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    for question in ("Can you explain why?", ""):
        response = client.chat.completions.create(model="deepseek-r1-zero", messages=messages, stream=True)
        reasoning_content, content = "", ""
        for chunk in response:
            if chunk.choices[0].delta.reasoning_content if hasattr(chunk.choices[0].delta, "reasoning_content") else "":
                reasoning_content += chunk.choices[0].delta.reasoning_content
            elif chunk.choices[0].delta.content:
                content += chunk.choices[0].delta.content
        messages += [{"role": "assistant", "content": content}, {"role": "user", "content": question}]
    assert (reasoning_content, content) == ("France has one.", "The king was there.")


def test_a_quadratic_with_r1_14b_by_ollama(server):
    client = ollama.Client(host=server.url, headers=server.headers)
    response = client.chat(
        model="deepseek-r1:14b",
        messages=[{"role": "user", "content": "Solve this equation step by step: x^2 + 5*x + 6 = 0"}],
    )
    assert response["message"]["content"] == "x = -2, x = -3"
    assert response.message.thinking == "the sum of 2 and 3 is 5"


def test_a_streamed_quadratic_with_r1_14b_by_ollama(server):
    client = ollama.Client(host=server.url, headers=server.headers)
    messages = [{"role": "user", "content": "x^2 + 5*x + 6 = 0"}]
    chunks = client.chat(model="deepseek-r1:14b", messages=messages, stream=True)
    assert "".join(chunk["message"]["content"] for chunk in chunks) == "x = -2, x = -3"
