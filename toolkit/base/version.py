"""The version, below everything: reports of the light floor carry it."""

__version__ = "0.1.0"
