"""Testing: metrics of checkpoints on datasets, single images, loops beside one another, heatmaps."""
