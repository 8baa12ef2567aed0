"""LightningCLI with this project's defaults: one Trainer verb, a model and its data from a config file."""

from __future__ import annotations

import argparse
import inspect
import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from fluxsae.cli.config_arguments import Arguments, ConfigFile, read_arguments
from fluxsae.cli.config_errors import explain, is_report
from fluxsae.data import Throughput
from fluxsae.files import remove_parts, unknown_key, whole_file, write_text
from fluxsae.records import WHICH_IMAGES, differences
from fluxsae.runtime import LastCheckpoint, StopsWhereItCanGoOn
from fluxsae.sae import SAE, load_sae
from fluxsae.training import SAETraining, SweepTraining

NOISE = (
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",  # between Lightning and torch
    r".*Checkpoint directory .* exists and is not empty",  # a stage that is run again goes on in its own folder
    r".*does not have many workers",  # shards are memory-mapped, and prompts are a list
    r".*The number of training batches .* is smaller than the logging interval",
    r".*Your `IterableDataset` has `__len__` defined",  # it counts what each process yields
    r".*torch\.distributed\.nn\.functional\.all_gather is deprecated",  # between Lightning and torch
    r".*predict returned None",  # predictions go to callbacks
)
"""Warnings that hold for this project's users in no case, and why."""

DEFAULTS: dict[str, Any] = {"num_sanity_val_steps": 0, "enable_model_summary": False}
"""Trainer defaults: validation has nothing to try out in advance, and the config says how large the model is."""

STEPS = {"fit": "training_step", "validate": "validation_step", "test": "test_step", "predict": "predict_step"}
"""What a module defines that a verb is for."""


class WholeConfig(SaveConfigCallback):
    """The config of a training beside its logs, once nothing has been found to refuse."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = trainer.log_dir  # asked by every process: it is broadcast
        if trainer.is_global_zero and folder is not None:
            write_text(Path(folder) / self.config_filename, self.parser.dump(self.config, skip_none=False))


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that appear under their names only when they are whole and on disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        remove_parts(path)  # of a run that was killed: they are large
        with whole_file(path) as temporary:
            torch.save(checkpoint, temporary)


class TrainerCLI(LightningCLI):
    """Subclass mode: `model` and `data` are a class_path and init_args. Only the verb's own parser is built."""

    verb = "fit"

    @classmethod
    def start(cls, verb: str, arguments: Sequence[str], run: bool = True, root: Path | None = None) -> TrainerCLI:
        """Parse `arguments`, instantiate and, unless `run` is False, run `verb`; `root` is the study's folder.

        Raises argparse.ArgumentError, in one sentence, for whatever does not fit the signatures.
        """
        # LightningCLI asks the class which verbs there are; a parser for each would cost a second.
        one_verb = type(cls.__name__, (cls,), {"verb": verb})
        strict = {"exit_on_error": False, "allow_abbrev": False}
        given = read_arguments(arguments, root)
        _check_top_level(verb, given.files)
        with warnings.catch_warnings():
            for message in NOISE:
                warnings.filterwarnings("ignore", message=message)
            # Lightning 2 speaks to jsonargparse as to its version 4.48.
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.pytorch\.cli")
            return cls._start(one_verb, verb, given, strict, run)

    @staticmethod
    def _start(
        one_verb: type[TrainerCLI], verb: str, given: Arguments, strict: dict[str, Any], run: bool
    ) -> TrainerCLI:
        try:
            return one_verb(
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                seed_everything_default=0,
                save_config_callback=WholeConfig if verb == "fit" and run else None,
                trainer_defaults=DEFAULTS | ({} if verb == "fit" else {"logger": False}),
                parser_kwargs={"prog": "fluxsae", **strict, verb: {**strict, "usage": _usage(verb)}},
                args=[verb, *given.words()] if run else given.words(),
                run=run,
            )
        except (argparse.ArgumentError, ValueError) as error:
            if isinstance(error, ValueError) and not is_report(str(error)):
                raise
            known = {"": _top_level(verb), "trainer": inspect.signature(Trainer).parameters}
            text = explain(str(error), known, given.files)
            raise argparse.ArgumentError(None, text) from error

    def before_instantiate_classes(self) -> None:
        """ValueError for a config that is another verb's, before anything is loaded for it."""
        values = self.config.get(self.verb, self.config)
        if values.model is not None:
            _check_verb(self.verb, values.model.class_path)

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:  # type: ignore[override]
        return {cls.verb: LightningCLI.subcommands()[cls.verb]}

    def instantiate_trainer(self, **options: Any) -> Trainer:
        if isinstance(self.model, (SAETraining, SweepTraining)):
            options = {"default_root_dir": self._default_root_dir(self.model.folder), **options}
        trainer = super().instantiate_trainer(**options)
        if isinstance(self.model, (SAETraining, SweepTraining)):
            _keep_checkpoints(trainer, self.model.folder / "checkpoints")
        trainer.callbacks.insert(0, StopsWhereItCanGoOn())  # type: ignore[attr-defined]
        if self.verb == "fit":
            trainer.callbacks.append(Throughput())  # type: ignore[attr-defined]
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()
        return trainer

    def _default_root_dir(self, folder: Path) -> Path:
        """Where logs go: beside the SAE, so that they follow it when its folder is overridden."""
        configured = self._get(self.config_init, "trainer", default={}).get("default_root_dir")
        return folder if configured is None else Path(configured)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Lightning's own warns when there are arguments on the command line as well, as there always are here."""
        assert isinstance(args, list)
        self.config = parser.parse_args(args)

    def predict(self, model: LightningModule, **kwargs: Any) -> None:
        """Predictions go to callbacks; a list of them all would fill the memory."""
        kwargs["return_predictions"] = bool(kwargs.get("return_predictions"))
        self.trainer.predict(model, **kwargs)

    def validate(self, model: LightningModule, **kwargs: Any) -> None:
        _load_trained(model, **kwargs)
        self.trainer.validate(model, **kwargs)

    def test(self, model: LightningModule, **kwargs: Any) -> None:
        _load_trained(model, **kwargs)
        self.trainer.test(model, **{**kwargs, "verbose": isinstance(model, (SAETraining, SweepTraining))})


def _keep_checkpoints(trainer: Trainer, folder: Path) -> None:
    """Beside the SAE, where no other folder is named; before `--ckpt_path last` is looked for."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, LastCheckpoint) and callback.dirpath is None:
            callback.dirpath = str(folder)


def _load_trained(model: LightningModule, datamodule: Any = None, ckpt_path: Any = None, **_: Any) -> None:
    """A training config names an untrained SAE; measuring means the one in its folder, unless a checkpoint is named."""
    if isinstance(model, SweepTraining):
        for member in model.trainings.values():
            _load_trained(member, datamodule, ckpt_path)
    if not isinstance(model, SAETraining) or ckpt_path is not None:
        return
    trained = load_sae(model.folder)
    if type(trained) is not type(model.sae) or trained.W_dec.shape != model.sae.W_dec.shape:
        raise ValueError(
            f"{model.folder} holds {_shape(trained)} but the config says {_shape(model.sae)}; fit it first."
        )
    other = []
    if trained.spec is not None and datamodule is not None:
        other = differences(trained.spec, datamodule.spec, ignore=WHICH_IMAGES)
    if other:
        raise ValueError(f"{model.folder} was trained on another capture ({'; '.join(other)}); fit it again.")
    model.sae.load_state_dict(trained.state_dict())


def _check_verb(verb: str, class_path: str) -> None:
    module, _, name = class_path.rpartition(".")
    model = getattr(import_module(module), name)
    fitting = [v for v, step in STEPS.items() if getattr(model, step, None) is not getattr(LightningModule, step)]
    if verb not in fitting:
        commands = " or ".join(f"`fluxsae {other}`" for other in fitting)
        raise ValueError(f"{name} is nothing to {verb}; run its config with {commands}.")


def _usage(verb: str) -> str:
    return (
        f"fluxsae {verb} -c CONFIG [-c CONFIG ...] [--root DIR] [--KEY VALUE ...]\n\n"
        "--root is the study's folder, ${root} in a config, if not the one that the study.yaml beside it says. "
        "Any key of the config file can be given here too, as in --trainer.devices 2. For the keys of a model, data "
        f"set or callback:\n  fluxsae {verb} --model.help fluxsae.FluxCapture"
    )


def _shape(sae: SAE) -> str:
    return f"a {type(sae).__name__} of {sae.n_features} features and width {sae.d_in}"


def _check_top_level(verb: str, files: Sequence[ConfigFile]) -> None:
    """jsonargparse passes over an unknown key that has nothing under it."""
    known = _top_level(verb)
    for file in files:
        for key in file.values:
            if key not in known:
                raise ValueError(unknown_key(str(key), known, str(file.path)))


def _top_level(verb: str) -> list[str]:
    method = partial(getattr, Trainer)(verb)
    skip = {"self", "model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"}
    return ["model", "data", "trainer", "seed_everything", *(set(inspect.signature(method).parameters) - skip)]
