"""What scripts do that need more than one function of another package."""

from dataset.toy.options import PretrainArguments
from engine.config.evaluation import InferenceArguments


def run_inference(arguments: InferenceArguments) -> None:
    """Evaluate on a dataset or two folders, score images, or calibrate; raises `UserError` as these functions do."""
    from engine.evaluation.calibrate import calibrate_images
    from engine.evaluation.inference import evaluate_checkpoints
    from engine.evaluation.own_images import score_images

    if arguments.mode() == "image":
        score_images(arguments)
    elif arguments.mode() == "calibrate":
        calibrate_images(arguments)
    else:
        evaluate_checkpoints(arguments)


def pretrain(arguments: PretrainArguments) -> None:
    """Pre-train the toy CLIP on a device with a number of threads."""
    import torch

    from dataset.toy.pretraining import pretrain_toy_clip
    from engine.runtime.device import check_device

    device = check_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    pretrain_toy_clip(arguments, device)
