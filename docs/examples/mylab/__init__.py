"""A package of somebody else: one field, view, method, run and reader, handed to imkd as values."""
