"""Numbers about artefacts, for people to read."""
