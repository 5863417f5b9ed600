"""The commands ``toolkit`` and ``envcheck``.

Modules that are slow to import, such as torch, are imported inside the function that needs them,
after the arguments are parsed. Thus ``--help`` and usage errors appear at once.
"""
