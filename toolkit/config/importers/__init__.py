"""Convert configs of other training tools to run files, and list what could not be converted.

There is one module for each format (axolotl, trl, scripts, verl, prime_rl, swift), with a table of
its keys. Nothing in the files is executed. Scripts and notebooks are read with ``ast``.
"""

from toolkit.config.importers.formats import TABLES, guess, read_foreign
from toolkit.config.importers.mapping import Translation
from toolkit.config.importers.translate import translate
from toolkit.config.importers.write import run_file_text

__all__ = ["TABLES", "Translation", "guess", "read_foreign", "run_file_text", "translate"]
