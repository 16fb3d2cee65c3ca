"""The stages: one verb a file, each with one settings dataclass and one `run`. `kdprune_pipelines` when installed."""
