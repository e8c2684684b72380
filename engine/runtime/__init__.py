"""Device, processes and the files of a run's folder."""
