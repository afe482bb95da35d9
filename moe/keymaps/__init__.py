"""Official checkpoint names and key maps, one file per method."""
