"""What trains: engines behind one protocol."""
