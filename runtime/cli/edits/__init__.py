"""The commands that edit a scene, a file per command."""
