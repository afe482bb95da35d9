"""One file per test-time adaptation method; the listing is the catalogue."""
