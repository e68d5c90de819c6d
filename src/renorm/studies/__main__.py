"""Write the documentation's pages of the studies from their results: ``python -m renorm.studies docs/studies``."""

import sys
from pathlib import Path

from renorm.studies.page import contents, write
from renorm.studies.run import Results

if len(sys.argv) != 2:
    sys.exit("usage: python -m renorm.studies FOLDER, whose results/ has a file for each study that was run")
folder = Path(sys.argv[1])
found = {path.stem: Results.load(path) for path in sorted((folder / "results").glob("*.json"))}
for results in found.values():
    write(results, folder)
(folder / "index.md").write_text(contents(found), encoding="utf-8")
