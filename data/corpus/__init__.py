"""Where text comes from: sources, readers, ingestion."""
