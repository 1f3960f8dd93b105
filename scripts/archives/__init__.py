"""Download, resume, lock and unpack weights.zip and model_repository_running.zip. Make calls these scripts when a step
has to read an archive. They write training/ and nothing else.
"""
