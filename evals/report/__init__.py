"""Report on a checkpoint: comparison table and HTML page, and reports on whole runs."""
