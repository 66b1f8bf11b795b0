"""This project makes some models itself: tiny ones for tests and trials, and the demo's pair from a
package.
"""
