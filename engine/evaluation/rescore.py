"""The metrics of anomaly maps of any method, from files: `python -m engine.evaluation.rescore`."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from engine.config.evaluation import ORIGINAL, ProtocolArguments, RescoreArguments
from engine.data.task import TaskData, load_task, mask_notes
from engine.evaluation.evaluate import BatchScores, ClassScores, count_pixels, in_catalog
from engine.evaluation.maps import SCORES_COLUMNS, SCORES_FILE, find_maps, match_paths, read_map, read_truth
from engine.evaluation.results import ClassResult, Evaluation, evaluation_csv, evaluation_table, file_suffix
from utils.arguments import make_parser
from utils.errors import UserError
from utils.files import check_folder, write_text
from utils.logging import set_up_logging, with_progress
from utils.paths import is_file, safe_name
from utils.reading import read_table
from utils.script import run_script

logger = logging.getLogger(__name__)

# Image score and det score; the latter is NaN for other methods.
Scores = Mapping[str, tuple[float, float]]


def rescore(arguments: RescoreArguments) -> list[Evaluation]:
    """Match maps with a dataset's images, and write their metrics to `rescored_DATASET.csv`.

    Args:
        arguments: The arguments of `python -m engine.evaluation.rescore`.

    Returns:
        An evaluation for each map size.

    Raises:
        UserError: For maps or scores that cannot be read, are not finite, or match ambiguously.
    """
    folder = arguments.output_dir or arguments.maps
    check_folder(folder, "--output_dir")
    data = load_task(arguments.dataset, *arguments.image_choices())
    maps = find_maps(arguments.maps, data.records)
    for note in mask_notes(data):
        logger.warning("%s", note)
    name = arguments.name or arguments.maps.resolve().name
    protocols: dict[str, ProtocolArguments] = {name: arguments}
    if arguments.map_size is None:
        protocols[f"{name}, original size"] = replace(arguments, map_size=ORIGINAL)
    results = evaluate_maps(data, maps, read_scores(arguments, data), list(protocols.values()))
    dataset = data.located.spec.name
    evaluations = [
        Evaluation(name, dataset, classes, "", protocol)
        for (name, protocol), classes in zip(protocols.items(), results, strict=True)
    ]
    for each in evaluations:
        note = each.protocol.note
        logger.info("\n%s on %s, in percent%s\n\n%s\n", each.model, dataset, note, evaluation_table(each))
    path = folder / f"rescored_{safe_name(dataset)}{file_suffix(arguments.note)}.csv"
    write_text(path, evaluation_csv(evaluations))
    logger.info("Written to %s", path)
    return evaluations


def read_scores(arguments: RescoreArguments, data: TaskData) -> Scores:
    """The scores of `--scores` or next to the maps, by the image's path; none without such a file."""
    file = arguments.scores or arguments.maps / SCORES_FILE
    if arguments.scores is None and not is_file(file):
        return {}
    scores = {}
    for source, row in read_table(file, "--scores", SCORES_COLUMNS[:2]):
        try:
            scores[row["path"]] = (float(row["score"]), float(row.get("det_score") or math.nan))
        except ValueError:
            raise UserError(f"{source}: {row['score']!r} is not a number") from None
    return {image: scores[name] for image, name in match_paths(scores, data.records, f"--scores {file}").items()}


def evaluate_maps(
    data: TaskData, maps: Mapping[str, Path], scores: Scores, protocols: Sequence[ProtocolArguments]
) -> list[list[ClassResult]]:
    """The metrics of maps by each protocol, of classes with maps; each map is read once."""
    results: list[list[ClassResult]] = [[] for _ in protocols]
    domain, published = data.located.spec.domain, in_catalog(data)
    for class_name in data.classes:
        records = [record for record in data.of_class(class_name) if record.image_path in maps]
        masked = not data.lacking_masks(class_name)
        of_class = [ClassScores(domain, published, protocol, protocol.thresholds) for protocol in protocols]
        for record in with_progress(records, f"rescoring {class_name}"):
            anomaly_map = torch.from_numpy(read_map(maps[record.image_path]))[None]
            low, high = anomaly_map.aminmax()
            if scores and record.image_path not in scores:
                raise UserError(f"--scores has no score of {record.image_path}: add it, or leave the image's map out")
            score, det = scores.get(record.image_path, (float(high), math.nan))
            numbers = torch.tensor([[score], [high], [low], [det]])
            for protocol, class_scores in zip(protocols, of_class, strict=True):
                truths = [read_truth(data, record, protocol.map_size or anomaly_map.shape[1:])] if masked else []
                counted = count_pixels(anomaly_map, anomaly_map, truths, [record.image_path], protocol.thresholds)
                class_scores.add(BatchScores(numbers, *counted), [record.image_path], torch.tensor([record.label]))
        for classes, class_scores in zip(results, of_class, strict=True):
            if records:
                classes.append(class_scores.result(class_name))
    return results


def parse_arguments() -> RescoreArguments:
    parser = make_parser(RescoreArguments, "Compute the metrics of anomaly maps of any method on a dataset.")
    return RescoreArguments.of(**vars(parser.parse_args()))


def main() -> None:
    arguments = parse_arguments()
    set_up_logging()
    arguments.check()
    rescore(arguments)


if __name__ == "__main__":
    run_script(main)
