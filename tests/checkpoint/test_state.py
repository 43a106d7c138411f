"""Atomic writes of folders."""

from pathlib import Path

import pytest
import torch

from thinkstack.checkpoint.state import current, load_state, save_state, write_folder
from thinkstack.types import ConfigError


def test_state_round_trips(tmp_path: Path):
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([1, 2])}  # a is not contiguous
    save_state(tmp_path / "state", tensors, {"step": 3, "stream": {"position": 7, "waiting": [1]}})
    found = load_state(tmp_path / "state")
    assert found is not None
    assert all(torch.equal(found[0][name], value) for name, value in tensors.items())
    assert found[1] == {"step": 3, "stream": {"position": 7, "waiting": [1]}}
    assert load_state(tmp_path / "none") is None


def test_a_failed_write_leaves_the_older_folder_and_nothing_else(tmp_path: Path):
    save_state(tmp_path / "state", {"a": torch.ones(1)}, {})

    def no_space(target: Path) -> None:
        (target / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match=r"state: .*No space left.*free space"):
        write_folder(tmp_path / "state", no_space)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert load_state(tmp_path / "state") is not None


def test_any_other_failure_leaves_nothing_half_written(tmp_path: Path):
    def stop(target: Path) -> None:
        (target / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "model", stop)
    assert list(tmp_path.iterdir()) == []


def test_a_replacement_interrupted_between_its_two_renames_is_restored(tmp_path: Path):
    save_state(tmp_path / "state", {"a": torch.ones(1)}, {"step": 1})
    (tmp_path / "state").rename(tmp_path / "state.old")
    assert current(tmp_path / "state").exists()
    found = load_state(tmp_path / "state")
    assert found is not None and found[1] == {"step": 1}


@pytest.mark.parametrize("half", ["state.old", "state.writing"])
def test_leftovers_of_a_killed_write_do_not_block_the_next(half: str, tmp_path: Path):
    """Regression: a process killed after the second rename left state.old beside state; the next write could not rename
    onto it, and the resumed run failed at its first save."""
    save_state(tmp_path / "state", {"a": torch.ones(1)}, {"step": 1})
    (tmp_path / half).mkdir()
    (tmp_path / half / "state.json").write_text("{}")
    save_state(tmp_path / "state", {"a": torch.ones(1)}, {"step": 2})
    found = load_state(tmp_path / "state")
    assert found is not None and found[1] == {"step": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_damaged_state_is_named(tmp_path: Path):
    save_state(tmp_path / "state", {"a": torch.ones(100)}, {"step": 1})
    file = tmp_path / "state" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ConfigError, match="is damaged"):
        load_state(tmp_path / "state")
