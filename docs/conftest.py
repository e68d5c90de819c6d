"""The pages' examples are tests; the scripts that build the pages need the extra "docs" and are not."""

collect_ignore_glob = ["*.py"]
