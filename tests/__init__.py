HANG_SECONDS = 1800
"""When a process that a test started counts as hung: a hundred times what any takes, for machines are slow at times."""
