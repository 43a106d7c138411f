"""The entry point of inspect: it adds the provider `thinkstack`, so that a task runs on a checkpoint.

    inspect eval task.py --model thinkstack/FOLDER -M dtype=fp32

inspect imports this module whenever it looks for a provider; torch and the model are imported when one is asked for.
"""

from inspect_ai.model import ModelAPI, modelapi


@modelapi(name="thinkstack")
def thinkstack() -> type[ModelAPI]:
    """The class of the provider."""
    from thinkstack.evals.adapters.inspect_model import ThinkstackAPI

    return ThinkstackAPI
