"""What everything else stands on: errors with exit codes, units. Imports nothing of ours."""
