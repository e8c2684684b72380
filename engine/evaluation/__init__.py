"""Testing: metrics of checkpoints on datasets, single images, loops side by side, heatmaps."""
