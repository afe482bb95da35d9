"""One file per algorithm; the listing of this folder is the catalogue."""
