"""Check a model repository without a server, then serve it by a real Triton. Make calls these scripts for the verdict,
`make verify` and `make serve`; they write reports and a staging folder.
"""
