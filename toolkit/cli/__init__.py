"""The commands ``toolkit`` and ``envcheck``.

A function imports slow modules such as torch itself, after the arguments are parsed. So ``--help``
and errors of the command line appear at once.
"""
