"""Models as users have them: loading, layers, matrices, what is trained, fingerprints."""
