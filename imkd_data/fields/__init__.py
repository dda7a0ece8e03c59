"""The list of fields is the cache."""
