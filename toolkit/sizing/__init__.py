"""How much memory a run needs, term by term, and the settings that follow."""
