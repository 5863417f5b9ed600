"""Convert configs of other training tools to run files, and list the settings that could not be
converted.

Each format has a module with a table of its keys (axolotl, trl, scripts, verl, prime_rl, swift).
The code in a file is never executed. Scripts and notebooks are parsed with the module ``ast``.
"""

from toolkit.config.importers.formats import TABLE_MODULES, guess_format, read_foreign_config
from toolkit.config.importers.mapping import Translation
from toolkit.config.importers.translate import translate
from toolkit.config.importers.write import run_file_text

__all__ = [
    "TABLE_MODULES",
    "Translation",
    "guess_format",
    "read_foreign_config",
    "run_file_text",
    "translate",
]
