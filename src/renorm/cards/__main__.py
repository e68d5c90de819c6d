"""Write the documentation's pages of the zoo: ``python -m renorm.cards docs/zoo``."""

import sys
from pathlib import Path

from renorm.cards.pages import write

if len(sys.argv) != 2:
    sys.exit("usage: python -m renorm.cards FOLDER")
write(Path(sys.argv[1]))
