"""The one client of OpenAI-compatible endpoints: retries, limits, budgets, a cache by content."""
