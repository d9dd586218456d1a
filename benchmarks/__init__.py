"""Commands that measure the project, and the studies behind its decisions; see README.md in this folder."""
