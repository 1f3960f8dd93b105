"""The published repository in Docker: images, Compose, reload, push. People call these by `make image`, `make up`,
`make push`; they read the repository and talk to the Docker engine.
"""
