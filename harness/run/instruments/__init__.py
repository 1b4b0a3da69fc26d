"""What watches a rank while it works."""
