"""Arguments of `app.py`."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config.common import Arguments, MachineArguments, ModelArguments
from engine.config.evaluation import InferenceArguments, TestingArguments
from utils.fields import changed, setting

PORT = 7860


@dataclass(frozen=True, kw_only=True)
class AppArguments(Arguments):
    """Which models can be chosen on the page, and where it is served."""

    checkpoint: tuple[str, ...] | None = setting(
        None,
        "what can be chosen: files, folders (all epochs or loops), models on the hub, none for unadapted CLIP",
        "what to do",
        several=True,
        unset="the demo's models",
    )
    domain: str = changed(InferenceArguments, "domain", help="how images are scored")
    det_score: str | None = changed(TestingArguments, "det_score")
    model_name: str | None = changed(TestingArguments, "model_name")
    clip_weights: str | None = changed(ModelArguments, "clip_weights", unset="those trained with, else from the hub")
    img_size: int | None = changed(TestingArguments, "img_size")
    activation: str | None = changed(TestingArguments, "activation")
    surgery: str | None = changed(TestingArguments, "surgery")
    surgery_until_layer: int | None = changed(TestingArguments, "surgery_until_layer")
    device: str = changed(MachineArguments, "device", "cpu")
    host: str = setting(
        "127.0.0.1",
        "address to listen on; 0.0.0.0 lets in everyone who can reach this machine, without a password",
        "machine",
    )
    port: int = setting(PORT, "port to listen on", "machine", between=(1, 65535))
