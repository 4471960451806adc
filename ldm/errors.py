"""The errors that ldm raises on purpose.

    LdmError
    |-- RecipeError         a recipe names something unknown or holds a value out of range
    |-- ContractError       two artefacts do not fit each other (latents and first stage, shapes, ranges)
    |-- CheckpointError     a foreign checkpoint is damaged, hostile, or does not fit its config
    |-- WeightsError        packaged weights are missing or are not the bytes expected
    |-- TrainingError       a run cannot go on (loss not finite too often, a checkpoint of another recipe)
    |-- WorkerError         processes of a run ended before their work was done
    |-- TrackingError       MLflow cannot be asked what must be known before something is removed
    `-- ModelNotFoundError  no finished model has the name or the key asked for

Every message says the rule, what was received and what to do about it.
A wrong argument from a caller inside the program stays a plain ValueError.
"""


class LdmError(Exception):
    """Any failure that ldm foresees; catch this one to catch them all."""


class RecipeError(LdmError):
    """A recipe is not valid: an unknown name, or a value outside its limits."""


class ContractError(LdmError):
    """Two artefacts were put together that do not belong together."""


class CheckpointError(LdmError):
    """A checkpoint or model folder from outside cannot be used: damaged, hostile, or of another model."""


class WeightsError(LdmError):
    """Packaged weights are missing, or their digest is not the one expected."""


class TrainingError(LdmError):
    """Training had to stop before its end."""


class WorkerError(LdmError):
    """Processes of a run ended before their work was done."""


class TrackingError(LdmError):
    """The tracker cannot answer where its answer decides."""


class ModelNotFoundError(LdmError):
    """The model asked for does not exist."""
