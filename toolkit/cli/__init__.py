"""The commands ``toolkit`` and ``envcheck``.

Heavy imports happen inside the function that needs them, after the arguments are parsed.
"""
