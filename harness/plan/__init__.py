"""What will it cost? Partition and schedule of a layout, without running it and without torch."""
