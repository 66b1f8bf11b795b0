"""The teacher reads along: a scoring head inside vLLM, its engine, its signal, and whose
tokens are whose.
"""
