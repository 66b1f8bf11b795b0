"""Models this project makes itself: tiny ones for tests and trials, and the demo's pair from
a package.
"""
