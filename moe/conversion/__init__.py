"""Conversions of dense networks into mixtures of experts, and back."""
