"""Raw files as tables: tolerant reading, findings, and cleaning to the schema's types."""
