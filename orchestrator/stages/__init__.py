"""One file per stage kind; the listing of this folder is the catalogue."""
