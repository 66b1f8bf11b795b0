"""A run to look at: the run directory in, one self-contained HTML file out. No network, no
library in the page.
"""
