"""What is written for people to read: the comparison of a run's loops, the page, the commands that made it."""
