"""The commands of docs/deployment.md: options that exist, files that exist, and an install line for each tool."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.deploy.processes import ROOT, ROUTER
from tests.deploy.tools import TOOLS, run_tool
from thinkstack import cli

PAGE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
WORDS = [
    shlex.split(re.sub(r"\s#.*|\s+\|.*|\s&&.*", "", line))
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if "<<" not in line
]


def commands(name):
    """Command lines of a program, without what stands before its name."""
    return [words[words.index(name) :] for words in WORDS if name in words and words[0] not in ("apt-get", "pip")]


def test_every_command_of_the_package_has_the_options_that_are_shown():
    found = commands("thinkstack")
    assert len(found) >= 6
    for words in found:
        if words[1:] and words[1] in ("serve", "keys"):
            assert callable(cli._parse(words[1:])), words


def test_the_unit_and_the_containers_start_commands_that_exist():
    unit = (ROOT / "deploy" / "thinkstack.service").read_text()
    (line,) = re.findall(r"^ExecStart=\S+ (.*)$", unit, re.MULTILINE)
    (given,) = re.findall(r"'SERVE=(.*)'", PAGE)
    assert callable(cli._parse(line.replace("$SERVE", given).split()))
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    assert callable(cli._parse(compose["services"]["server"]["command"]))
    for document in yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / "server.yaml").read_text()):
        if document["kind"] == "Deployment":
            assert callable(cli._parse(document["spec"]["template"]["spec"]["containers"][0]["args"]))


def test_vllm_router_has_the_options_that_are_shown_and_the_tests_use_them():
    (words,) = commands("vllm-router")
    listed = set(re.findall(r"--[a-z-]+", run_tool("vllm-router", "--help")))
    assert {word for word in words if word.startswith("--")} <= listed
    shown = " ".join(words)
    assert all(option.replace("=", " ") in shown for option in ROUTER)


def test_every_file_and_service_that_a_command_names_exists():
    names = {word for words in WORDS for word in words if word.startswith(("deploy/", "examples/"))}
    assert len(names) >= 6
    assert [name for name in names if name != "deploy/.env" and not Path(ROOT, name).exists()] == []
    for module in (words[-1] for words in WORDS if words and words[-1].startswith("examples.")):
        file, _, name = module.partition(":")
        assert re.search(rf"^(class )?{name}\b", (ROOT / f"{file.replace('.', '/')}.py").read_text(), re.MULTILINE)


def test_every_alert_is_explained():
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    assert alerts == set(re.findall(r"^\| `(Thinkstack\w+)`", PAGE, re.MULTILINE))


@pytest.mark.parametrize("name", TOOLS)
def test_every_tool_has_its_install_line(name):
    assert TOOLS[name] in PAGE
