"""Placeholder while the story is built."""
def play(job: object, file: object) -> None:
    """Nothing yet."""
