"""Write what genuine templates make of the conversations here: python -m tests.golden.make FOLDER...

A folder bears the name of a format (v3, r1, r1_0528, v3_1) and has a tokenizer_config.json with the template that is
published with that model. transformers renders; one JSON file a format is written beside this script.
"""

import json
import sys
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

from tests.golden import FOLDER, as_request, conversations
from thinkstack.text.tokenizer import BOS, EOS


def render(template: str, switches: dict[str, bool]) -> dict[str, str]:
    """The prompt of each conversation, without tools at hand: these templates do not write them."""
    cases = conversations()
    texts, _ = render_jinja_template(
        [as_request(conversation) for conversation in cases],
        chat_template=template,
        add_generation_prompt=True,
        bos_token=BOS,
        eos_token=EOS,
        **switches,
    )
    return {conversation["key"]: text for conversation, text in zip(cases, texts, strict=True)}


def main(folders: list[str]) -> None:
    for folder in map(Path, folders):
        template = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
        names = (
            {folder.name: {}, f"{folder.name}_think": {"thinking": True}}
            if "thinking" in template
            else {folder.name: {}}
        )
        for name, switches in names.items():
            text = json.dumps(render(template, switches), ensure_ascii=False, indent=1)
            (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
