"""weights.zip and model_repository_running.zip: download, resume, lock, unpack. Make calls these when a step has to
read an archive; they write training/ and nothing else.
"""
