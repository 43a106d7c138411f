"""How a task was evaluated: all that moves its figure, recorded with every result and compared with published rows."""

from dataclasses import dataclass
from typing import Literal

from thinkstack.tasks.task import Method


@dataclass(frozen=True, kw_only=True)
class TaskProtocol:
    """The protocol of one task of one evaluation."""

    task: str
    """Name of the benchmark or generated task."""
    method: Method = "sampled"
    num_problems: int
    """Problems evaluated."""
    num_available: int
    """Problems of the file after its filters; 0 for generated tasks, which are endless."""
    samples: int
    """Completions sampled per problem."""
    temperature: float
    top_p: float
    max_tokens: int
    """Maximum tokens of a completion, thinking included."""
    thinking_budget: int | None = None
    """Thinking tokens after which thinking is closed by force; None: no such limit."""
    max_model_len: int
    """Maximum tokens of prompt and completion together; 0: unknown, as for an endpoint."""
    prompt: str
    """Name of the prompt, or its text; empty: the default of the task."""
    num_shots: int = 0
    """Solved examples in the prompt."""
    thinking_format: str
    """How the final answer is read (text/parse.py)."""
    grader: str
    """How the final answer is graded."""
    since: str = ""
    """First date of the problems, YYYY-MM-DD; empty: no limit."""
    until: str = ""
    """Last date of the problems."""
    seed: int

    @property
    def is_complete(self) -> bool:
        """Whether all problems of the file were evaluated."""
        return self.num_available == self.num_problems


@dataclass(frozen=True, kw_only=True)
class SamplerFacts:
    """What sampled the completions of an evaluation."""

    kind: Literal["engine", "servers", "endpoint", "answers"]
    """The engine of this process, vLLM servers with our weights, an OpenAI-compatible endpoint, a file of answers."""
    model: str
    """The end of the path of the checkpoint or of the answers, or the name that the endpoint has for the model."""
    engine: str
    """Name and version of the program, such as "thinkstack 0.1.0"; of an endpoint its system_fingerprint."""
    template: str = ""
    """Name of the chat format; empty if the endpoint applies one of its own."""
    dtype: str = ""
    """Precision of weights and KV cache; empty if unknown."""
    quantization: str = ""
    machine: str = ""
    """Processor or device of the engine; empty if unknown."""
    max_num_seqs: int = 0
    """Sequences that are computed together at most; 0: unknown."""
    prompt_price: float = 0.0
    """Price of a million tokens of prompts."""
    completion_price: float = 0.0
    """Price of a million sampled tokens."""
    price_per_hour: float = 0.0
    """Price of an hour of the machine that samples."""
