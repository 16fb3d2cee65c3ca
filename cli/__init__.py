"""The command line: one command a file, options generated from the stage's settings. `kdprune_cli` when installed."""
