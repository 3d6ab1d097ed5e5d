"""One run for all tasks: check, open, read text, change, write, verify, measure, report."""
