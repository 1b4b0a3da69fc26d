"""What did it cost? Run directories, rows, reports, plots and the wandb mirror; no torch."""
