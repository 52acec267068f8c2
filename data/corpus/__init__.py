"""Text sources, their readers, and ingestion into a data store."""
