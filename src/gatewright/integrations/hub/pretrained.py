"""A trained model as a folder that Hugging Face's hub understands: weights, settings, and a model card of the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download
from torch import nn

from gatewright.report.facts import class_names_of, experts_of, favourites_heading, item_of, result_facts, warnings
from gatewright.train.checkpoint.export import public_config, save_export
from gatewright.train.checkpoint.restore import PRETRAINED, load_run
from gatewright.train.config_file import settings_of
from gatewright.train.result import write_json

PIPELINES = {"classification": "image-classification", "language_model": "text-generation"}
"""What the hub calls the tasks of the package."""


class PretrainedModel(nn.Module, ModelHubMixin):
    """A trained model that can be saved for Hugging Face's hub, and loaded from there or from a folder.

    ``PretrainedModel("runs/sixteen").save_pretrained("sixteen")`` writes ``model.safetensors``, ``config.json``,
    ``result.json`` and a model card, ``README.md``. Everything that takes a run takes that folder too.

    It is in evaluation mode.

    Args:
        source: What `gatewright.train.load_run` takes: the folder of a run, an export, or a pretrained model.
    """

    def __init__(self, source: str | Path) -> None:
        super().__init__()
        self.trained = load_run(source)
        self.model = self.trained.model
        self.eval()

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Call the trained model."""
        return self.model(*inputs, **options)

    def generate_model_card(self, *args: Any, **metadata: Any) -> ModelCard:
        """Return the model card, filled from the run's result, if the run was finished.

        Args:
            args: Nothing: the signature is the mixin's.
            metadata: More of what the card says in its head, such as ``license="mit"``.
        """
        config, result = self.trained.config, self.trained.result
        head = {
            "library_name": "gatewright",
            "tags": ["mixture-of-experts"],
            "pipeline_tag": PIPELINES.get(config.task),
        }
        layers = result.get("layers", {}).items()
        card: ModelCard = ModelCard.from_template(
            ModelCardData(**head | metadata),
            template_path=str(Path(__file__).with_name("card.md")),
            name=config.recipe,
            facts=result_facts(_public(result)) if result else [],
            heading=favourites_heading(item_of(result)),
            layers=[(name, experts_of(layer, class_names_of(result))) for name, layer in layers],
            warnings=warnings(result) if result else [],
        )
        return card

    def _save_pretrained(self, save_directory: Path) -> None:
        save_export(self.trained, save_directory / PRETRAINED)
        write_json(settings_of(public_config(self.trained.config)), save_directory / "config.json")
        if self.trained.result:
            write_json(_public(self.trained.result), save_directory / "result.json")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> "PretrainedModel":
        return cls(model_id if Path(model_id).is_dir() else snapshot_download(model_id, **options))


def _public(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result without what says where on a machine the run and its data were."""
    data = [{**part, "source": Path(part["source"]).name} for part in result["data"]]
    return {name: value for name, value in result.items() if name not in ("command", "tracking")} | {"data": data}
