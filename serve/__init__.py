"""Answering requests: inference, adaptation, domain states."""
