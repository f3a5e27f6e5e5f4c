"""What every room may use and what uses none of ours: errors, specs, artifacts, records, seeds, logging."""
