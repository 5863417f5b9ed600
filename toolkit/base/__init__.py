"""The lowest layer: errors with exit codes, units, file access. It imports no other package of the
toolkit.
"""
