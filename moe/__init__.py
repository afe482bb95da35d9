"""moepipe: mathematics in plain PyTorch."""
