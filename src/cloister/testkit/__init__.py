"""Public helpers for tests: soft TEEs, a fixed clock, scripted evidence. Users test their integration with them."""
