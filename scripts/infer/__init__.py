"""From CT studies to tables of findings: `make infer` and the inference image. Uses no other room, as the image holds
this folder alone; writes the OUTPUT folder.
"""
