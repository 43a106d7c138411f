"""Tests of the chat page in Chromium: `pytest -m page`."""
