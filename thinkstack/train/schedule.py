"""The batch-size schedule: number of rows of each step, and share of the run's tokens before each step."""

from thinkstack.types import ConfigError


class BatchSchedule:
    """Rows of each step: a ramp from rows_start to `rows` over the first ramp_share of the run's tokens, then constant.

    With or without a ramp, the run has the tokens of `steps` steps of `rows` rows: a ramp means more steps, not fewer
    tokens. The number of rows grows linearly with the tokens seen (V3 report, section 4.2: 3,072 to 15,360
    sequences over the first 469B of 14.8T tokens). Tokens include padding.
    """

    def __init__(self, steps: int, rows: int, rows_start: int = 0, ramp_share: float = 0.0):
        """steps: number of full-sized steps. rows_start: 0 means no ramp. ramp_share: share of the run's tokens, 0..1.

        Raises ConfigError for a ramp that does not grow or has no length.
        """
        if rows_start and not 0 < rows_start <= rows:
            raise ConfigError(f"rows_start={rows_start} must lie in 1..rows={rows}; 0 means no ramp")
        if not 0 <= ramp_share <= 1 or bool(rows_start) != bool(ramp_share):
            raise ConfigError(
                f"rows_start={rows_start} and ramp_share={ramp_share} define no ramp; set both, with ramp_share "
                "in 0..1, or neither"
            )
        self.total = steps * rows
        """Number of rows of the run; the last step may exceed it by less than a batch."""
        ramp = ramp_share * self.total
        self.rows: list[int] = []
        """Number of rows of each step."""
        self.before: list[int] = []
        """Number of rows of all steps before each step."""
        seen = 0
        while seen < self.total:
            self.before.append(seen)
            self.rows.append(rows if seen >= ramp else rows_start + int((rows - rows_start) * seen / ramp))
            seen += self.rows[-1]

    def progress(self, step: int) -> float:
        """Share of the run's tokens before `step`."""
        return self.before[step] / self.total
