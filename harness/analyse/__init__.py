"""Where plan meets record: what a measured run says beside what was predicted; no torch."""
