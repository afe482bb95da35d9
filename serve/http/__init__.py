"""The HTTP surface: Open Inference Protocol, adaptation API, limits, errors, tokens, metrics."""
