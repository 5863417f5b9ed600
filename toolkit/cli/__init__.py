"""The commands.

Heavy imports happen inside the function that needs them, after the arguments are parsed.
"""
