"""Networks with mixtures of experts inside; importing this package imports nothing heavy."""
