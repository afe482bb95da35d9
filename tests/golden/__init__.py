"""Replay of golden vectors: ``python -m tests.golden DIR [DIR ...]``."""
