"""The command that rates an evaluation of Codeforces by the standings of its contests."""

from pathlib import Path

from thinkstack.evals.contests import RATED, rate, read_standings
from thinkstack.evals.records import read_samples
from thinkstack.evals.regrade import find_samples
from thinkstack.stages.evaluate import replace_records
from thinkstack.types import ConfigError


def rate_run(run: Path, standings: Path, seed: int) -> Path:
    """Write the rating of a run into its results; return the folder of its stage.

    seed: of the re-run error. Raises ConfigError like `rate` and `read_standings`, and for a run without the task.
    """
    samples = find_samples(run)
    records = read_samples(samples)
    rated = [record for record in records if record.task == RATED]
    if not rated:
        raise ConfigError(f"{samples} has no problems of {RATED}; evaluate it first")
    replace_records(samples.parent, records, contests=rate(rated, read_standings(standings), seed))
    return samples.parent
