"""Loading a sharded FP8 checkpoint of the V3 architecture: `python bench/loading.py [--gigabytes 2] [--json FILE]`.

The checkpoint is made of drawn bytes in a temporary folder: several shards, an MTP layer, scales for every matrix. It
is loaded as bf16 and as FP8. Memory: each in a process of its own, the peak of its resident memory less what was
resident before, over the bytes of the loaded model. Time: against a plain read of the same files into memory, in
alternating pairs in one process; warm, from the system's cache, and cold, after that cache was told to drop them.
"""

import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import thinkstack  # noqa: F401  # before torch: it says how threads wait

# isort: split
import numpy
import torch
from common import Comparison, Row, arguments, compare, machine, print_comparisons, print_table, write_json
from memory import resident
from torch import Tensor

from thinkstack.checkpoint.hf.files import CONFIG, config_json, write_weights
from thinkstack.checkpoint.hf.tensors import shapes_on_disk, tensor_entries
from thinkstack.checkpoint.model import load_model
from thinkstack.checkpoint.source import OutputFormat, TensorSource
from thinkstack.machine import prepare_machine
from thinkstack.models.config import MLAConfig, ModelConfig, MoEConfig, named
from thinkstack.models.transformer import Transformer
from thinkstack.quant.fp8 import E4M3, FP8Blocks
from thinkstack.quant.scheme import Parts

DTYPES = {"bf16": torch.bfloat16, "FP8": E4M3}
SHARD_BYTES = 4 * 10**8
EXPERT_NUMBERS = 3 * 2048 * 1024


def shape(gigabytes: float) -> ModelConfig:
    """V3's architecture with as many experts as the size asks for: 5 layers, 1 dense, and an MTP module."""
    num_experts = max(8, round((gigabytes * 1e9 - 4.2e8) / (5 * EXPERT_NUMBERS)))
    return named(
        "v3-671b",
        vocab_size=16384,
        hidden_size=2048,
        num_layers=5,
        attention=MLAConfig(
            num_heads=16, q_lora_rank=768, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        intermediate_size=5632,
        moe=MoEConfig(num_experts=num_experts, num_experts_per_tok=8, moe_intermediate_size=1024, route_scale=2.5),
    )


def make(folder: Path, cfg: ModelConfig) -> list[Path]:
    """Write the checkpoint; returns its shards."""
    quantization, shapes = FP8Blocks(), shapes_on_disk(cfg)

    def random_tensor(name: str) -> Tensor:
        return torch.randn(shapes[name], generator=torch.Generator().manual_seed(0)).bfloat16()

    def parts(name: str) -> Parts:
        empty = quantization.quantize(torch.empty(shapes[name], device="meta"))
        qweight = torch.empty(shapes[name], dtype=torch.uint8).random_(0, 127)
        return {"qweight": qweight.view(E4M3), "scale": torch.rand(empty["scale"].shape) / 448}

    items = [item for item in tensor_entries(cfg) if not item.is_copy]
    source = TensorSource(
        path=folder,
        cfg=cfg,
        tensors={item.name: partial(random_tensor, item.name) for item in items},
        dtypes={item.name: torch.bfloat16 for item in items},
        quantization=quantization,
        quantized={item.name: partial(parts, item.name) for item in items if item.is_matrix},
    )
    form = OutputFormat(quantization=quantization)
    (folder / CONFIG).write_text(json.dumps(config_json(source, form)), encoding="utf-8")
    write_weights(source, folder, form, SHARD_BYTES)
    return sorted(folder.glob("*.safetensors"))


def size_of(model: Transformer) -> int:
    """Bytes of everything that the model holds."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def measure_peak(folder: Path, dtype: str) -> None:
    """In a process of its own: print what the model takes and the peak while it was loaded."""
    before = resident("VmRSS")
    model = load_model(folder, DTYPES[dtype])
    print(json.dumps({"model": size_of(model), "peak": resident("VmHWM") - before}))


def peaks(folder: Path, threads: int) -> list[Row]:
    """Peak over model, by dtype."""
    rows = []
    for dtype in DTYPES:
        command = [sys.executable, __file__, "--threads", str(threads), "--peak", dtype, "--folder", str(folder)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ratio = found["peak"] / found["model"]
        print(
            f"{dtype}: the model takes {found['model'] / 1e9:.2f} GB, loading it {found['peak'] / 1e9:.2f} GB at most"
        )
        rows.append(Row(name=f"peak of loading as {dtype} / model", value=ratio, unit="", n=1, machine=machine()))
    return rows


def read_plainly(files: list[Path]) -> None:
    """All bytes of the files into memory, all kept until the end."""
    kept = [numpy.fromfile(file, numpy.uint8) for file in files]
    assert sum(part.nbytes for part in kept) == sum(file.stat().st_size for file in files)


def free_cache(files: list[Path]) -> None:
    """Ask the system to forget the contents of the files."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def times(folder: Path, files: list[Path], pairs: int) -> list[Comparison]:
    """Loading against reading, by dtype, warm and cold."""
    found = []
    for state, before in (("warm", lambda: None), ("cold", partial(free_cache, files))):
        for name, dtype in DTYPES.items():
            ours = partial(load_model, folder, dtype)
            found.append(
                compare(f"{name}, {state}", ours, partial(read_plainly, files), pairs, warm_up=1, before=before)
            )
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made; by default a temporary folder")
    parser.add_argument(
        "--peak", choices=list(DTYPES), help="only load and print the peak: for the processes it starts"
    )
    args = parser.parse_args()
    prepare_machine(args.threads)
    if args.peak:
        measure_peak(args.folder, args.peak)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = Path(place)
        files = make(folder, shape(args.gigabytes))
        print(f"{len(files)} shards, {sum(file.stat().st_size for file in files) / 1e9:.2f} GB")
        rows = peaks(folder, args.threads)
        found = times(folder, files, args.pairs)
    print_table("memory", ("", "peak / model"), [(row.name, f"{row.value:.3f}") for row in rows])
    print_comparisons("loading; peer: a plain read of the files", found)
    write_json(args.json, [*rows, *found])


if __name__ == "__main__":
    main()
