"""The command line: what a person did wrong is said in one line, without a traceback."""

import pytest

from thinkstack import cli


def ended_with(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    monkeypatch.setattr("sys.argv", ["thinkstack", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return str(end.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "v3-tinny"), "v3-tinny"),
        (("chat", "no/such/folder"), "no/such/folder"),
        (("demo", "--scale", "smok", "--out", "{tmp}"), "did you mean demo_smoke?"),
        (("demo", "--out", "{tmp}", "--set", "stages.zero.group_sise=3"), "did you mean stages.zero.group_size?"),
        (("rollouts", "{tmp}", "--step", "3"), "has no rollouts of step 3; kept: none"),
        (("run", "recipe.toml", "--out", "{tmp}"), "no recipe 'recipe.toml'"),
    ],
)
def test_a_mistake_ends_in_one_line_with_the_way_out(monkeypatch, tmp_path, arguments, message):
    found = ended_with(monkeypatch, *(word.format(tmp=tmp_path) for word in arguments))
    assert found.startswith("thinkstack: ") and message in found and "\n" not in found


def test_settings_may_be_given_together_or_one_by_one(monkeypatch, tmp_path):
    """Of several --set only the last one counted."""
    given: list[tuple[str, ...]] = []
    monkeypatch.setattr("thinkstack.pipeline.read_recipe", lambda recipe, scale, settings: given.append(settings))
    monkeypatch.setattr("thinkstack.pipeline.run_recipe", lambda recipe, out: None)
    words = ["run", "demo", "--out", str(tmp_path), "--set", "a.b=1", "c=[2]", "--seed", "3", "--set", "d=4"]
    monkeypatch.setattr("sys.argv", ["thinkstack", *words])
    cli.main()
    assert given == [("shared.seed=3", "a.b=1", "c=[2]", "d=4")]


def test_inspect_says_the_published_counts(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["thinkstack", "inspect", "v3-671b"])
    cli.main()
    shown = capsys.readouterr().out
    assert "671,026,404,352" in shown and "70,272 bytes" in shown
