"""Without the extras, commands and modules say what to install, and nothing else imports the tools of others."""

import subprocess
import sys

import pytest

from thinkstack.stages.eval_logs import export_log, import_log
from thinkstack.types import ConfigError


@pytest.mark.parametrize("command", [export_log, import_log])
def test_commands_on_logs_name_the_missing_extra(tmp_path, monkeypatch, command):
    monkeypatch.delitem(sys.modules, "thinkstack.evals.adapters.inspect_log", raising=False)
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    with pytest.raises(ConfigError, match=r"inspect is not installed; install it: pip install 'thinkstack\[inspect\]'"):
        command(tmp_path, tmp_path / "out.eval")


def test_the_lm_eval_model_names_the_missing_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "thinkstack.evals.adapters.lm_eval", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ModuleNotFoundError, match=r"lm_eval is not installed; install it: pip install 'thinkstack\["):
        import thinkstack.evals.adapters.lm_eval  # noqa: F401


def test_evaluation_and_commands_import_no_tool_of_others():
    modules = "thinkstack.cli, thinkstack.stages.eval_logs, thinkstack.evals.adapters.local, thinkstack.stages.regrade"
    program = f"import sys, {modules}; sys.exit(bool({{'lm_eval', 'inspect_ai'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
