"""What is asked for? Configuration, its checks, and what follows from it alone; no torch."""
