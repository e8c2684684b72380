"""The page: upload images, get maps and decisions; no file of the user is read or written by name."""
