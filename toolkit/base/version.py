"""The version of the toolkit. This module is in the lowest layer because reports of all layers
contain the version.
"""

__version__ = "0.1.0"
