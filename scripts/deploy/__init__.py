"""The published repository in Docker: images, Compose, reload, push. `make image`, `make up`, `make reload` and
`make push` call these scripts; they read the repository and call the Docker engine.
"""
