"""The version. It is in the lowest layer because reports of all layers contain it."""

__version__ = "0.1.0"
