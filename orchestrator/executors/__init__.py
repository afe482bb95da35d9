"""Where members run: inline or on Ray."""
