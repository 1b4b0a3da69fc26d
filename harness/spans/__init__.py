"""What is time made of? Spans, the bubble, the accounting of a step, their files; no torch."""
