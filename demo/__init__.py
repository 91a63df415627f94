"""The main job as a story: what `./run job` plays, with the same command line that users have."""
