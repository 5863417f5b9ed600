"""One file a family of checks; each check is one small function."""
