"""The batch-size schedule: rows of each step, and the share of the run's tokens before it."""

from thinkstack.types import ConfigError


class BatchSchedule:
    """Rows of each step: from rows_start up to `rows` over the first ramp_share of the run's tokens, then constant.

    The run has the tokens of `steps` steps of `rows` rows with or without a ramp: smaller batches at the beginning mean
    more steps, not fewer tokens. Rows grow linearly with the tokens seen (V3 report, section 4.2: 3,072 to 15,360
    sequences over the first 469B of 14.8T tokens). Tokens include padding.
    """

    def __init__(self, steps: int, rows: int, rows_start: int = 0, ramp_share: float = 0.0):
        """steps: number of full-sized steps. rows_start: 0 means no ramp. ramp_share: 0..1, of the run's tokens.

        Raises ConfigError for a ramp that does not grow or has no length.
        """
        if rows_start and not 0 < rows_start <= rows:
            raise ConfigError(f"rows_start={rows_start} must lie in 1..rows={rows}; 0 means no ramp")
        if not 0 <= ramp_share <= 1 or bool(rows_start) != bool(ramp_share):
            raise ConfigError(
                f"rows_start={rows_start} and ramp_share={ramp_share} define no ramp; set both, the share within 0..1, "
                "or neither"
            )
        self.total = steps * rows
        """Rows of the whole run; the last step may exceed it by less than a batch."""
        ramp = ramp_share * self.total
        self.rows: list[int] = []
        """Rows of each step."""
        self.before: list[int] = []
        """Rows of all steps before each step."""
        seen = 0
        while seen < self.total:
            self.before.append(seen)
            self.rows.append(rows if seen >= ramp else rows_start + int((rows - rows_start) * seen / ramp))
            seen += self.rows[-1]

    def progress(self, step: int) -> float:
        """Share of the run's tokens before `step`."""
        return self.before[step] / self.total
