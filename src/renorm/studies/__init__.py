"""Published findings, run again: one file for each."""
