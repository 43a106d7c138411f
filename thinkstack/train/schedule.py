"""How many rows each step of a run has, and how much of the run lies before it, counted in tokens."""

from thinkstack.types import ConfigError


class BatchPlan:
    """Rows of every step: from rows_start up to `rows` over the first ramp_share of the run's tokens, then constant.

    The run's length is that of `steps` steps of `rows` rows, whatever the ramp: smaller batches at the beginning mean
    more steps, not fewer tokens. Rows grow in proportion to the tokens seen (V3 report, section 4.2: 3,072 to 15,360
    sequences over the first 469B of 14.8T tokens). Tokens are those of whole rows, padding included.
    """

    def __init__(self, steps: int, rows: int, rows_start: int = 0, ramp_share: float = 0.0):
        """steps: full-sized ones. rows_start: 0 begins with `rows`. ramp_share: 0..1, of the run's tokens.

        Raises ConfigError for a ramp that does not climb, or one without length.
        """
        if rows_start and not 0 < rows_start <= rows:
            raise ConfigError(f"rows_start={rows_start} must lie in 1..rows={rows}; 0 begins with all rows")
        if not 0 <= ramp_share <= 1 or bool(rows_start) != bool(ramp_share):
            raise ConfigError(
                f"rows_start={rows_start} and ramp_share={ramp_share} make no ramp; give both, the share within 0..1, "
                "or neither"
            )
        self.total = steps * rows
        """Rows of the whole run; the last step may go beyond by less than a batch."""
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
        """Share of the run's tokens that lies before `step`."""
        return self.before[step] / self.total
