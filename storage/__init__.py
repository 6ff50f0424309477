"""Files on disk: written whole or not at all, hashed, locked, and never written over what is not ours."""
