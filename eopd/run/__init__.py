"""A run as files: its directory, what is written there, how far it is, and who holds it. Nothing
here starts anything.
"""
