"""Mixture-of-experts layers: router, dispatch, experts, block."""
