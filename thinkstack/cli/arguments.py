"""Argument types of the commands, with their names in --help."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import UseAppendAction, arg

Model = Annotated[str, arg(metavar="MODEL")]
"""A checkpoint folder, a .gguf file, OWNER/NAME of the Hugging Face hub, or pip:NAME."""
Folder = Annotated[Path, arg(metavar="FOLDER")]
File = Annotated[Path, arg(metavar="FILE")]
Text = Annotated[str, arg(metavar="TEXT")]
Name = Annotated[str, arg(metavar="NAME")]
N = Annotated[int, arg(metavar="N")]
Number = Annotated[float, arg(metavar="X")]
Settings = Annotated[tuple[tuple[str, ...], ...], UseAppendAction, arg(metavar="KEY=VALUE ...")]
"""Settings to change; the option may be repeated, each time with one or several settings."""
Precision = Literal["auto", "fp32", "bf16"]
Quantization = Literal["none", "int8", "fp8", "nf4"]
