"""Decide whether a file is true, and make it if it is not: records, steps, the shared cache. Make calls these scripts
before it decides and for every step. They write .make/ and the one output of a step. Standard library only.
"""
