"""When is a file true, and what is done when it is not: records, steps, the shared cache. Make calls these before
and for every step; they write .make/ and a step's one output. Standard library only.
"""
