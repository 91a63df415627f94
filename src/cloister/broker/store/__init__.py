"""What the broker remembers: a signed log on a disk that nobody has to trust, and the tables it folds to."""
