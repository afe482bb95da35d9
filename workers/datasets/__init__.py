"""One file per data set; the listing of this folder is the catalogue."""
