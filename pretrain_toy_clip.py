"""Pre-train the toy CLIP on drawn image-caption pairs (docs/toy_world.md); writes an open_clip model folder."""

from dataset.toy.options import PretrainArguments
from engine.cli.runner import Script

script = Script(__doc__, PretrainArguments, "engine.cli.tasks.pretrain")

if __name__ == "__main__":
    script.run()
