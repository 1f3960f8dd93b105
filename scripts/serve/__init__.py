"""Is a model repository fit to be served: checked without a server, then served by a real Triton. Make calls these for
the verdict, `make verify` and `make serve`; they write reports and a staging folder.
"""
