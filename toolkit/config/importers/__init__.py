"""Configs of other tools as run files: what each key is called here, and what could not be read.

One module a format (axolotl, trl, scripts, verl, prime_rl, swift), each with its table of keys.
Nothing of a foreign file is executed: scripts and notebooks are read by ``ast``.
"""

from toolkit.config.importers.formats import TABLES, guess, read_foreign
from toolkit.config.importers.mapping import Translation
from toolkit.config.importers.translate import translate
from toolkit.config.importers.write import run_file_text

__all__ = ["TABLES", "Translation", "guess", "read_foreign", "run_file_text", "translate"]
