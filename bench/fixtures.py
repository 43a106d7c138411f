"""Archives of tests/checkpoint/fixtures: tiny checkpoints as other tools write them, each in an environment of its own.

python bench/fixtures.py --llama-cpp FOLDER makes environments for transformers 4 and 5 with pip, runs
bench/peer_checkpoints.py there for transformers, TRL and PEFT, runs llama.cpp's converter
(FOLDER/convert_hf_to_gguf.py) on what transformers 5 wrote, packs one archive per tool, and deletes the environments.
Unsloth needs a GPU: what it adds to PEFT's files is written by hand.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

TRANSFORMERS = {"4": "transformers==4.57.6", "5": "transformers==5.24.0"}
"""Versions by the folder that their checkpoints lie in."""
PACKAGES = ("torch", "trl==1.16.0", "peft==0.21.2", "accelerate", "gguf", "sentencepiece")
WRITER = Path(__file__).with_name("peer_checkpoints.py")
FIXTURES = Path(__file__).parents[1] / "tests" / "checkpoint" / "fixtures"
LIMIT = 200_000
"""Bytes of all archives."""


def environment(folder: Path, transformers: str) -> str:
    """The interpreter of a new environment with that version of transformers."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", transformers, *PACKAGES], check=True)
    return python


def archive(folder: Path, path: Path) -> None:
    """Pack a folder so that equal contents are equal archives."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        return entry

    with tarfile.open(path, "w:xz", preset=9) as packed:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                packed.add(file, str(file.relative_to(folder)), filter=plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="folder of llama.cpp's sources")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "out"
        pythons = {place: environment(Path(work) / f"env{place}", version) for place, version in TRANSFORMERS.items()}
        for place, python in pythons.items():
            for tool in ("transformers", "trl", "peft"):
                subprocess.run([python, str(WRITER), tool, str(out / tool / place)], check=True)
        converter = args.llama_cpp / "convert_hf_to_gguf.py"
        given = ["--converter", str(converter), "--folders", str(out / "transformers" / "5")]
        subprocess.run([pythons["5"], str(WRITER), "llama_cpp", str(out / "llama_cpp" / "5"), *given], check=True)
        FIXTURES.mkdir(exist_ok=True)
        for tool in sorted(out.iterdir()):
            archive(tool, FIXTURES / f"{tool.name}.tar.xz")
    size = sum(path.stat().st_size for path in FIXTURES.glob("*.tar.xz"))
    print(f"{size:,} bytes in {FIXTURES}")
    if size > LIMIT:
        sys.exit(f"more than {LIMIT:,} bytes")


if __name__ == "__main__":
    main()
