"""What runs, where, and whether it is already done."""
