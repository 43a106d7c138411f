"""`thinkstack eval bits-per-byte`: how well a model predicts a text file."""

from pathlib import Path

from thinkstack.checkpoint.model import load_chat, load_model
from thinkstack.evals.loglikelihood import bits_per_byte_of_file
from thinkstack.kernels.precision import DTYPES, RequestedPrecision, resolve_precision
from thinkstack.machine import pick_device
from thinkstack.models.precision import inference_copy
from thinkstack.types import ConfigError


def print_bits_per_byte(model: str, files: list[Path], dtype: RequestedPrecision, max_length: int) -> None:
    """Print the bits per byte of each file and of all together.

    max_length: tokens of a window; 0: the model's context. A tokenizer without BOS starts each window with the token
    that ends a turn. Raises ConfigError without a file, and for a tokenizer with neither.
    """
    if not files:
        raise ConfigError("no file is given; give one or several text files")
    chat, device = load_chat(model), pick_device("auto")
    precision = DTYPES[resolve_precision(dtype, device)]
    first = None
    if not chat.tokenizer.begin_ids:
        if not chat.stop_token_ids:
            raise ConfigError(f"{model} has neither BOS nor an end token, after which the first token is scored")
        first = chat.stop_token_ids[0]
    network = inference_copy(load_model(model).to(device), precision)
    bits, num_bytes, num_tokens = 0.0, 0, 0
    for path in files:
        found = bits_per_byte_of_file(network, chat.tokenizer, path, max_length, first)
        bits, num_bytes = bits + found.bits_per_byte * found.num_bytes, num_bytes + found.num_bytes
        num_tokens += found.num_tokens
        print(_line(str(path), found.bits_per_byte, found.num_bytes, found.num_tokens))
    if len(files) > 1:
        print(_line("together", bits / num_bytes, num_bytes, num_tokens))


def _line(name: str, bits: float, num_bytes: int, num_tokens: int) -> str:
    return f"{name}: {bits:.4f} bits per byte ({num_bytes:,} bytes, {num_tokens:,} tokens)"
