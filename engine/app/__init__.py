"""The page: images in, maps and decisions out, without files of the user's being read or written by name."""
