"""What a rank is started for."""
