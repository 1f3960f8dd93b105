"""What is published, from what, and how to go back. Make calls these once the verdict is there; only this room writes
the published repository.
"""
