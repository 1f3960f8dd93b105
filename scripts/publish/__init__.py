"""Publish a set of models, say what it was made from, go back to the earlier one. Make calls these scripts after the
verdict. No other room writes to the published repository.
"""
