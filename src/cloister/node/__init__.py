"""The node: inside the TEE it measures, attests, unlocks, confines, runs and seals."""
