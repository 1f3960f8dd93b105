"""From CT studies to tables of findings: `make infer` and the inference image.

This room uses no other room, because the image holds this folder alone. It writes only the OUTPUT folder.
"""
